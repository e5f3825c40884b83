"""Draws the prompts of an input.json with learned words: OUT/{concept}/{prompt}/source{concept}_prompt{prompt}_{i}.png, 25 each; of a prompts.json, the
later challenge's, OUT/{entry}/{i}.png.

    python -m p3_clip_textual_inversion.inference INPUT_JSON OUT CKPT
"""

import argparse
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path

import torch

from .concepts import read_entries, refuse_examples
from .custom_diffusion import read_projections, set_projections, tell_projections
from .defaults import SD_V1, add_argument, fill_in, row_of
from .device import DTYPES, by_the_first, describe, in_batches, meet, name_of, pick_device, pick_dtype, processes, progress
from .diffusion import Guided
from .embedding import add_words, check_models, expand, find_words, initial_rows, model_name, tokens_of, told_model
from .estimate import announce
from .files import UserError, check_flags, existing_file, fingerprint, lock, note, run, writable_folder
from .formats.identity import identify, weights_fingerprint
from .formats.words import gather, own_words
from .lora import add_loras, find_loras, loras_of
from .model import MINI_SD, load_stable_diffusion
from .pictures import save_image, to_uint8
from .places import LEARNED, check_regions, read_regions, regions_of
from .provenance import HelpFormatter, Made, batches_with, claim, script_line
from .regions import plans_of, print_plans, regional, texts_of
from .samplers import SAMPLERS, ImageNoise, even, finish, leading
from .tensors import tensor_fingerprint

OPTIONAL = ("negative_prompt", "guidance_interval", "regions")  # what a PNG tells only where it is used: others stay what they were before there was any


@dataclass(frozen=True)
class DrawConfig:
    """How pictures are drawn. guidance_weight: w of the project's formula; side: in pixels, None for the model's own; dtype: of the UNet's autocast;
    negative_prompt: what guidance leads away from; guidance_interval: the t/T where it does; regions: of `read_regions`."""
    sampler: str = SD_V1.drawing.sampler
    num_steps: int = SD_V1.drawing.steps
    guidance_weight: float = SD_V1.drawing.guidance_weight
    side: int | None = None
    seed: int = 0
    batch_size: int = SD_V1.drawing.batch_size
    dtype: torch.dtype = torch.float32
    negative_prompt: str = ""
    guidance_interval: tuple = (0.0, 1.0)
    regions: tuple | str = ()

    def told(self):
        """What a PNG tells of it."""
        unused = {field.name for field in fields(self) if field.name in OPTIONAL and getattr(self, field.name) == field.default}
        return {name: value for name, value in asdict(self).items() if name not in {"batch_size", *unused}} | {"dtype": name_of(self.dtype)}

    @classmethod
    def of_told(cls, told, batch_size):
        """The settings that a PNG tells; a LookupError, TypeError or ValueError where that is damaged."""
        given = {field.name: told[field.name] for field in fields(cls) if field.name not in ("batch_size", *OPTIONAL) or field.name in told}
        given |= {"dtype": DTYPES[given["dtype"]], "regions": regions_of(given.get("regions", ())), "batch_size": batch_size}
        config = cls(**given | {"guidance_interval": tuple(given.get("guidance_interval", cls.guidance_interval))})
        config.check()
        return config

    def check(self):
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--guidance-interval must be two numbers with 0 <= low <= high <= 1, not {low} {high}")

    def states(self, model, alpha_bar, noise):
        """The sampler's states from noise(), as Stable Diffusion is drawn with it: DDIM at its own steps, to alpha_bar[0]; the others evenly, to the end."""
        spacing = leading if self.sampler == "ddim" else even
        return SAMPLERS[self.sampler](model, noise(), spacing(alpha_bar, self.num_steps), noise=noise)


def guidance_and_noise(parts, cond, names, config, guided=Guided):
    """What a sampler asks for a batch. cond: hidden states [B, tokens, dim] of the prompts; names: of the pictures, which seed their noise."""
    noise = ImageNoise(config.seed, names, parts.latent_shape(config.side), parts.device)
    uncond = parts.encode_text([config.negative_prompt]).expand_as(cond)
    return guided(parts.unet, parts.alpha_bar, cond, uncond, config.guidance_weight, config.dtype,
                  interval=config.guidance_interval), noise


def states(parts, cond, names, config, guided=Guided):
    """A sampler's states for a batch; see `guidance_and_noise`."""
    model, noise = guidance_and_noise(parts, cond, names, config, guided)
    return config.states(model, parts.alpha_bar, noise)


def generate(parts, prompts, names, config=None, plans=None, progress=None):
    """Yields a picture uint8 numpy [H, W, 3] for each prompt, from the noise of (config.seed, its name); the same whatever the batch size.

    prompts: with learned words already written out (embedding.expand), as in the negative prompt. plans: of `regions.plans_of`: none, no regions.
    progress: a tqdm that counts pictures. A batch that memory cannot hold is halved."""
    for _, picture in generate_share(parts, prompts, names, config, plans, progress):
        yield picture


@torch.inference_mode()
def generate_share(parts, prompts, names, config=None, plans=None, progress=None, share=(0, 1)):
    """Yields (number of the prompt, picture) as `generate`, of one of several processes. share: (rank, processes): which whole batches are its own."""
    config, plans = config or DrawConfig(), plans or {}
    hidden = encoded(parts, [*prompts, *texts_of(plans)])

    def work(batch):
        cond = torch.stack([hidden[prompts[i]] for i in batch])
        guided = regional(parts, [plans.get(prompts[i], ()) for i in batch], hidden)
        return parts.decode(finish(states(parts, cond, [names[i] for i in batch], config, guided)).x)

    for batch, decoded in in_batches(range(len(prompts)), config.batch_size, work, "picture", "--dtype fp16 or a smaller --side", share):
        if not decoded.isfinite().all():
            raise UserError(f"a picture of {prompts[batch[0]]!r} is not finite; try --dtype fp32 or a smaller --guidance-weight")
        if progress is not None:
            progress.update(len(batch))
        yield from zip(batch, to_uint8(decoded))


def encoded(parts, texts):
    """{text: hidden states [tokens, dim]}"""
    unique = list(dict.fromkeys(texts))
    return dict(zip(unique, torch.cat([parts.encode_text(unique[i:i + 64]) for i in range(0, len(unique), 64)]))) if unique else {}


@torch.inference_mode()
def work_of(parts, prompts, names, config, plans=None):
    """[(how often, work)] of a drawing, for `announce`: a step of the sampler for the first batch, and the decoding of a batch."""
    first, plans = prompts[:config.batch_size], plans or {}
    guided = regional(parts, [plans.get(prompt, ()) for prompt in first], encoded(parts, texts_of(plans)))
    model, noise = guidance_and_noise(parts, parts.encode_text(first), names[:config.batch_size], config, guided)
    x, batches = noise(), math.ceil(len(prompts) / config.batch_size)
    return [(config.num_steps * batches, lambda: next(config.states(model, parts.alpha_bar, noise))), (batches, lambda: parts.decode(x))]


def add_arguments(parser):
    """The flags of drawing, which inference, figures, compare and several share."""
    add_argument(parser, "drawing", "--sampler", "the update rule; dpmpp_2m is DPM-Solver++, and heun calls the network twice a step",
                 choices=list(SAMPLERS))
    add_argument(parser, "drawing", "--steps", "steps per picture, a call of the network each (heun: two); DDIM wants 50", type=int)
    add_argument(parser, "drawing", "--guidance-weight", "w of (1+w)*eps_cond - w*eps_uncond; diffusers' scale is 1+w", type=float, metavar="W")
    parser.add_argument("--side", type=int, default=None, help="of the pictures, in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' noise")
    add_argument(parser, "drawing", "--batch-size", "pictures at a time; they differ by rounding alone", type=int)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the UNet; auto: bf16 or fp16 where it is fast")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def settings_of(args):
    """(DrawConfig, device, the model's row of the table, its name) of parsed arguments, checked; prints what is in use, and leaves args.width, of its words."""
    identity = identify(args.checkpoint)
    row, args.width = row_of(identity.side), identity.width
    name, told = model_name(row, identity), fill_in(args, row.drawing)
    check_flags(args, ("batch_size",), lambda value: value >= 1, "at least 1")
    if not 1 <= args.steps <= 1000:
        raise UserError(f"--steps must be between 1 and 1000, not {args.steps}")
    if args.sampler == "ddim" and 250 < args.steps < 1000 and (first := 1000 // args.steps * (args.steps - 1) + 1) < 800:
        note(f"--steps {args.steps} of ddim begin at t = {first}, where the model expects part of a picture already; 250 or 500 begin above 990")
    check_flags(args, ("guidance_weight",), math.isfinite, "a finite number")
    check_flags(args, ("side",), lambda value: value is None or value >= 1, "at least 1")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    print(f"{row.name} ({name}), {args.side or identity.side} pixels, on {describe(device, dtype)}: {told}", flush=True)
    return DrawConfig(args.sampler, args.steps, args.guidance_weight, args.side, args.seed, args.batch_size, dtype), device, row, name


def main():
    parser = argparse.ArgumentParser(description="Draws prompts with learned words.", formatter_class=HelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT_JSON", help="the concepts and prompts")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("checkpoint", nargs="?", default=str(MINI_SD), metavar="CKPT",
                        help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--embeddings", action="append", default=None, metavar="WORDS", help="a folder of learned words' files, or one; '<new1>=FILE' where "
                        "a file does not tell its word; '<new1>=dog+FILE' for a difference to dog's row; may be given several times (default: those that "
                        "scripts/install.sh installed for this model)")
    parser.add_argument("--projections", type=Path, default=None, metavar="FILE", help="projections.safetensors of a training with --custom-diffusion, or "
                        "Custom Diffusion's weights as diffusers or its authors' code save them")
    parser.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE", help="weights of low rank for all prompts, as scripts/p3_train.sh, "
                        "diffusers or kohya write them; may be given several times. Those beside a word, such as new1_lora.safetensors, are found unasked, and "
                        "drawn with where a prompt has the word")
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="S", help="by which all of those are multiplied; 0 leaves them out")
    parser.add_argument("--num-images", type=int, default=25, help="pictures per prompt; the grader wants 25")
    parser.add_argument("--regions", nargs="+", default=None, metavar="THING=BOX", help="where things of the prompts are, such as '<new1>=0,0.2,0.5,1' "
                        "'red apple=0.5,0.2,1,1' (left, top, right, bottom, in shares of the picture; where boxes overlap all share), behind OUT and CKPT; or "
                        "auto: by the prompt's words (on the left, above, next to, ...) or, of things that are only listed (a cat and a dog), by its own "
                        "attention; or learned: the same, only where two learned words are apart; or none (default: none, but learned for a prompts.json)")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from (default: the empty prompt)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=DrawConfig.guidance_interval,
                        help="guide only at noise levels LOW <= t/1000 <= HIGH")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what OUT holds, also of other settings or words, which is refused otherwise; of "
                        "these what is not drawn now is removed")
    add_arguments(parser)
    args, started = parser.parse_args(), time.perf_counter()
    regions = read_regions(args.regions)
    config, device, _, model = settings_of(args)
    check_flags(args, ("num_images",), lambda value: 1 <= value <= 10**6, "between 1 and 1000000")
    check_flags(args, ("lora_scale",), math.isfinite, "a finite number")
    entries = read_entries(args.input)
    texts = [prompt for entry in entries for prompt in entry.prompts]
    regions = LEARNED if args.regions is None and any(entry.challenge for entry in entries) else regions
    check_regions(regions, texts)
    config = replace(config, negative_prompt=args.negative_prompt, guidance_interval=tuple(args.guidance_interval), regions=regions)
    config.check()
    texts += [config.negative_prompt]
    refuse_examples(args.output, args.input, [concept for entry in entries for concept in entry.concepts])
    concepts = {concept.token: concept.number for entry in entries for concept in entry.concepts}
    tokens = list(concepts)

    def learn(words):
        """The command that learns these words, and what makes them known."""
        line = script_line("p3_train.sh", args.input, "--checkpoint", args.checkpoint, "--concepts", *map(concepts.get, words), "--output", "runs/words")
        return f"{line}, then bash scripts/install.sh runs/words"

    own = {word: rows for word, rows in own_words(args.checkpoint).items() if word in tokens}
    args.words, missing = args.embeddings or [], [token for token in tokens if token not in own]
    if missing and not args.words:
        args.words = [str(find_words(model, learn(missing)))]
    asked = [token for token in tokens if token in missing or any(str(words).startswith(f"{token}=") for words in args.words)]
    vectors, initials, origin = gather(args.words, asked, texts, args.width, model, learn, bool(args.embeddings)) if args.words else ({}, {}, {})
    args.words += [args.checkpoint] if own.keys() - vectors.keys() else []
    vectors = own | vectors
    if args.projections:
        existing_file(args.projections, "projections")
    tell_projections(args.projections, origin)
    args.loras = find_loras(args.lora, origin) if args.lora_scale else {}
    told = {path: (word, told_model(metadata)) for word, (path, metadata) in origin.items()}
    lines = [f"words: {', '.join(tokens)} of {', '.join(args.words)}", *(f"weights of low rank: {path}" for path in args.loras.values())]
    print("\n".join([*lines, *check_models(told, tokens, model)]), flush=True)
    for entry in entries:
        for k in range(len(entry.prompts)):
            writable_folder((args.output / entry.picture(k, 0)).parent)
    with processes() as share, lock(args.output) if share[0] == 0 else nullcontext():
        draw(args, config, device, model, entries, vectors, initials, started, share)


def draw(args, config, device, model, entries, vectors, initials, started, share):
    """The grader's files, or this process's share of them: those that are not there yet, whole and made in this way. They are drawn in the batches that they
    would always be in: the last bits of a picture depend on those beside it."""
    jobs = {e.picture(k, i): (e, k, i) for e in entries for k in range(len(e.prompts)) for i in range(args.num_images)}
    made_of = {"model": model, "weights": weights_fingerprint(args.checkpoint)} | ({"projections": fingerprint(args.projections)} if args.projections else {})
    made = Made("p3_clip_textual_inversion.inference", config.told(), made_of)
    prints = {word: (f"{initials[word]}+" if word in initials else "") + tensor_fingerprint(rows) for word, rows in vectors.items()}
    own = {name: {"prompt": e.prompts[k], "token": e.token, "number": i, "words": {w: prints[w] for w in prints if w in e.prompts[k] + config.negative_prompt}}
           for name, (e, k, i) in jobs.items()}
    loras = {name: f"{args.lora_scale:g} x {fingerprint(path)}" for name, path in args.loras.items()}
    for of in own.values() if loras else ():
        of["lora"] = loras_of(of["prompt"], args.loras, loras)
    where = {"device": describe(device, config.dtype), "checkpoint": local(args.checkpoint), "words": [absolute(words, vectors) for words in args.words],
             "projections": str(args.projections and args.projections.resolve())}
    where |= {"lora": {name: str(path.resolve()) for name, path in args.loras.items()}} if loras else {}
    parts = None
    if args.side or loras:  # before anything is written: only the model knows which will do
        parts = load_with_words(args.checkpoint, device, config, vectors, args.projections, initials)
        parts.latent_shape(args.side)
        added = add_loras(parts, args.loras, args.lora_scale)
    there = by_the_first(share, lambda: claim(args.output, made, own, config.batch_size, where, args.overwrite, added_to))
    missing = jobs.keys() - set(there)
    runs = {name: number for number, (_, run) in enumerate(groupby(own, lambda name: added_to(own[name]))) for name in run}  # of neighbours of the same weights
    jobs = {name: jobs[name] for batch in batches_with(missing, list(jobs), config.batch_size, runs.get) for name in batch}
    if jobs:
        parts = parts or load_with_words(args.checkpoint, device, config, vectors, args.projections, initials)
        prompts, names, counts = expanded(own, jobs, vectors), [noise_name(own[name]) for name in jobs], {word: len(rows) for word, rows in vectors.items()}
        plans, config = plans_of(prompts, config, counts), replace(config, negative_prompt=expand(config.negative_prompt, counts))
        check_lengths(parts, [*prompts, *texts_of(plans), config.negative_prompt], counts)
        if share == (0, 1):
            print_plans([own[name]["prompt"] for name in jobs], config, vectors)
            announce(work_of(parts, prompts, names, config, plans), parts.unet, device, started, config.num_steps, "steps of the sampler")
        with progress(total=len(jobs) // share[1], unit="picture", desc="drawing", disable=share[0] > 0) as bar:
            before = 0  # batches of the runs so far: the processes go on taking turns
            for _, run in groupby(zip(jobs, prompts, names), lambda job: runs[job[0]]):
                paths, texts, noises = zip(*run)
                turn = (share[0] - before) % share[1], share[1]
                before += math.ceil(len(paths) / config.batch_size)
                if loras:
                    added.use(added_to(own[paths[0]]))
                for job, picture in generate_share(parts, texts, noises, config, plans, bar, turn):
                    if paths[job] in missing:
                        save_image(picture, args.output / paths[job], made.with_own(own[paths[job]]).as_json())
    meet(share)
    print(f"wrote {len(missing)} pictures to {args.output} in {time.perf_counter() - started:.1f} s{f'; {len(there)} were there already' if there else ''}"
          + f"\nnext: {script_line('p3_grade.sh', args.output, args.input)}")


def added_to(own):
    """The weights of low rank that a picture is drawn with, {name: fingerprint}, by what is its own; None where no picture has any."""
    return own.get("lora")


def local(checkpoint):
    """A path that is good from anywhere, or a hub's name as it is."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else str(checkpoint)


def absolute(words, needed):
    """What --embeddings was given, with a path that is good from anywhere: <new1>=dog+FILE, too."""
    if Path(words).exists():
        return str(Path(words).resolve())
    word = next(word for word in needed if words.startswith(f"{word}="))
    rest = words[len(word) + 1:]
    initial, file = ("", rest) if Path(rest).exists() else rest.split("+", 1)
    return f"{word}={initial}{'+' if initial else ''}{Path(file).resolve()}"


def noise_name(own):
    """By which the noise of a picture is seeded."""
    return f"{own['token']}/{own['prompt']}/{own['number']}"


def expanded(own, names, vectors):
    """The prompts of the pictures `names`, with learned words written out."""
    counts = {word: len(rows) for word, rows in vectors.items()}
    return [expand(own[name]["prompt"], counts) for name in names]


def load(checkpoint, device, config):
    """The model as it draws: on a GPU in the number format of its settings, which halves its memory."""
    parts = load_stable_diffusion(checkpoint, device, torch.float32 if device.type == "cpu" else config.dtype)
    if device.type == "cuda" and config.dtype != torch.float32:
        parts.vae.half()  # of bf16's few digits bands are seen
    return parts


def load_with_words(checkpoint, device, config, vectors, projections=None, initials=None):
    """The model, with words and projections. initials: {word: ordinary words to whose rows its vectors are a difference}"""
    parts = load(checkpoint, device, config)
    add_words(parts, {word: rows + initial_rows(parts, initials[word], len(rows)) if word in (initials or {}) else rows for word, rows in vectors.items()})
    if projections:
        set_projections(parts.unet, read_projections(projections, parts.unet))
    return parts


def check_lengths(parts, prompts, counts):
    """Notes the prompts that the model does not read to their end; a `UserError` where that end has a learned word, which would go unseen.

    prompts: with learned words written out; counts: {word: number of vectors}"""
    limit = parts.tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        ids = parts.tokenizer(prompt).input_ids
        if len(ids) <= limit:
            continue
        lost = parts.tokenizer.convert_ids_to_tokens(ids[limit - 1:])
        cut = [word for word, count in counts.items() if set(tokens_of(word, count)) & set(lost)]
        if cut:
            raise UserError(f"the model reads {limit} tokens, and {cut[0]} comes after them, or not whole, in {prompt[:80]!r}; shorten the prompt")
        note(f"a prompt has {len(ids)} tokens, the model reads {limit}: the end of {prompt!r} is lost")


if __name__ == "__main__":
    run(main)
