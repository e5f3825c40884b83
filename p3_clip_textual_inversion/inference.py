"""Draws the prompts of an input.json with learned words: OUT/{concept}/{prompt}/source{concept}_prompt{prompt}_{i}.png, 25 each.

    python -m p3_clip_textual_inversion.inference INPUT_JSON OUT CKPT
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from .custom_diffusion import read_weights, set_weights
from .data import read_concepts
from .defaults import SD_V1, add_argument, fill_in, row_of
from .device import DTYPES, pick_device, pick_dtype
from .diffusion import SAMPLERS, Guided, image_noise
from .embedding import add_words, check_models, expand, find_words, model_name, read_embeddings
from .estimate import announce
from .files import UserError, check_flags, run, writable_folder
from .identity import identify
from .pictures import save_image, to_uint8
from .stable_diffusion import MINI_SD, load_stable_diffusion


@dataclass(frozen=True)
class DrawConfig:
    """How pictures are drawn. guidance_weight: w of the project's formula; side: in pixels, None for the model's own; dtype: of the UNet's autocast."""
    sampler: str = SD_V1.drawing.sampler
    num_steps: int = SD_V1.drawing.steps
    guidance_weight: float = SD_V1.drawing.guidance_weight
    side: int | None = None
    seed: int = 0
    batch_size: int = SD_V1.drawing.batch_size
    dtype: torch.dtype = torch.float32


@torch.inference_mode()
def draw(parts, prompts, names, config=None, guided=Guided, progress=None):
    """Yields a picture uint8 numpy [H, W, 3] for each prompt, from the noise of (config.seed, its name); the same whatever the batch size.

    prompts: with learned words already written out (embedding.expand). guided: makes the noise predictor, like `diffusion.Guided`.
    progress: a tqdm that counts pictures. A batch that a GPU has no memory for is halved."""
    config = config or DrawConfig()
    shape = parts.latent_shape(config.side)
    unique = list(dict.fromkeys(prompts))
    hidden = dict(zip(unique, torch.cat([parts.encode_text(unique[i:i + 64]) for i in range(0, len(unique), 64)])))
    empty = parts.encode_text([""])
    start, batch_size = 0, config.batch_size
    while start < len(prompts):
        batch = slice(start, start + batch_size)
        cond = torch.stack([hidden[prompt] for prompt in prompts[batch]])
        x = image_noise(config.seed, names[batch], shape, parts.device)
        try:
            predict = guided(parts.unet, cond, empty.expand_as(cond), config.guidance_weight, config.dtype)
            for state in SAMPLERS[config.sampler](predict, parts.alpha_bar, x, config.num_steps):
                x = state.x
            decoded = parts.decode(x)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise UserError("the GPU has no memory for even one picture; try --dtype fp16 or a smaller --side") from None
            batch_size //= 2
            torch.cuda.empty_cache()
            continue
        if not decoded.isfinite().all():
            raise UserError(f"a picture of {prompts[start]!r} is not finite; try --dtype fp32 or a smaller --guidance-weight")
        pictures = to_uint8(decoded)
        start += len(pictures)
        if progress is not None:
            progress.update(len(pictures))
        yield from pictures


@torch.inference_mode()
def work_of(parts, prompts, names, config):
    """[(how often, work)] of a drawing, for `announce`: a step of the sampler for the first batch, and the decoding of a batch."""
    cond = parts.encode_text(prompts[:config.batch_size])
    x = image_noise(config.seed, names[:config.batch_size], parts.latent_shape(config.side), parts.device)
    predict = Guided(parts.unet, cond, parts.encode_text([""]).expand_as(cond), config.guidance_weight, config.dtype)
    sampler, batches = SAMPLERS[config.sampler], math.ceil(len(prompts) / config.batch_size)
    return [(config.num_steps * batches, lambda: next(sampler(predict, parts.alpha_bar, x, config.num_steps))), (batches, lambda: parts.decode(x))]


def picture_path(output, number, prompt, i):
    """The contract's name of picture i of a concept's prompt."""
    return Path(output) / number / str(prompt) / f"source{number}_prompt{prompt}_{i}.png"


def add_arguments(parser):
    """The flags of drawing, which inference, figures, compare and multi share."""
    add_argument(parser, "drawing", "--sampler", "DPM-Solver++ or DDIM", choices=list(SAMPLERS))
    add_argument(parser, "drawing", "--steps", "network calls per picture; DDIM wants 50", type=int)
    add_argument(parser, "drawing", "--guidance-weight", "w of (1+w)*eps_cond - w*eps_uncond; diffusers' scale is 1+w", type=float, metavar="W")
    parser.add_argument("--side", type=int, default=None, help="of the pictures, in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' noise")
    add_argument(parser, "drawing", "--batch-size", "pictures at a time; the pictures do not depend on it", type=int)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the UNet; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def settings_of(args):
    """(DrawConfig, device, the model's row of the table, its name) of parsed arguments, checked; prints what is in use."""
    identity = identify(args.checkpoint)
    row = row_of(identity.side)
    name, told = model_name(row, identity), fill_in(args, row.drawing)
    check_flags(args, ("batch_size",), lambda value: value >= 1, "at least 1")
    if not 1 <= args.steps <= 1000:
        raise UserError(f"--steps must be between 1 and 1000, not {args.steps}")
    check_flags(args, ("guidance_weight",), math.isfinite, "a finite number")
    check_flags(args, ("side",), lambda value: value is None or value >= 1, "at least 1")
    device = pick_device(args.device)
    print(f"{row.name} ({name}), {args.side or identity.side} pixels: {told}", flush=True)
    return DrawConfig(args.sampler, args.steps, args.guidance_weight, args.side, args.seed, args.batch_size, pick_dtype(args.dtype, device)), device, row, name


def main():
    parser = argparse.ArgumentParser(description="Draws prompts with learned words.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT_JSON", help="the concepts and prompts")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("checkpoint", nargs="?", default=str(MINI_SD), metavar="CKPT",
                        help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--embeddings", type=Path, default=None, help="folder of the learned words' .safetensors (default: those that "
                        "scripts/install.sh installed for this model)")
    parser.add_argument("--projections", type=Path, default=None, metavar="FILE", help="projections.safetensors of a training with --custom-diffusion")
    parser.add_argument("--num-images", type=int, default=25, help="pictures per prompt; the grader wants 25")
    parser.add_argument("--overwrite", action="store_true", help="draw again what is already there")
    add_arguments(parser)
    args, started = parser.parse_args(), time.perf_counter()
    config, device, _, model = settings_of(args)
    check_flags(args, ("num_images",), lambda value: value >= 1, "at least 1")
    concepts = read_concepts(args.input)
    tokens = [concept.token for concept in concepts]
    words = args.embeddings or find_words(model, f"bash scripts/p3_train.sh {args.input} --checkpoint {args.checkpoint} --output runs/words")
    vectors = read_embeddings(words, tokens)
    print("\n".join([f"words: {', '.join(tokens)} of {words}", *check_models(words, tokens, model)]), flush=True)
    jobs = [(concept, k, i) for concept in concepts for k in range(len(concept.prompts)) for i in range(args.num_images)]
    for concept in concepts:
        for k in range(len(concept.prompts)):
            writable_folder(args.output / concept.number / str(k))
    if not args.overwrite:
        jobs = [(c, k, i) for c, k, i in jobs if not picture_path(args.output, c.number, k, i).exists()]
    if jobs:
        parts = load_stable_diffusion(args.checkpoint, device, torch.float32 if device.type == "cpu" else config.dtype)
        if device.type == "cuda" and config.dtype != torch.float32:
            parts.vae.half()  # of bf16's few digits bands are seen
        add_words(parts, vectors)
        if args.projections:
            set_weights(parts.unet, read_weights(args.projections, parts.unet))
        counts = {word: len(rows) for word, rows in vectors.items()}
        prompts = [expand(concept.prompts[k], counts) for concept, k, _ in jobs]
        for prompt in dict.fromkeys(prompts):
            length = len(parts.tokenizer(prompt).input_ids)
            if length > parts.tokenizer.model_max_length:
                tqdm.write(f"note: a prompt has {length} tokens, the model reads {parts.tokenizer.model_max_length}: the end of {prompt!r} is lost")
        names = [f"{concept.token}/{concept.prompts[k]}/{i}" for concept, k, i in jobs]
        announce(work_of(parts, prompts, names, config), parts.unet, device, started, config.num_steps)
        with tqdm(total=len(jobs), unit="picture", desc="drawing") as bar:
            for (concept, k, i), picture in zip(jobs, draw(parts, prompts, names, config, progress=bar)):
                save_image(Image.fromarray(picture), picture_path(args.output, concept.number, k, i))
    there = sum(len(c.prompts) for c in concepts) * args.num_images - len(jobs)
    print(f"wrote {len(jobs)} pictures to {args.output} in {time.perf_counter() - started:.1f} s" + (f"; {there} were there already" if there else "")
          + f"\nnext: bash scripts/p3_grade.sh {args.output} {args.input}")


if __name__ == "__main__":
    run(main)
