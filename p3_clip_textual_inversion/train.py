"""Textual inversion (Gal et al. 2023): learns a word for what a few pictures show, everything else frozen. The same command again goes on where it stopped.

    python -m p3_clip_textual_inversion.train                                                        # both bundled concepts, on the miniature
    python -m p3_clip_textual_inversion.train --checkpoint hw2_data/weights/sd-v1-4.ckpt --output runs/words    # the course's, on the real model

With --joint all concepts learn in one run, also from composed pictures; with --custom-diffusion (Kumari et al. 2023) the key and value projections of
every cross-attention learn too, with --lora weights of low rank beside the word (lora.py); both are held in place by ordinary pictures that the model draws
itself.
"""

import argparse
import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from .concepts import concepts_of, kind_of, refuse_examples
from .custom_diffusion import projections, save_projections, weights_of
from .data import read_captions
from .defaults import fill_in, input_of, of_model, row_of
from .embedding import add_words, check_files, expand, file_of, initial_rows, model_name, save_embedding
from .files import UserError, atomic_path, check_flags, run, writable_file, writable_folder, write_json
from .formats.identity import identify, weights_fingerprint
from .inference import DrawConfig, generate
from .lora import add_lora, free_directions, keep_free, lora_file, save_kohya, save_lora
from .model import MINI_SD, load_stable_diffusion
from .objective import Best, Loss
from .pictures import read_pictures, save_image
from .provenance import HelpFormatter
from .sources import draw_batch, make_held, make_sources
from .state import fitting, held, load_state, refuse_nonfinite, refuse_others, restore, save_state
from .training import (
    Log,
    add_arguments,
    add_settings,
    configured,
    first_line_of,
    guarded,
    is_flat,
    prepare,
    setting,
    share,
)

LOG_EVERY = 20
MOST = {"vectors": 73, "crops": 1000, "prior": 100_000, "steps": 10**7, "lora": 1024}  # what a prompt of CLIP and a memory hold
VALIDATIONS = 15  # how often in a run
ADVICE = "lower --batch-size (--accumulate makes up for it) or --side, or give --gradient-checkpointing"


@dataclass(frozen=True)
class TrainConfig:
    """What decides a word, beside its pictures and the model. `UserError` for what no training can be.

    Where no flag says otherwise (None), `parse_args` puts in what the model's row of defaults.py has."""

    kind: str = setting("auto", "which captions to train with; auto: style where each prompt has 'style of'", choices=["auto", "object", "style"])
    vectors: int = setting(None, f"per word {of_model('learning', 'vectors')}", type=int)
    init: str = setting("src_image", "words to start from; src_image: those of input.json; noise: none")
    steps: int = setting(None, f"optimiser steps {of_model('learning', 'steps')}", type=int)
    batch_size: int = setting(None, f"latents per step, over all processes together {of_model('learning', 'batch_size')}", type=int)
    accumulate: int = setting(1, "batches per step, where memory has no place for a large one")
    lr: float = setting(None, f"peak learning rate of AdamW {of_model('learning', 'lr')}", type=float)
    decay: float = setting(0.5, "last share of the steps, over which the learning rate falls to zero")
    norm: str = setting("keep", "keep each vector as long as the word it started from, or let it grow", choices=["keep", "free"])
    pull: float | None = setting(None, "share of the way back to the initial words that the whole run goes, its steps as their --lr: less of the concept, more "
                                 f"of the rest; without the flag 0 for an object and for a style the model's {of_model('learning', 'style_pull')}", type=float)
    min_snr_gamma: float = setting(None, "min-SNR loss weights (Hang et al. 2023): the smaller, the less slight noise counts; 0: all alike "
                                   + of_model("learning", "min_snr_gamma"), type=float)
    joint: bool = setting(False, "learn all concepts in one run, also from pictures of two side by side")
    custom_diffusion: bool = setting(False, "also learn the key and value projections of the cross-attentions")
    lr_projections: float = setting(None, f"peak learning rate of those {of_model('learning', 'lr_projections')}", type=float)
    lora: int = setting(0, "also learn weights of low rank in the cross-attentions, and for as many --steps as they need; without the flag the word "
                        f"alone, without RANK the model's {of_model('low_rank', 'lora')}", type=int, nargs="?", metavar="RANK")
    lr_lora: float = setting(None, f"peak learning rate of those {of_model('low_rank', 'lr_lora')}", type=float)
    pivot: float = setting(None, f"share of the steps in which the word learns alone, before those do {of_model('low_rank', 'pivot')}", type=float)
    hold: float = setting(None, "share of what ordinary captions say that those do not hear, which keeps ordinary prompts; 0: they hear all "
                          + of_model("low_rank", "hold"), type=float)
    prior: int = setting(None, f"ordinary pictures that hold projections or low-rank weights in place; 0 for none {of_model('learning', 'prior')}", type=int)
    crops: int = setting(8, "variations of each picture: crops up to 15 %% closer, half of them flipped")
    side: int | None = setting(None, "of the pictures, in pixels (default: the model's own)", type=int)
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        check_flags(self, ("steps", "batch_size", "accumulate", "lr", "vectors", "crops", "lr_projections"),
                    lambda value: 0 < value < math.inf, "a number above 0")
        check_flags(self, ("min_snr_gamma", "prior"), lambda value: 0 <= value < math.inf, "a number from 0")
        for flag, most in MOST.items():
            check_flags(self, (flag,), lambda value, most=most: value <= most, f"at most {most}")
        check_flags(self, ("decay", "pull"), lambda value: value is None or 0 <= value <= 1, "between 0 and 1")
        check_flags(self, ("side",), lambda value: value is None or value >= 1, "at least 1")
        if self.lora and self.custom_diffusion:
            raise UserError("--lora and --custom-diffusion both change the cross-attentions; give one of them")
        if self.lora:
            check_flags(self, ("lora", "lr_lora"), lambda value: 0 < value < math.inf, "a number above 0")
            check_flags(self, ("pivot", "hold"), lambda value: 0 <= value < 1, "from 0 to below 1")
        if not 0 <= self.seed < 10**12:
            raise UserError(f"--seed must be a whole number from 0, of at most 12 digits, not {self.seed}")


def pictures_fingerprint(folders):
    """Some digits by which the content of folders is known again."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")):
        digest.update(path.name.encode(errors="surrogateescape") + path.read_bytes())
    return digest.hexdigest()[:12]


def pull_of_step(pull, strength, total):
    """The share of the way back to the initial words that one step goes, where a whole run goes `pull` of it, however many steps it has: 1 - pull is the
    product of all steps' 1 - share. strength: of the step, 0..1; total: the sum of all steps' strengths."""
    return 1 - (1 - pull) ** (strength / total)


def on_cpu(snapshots):
    """{step: rows}, brought from the GPU in one copy."""
    return {at: rows.clone() for at, rows in zip(snapshots, torch.stack(list(snapshots.values())).cpu())}


def learn(concepts, config, args, row, model_id, accelerator, dtype):
    """Learns concepts in one run; writes it into OUTPUT/{numbers}/ and each word's file into OUTPUT.

    config: `TrainConfig`; args: where it all is, and what is seen on the way; row: the model's `Defaults`; model_id: its name."""
    numbers, words = "+".join(concept.number for concept in concepts), ", ".join(concept.token for concept in concepts)
    folder = writable_folder(args.output / numbers)
    results = {concept.token: file_of(args.output, concept.token) for concept in concepts}
    kinds = [kind_of(concept, config.kind) for concept in concepts]
    pull = config.pull
    if pull is None:
        pull = row.learning.style_pull if set(kinds) == {"style"} else 0.0
    settings = asdict(config) | {
        "pull": pull, "dtype": args.dtype, "gradient_checkpointing": args.gradient_checkpointing, "model": model_id, "weights": args.weights,
        "tokens": words, "src_images": ", ".join(concept.src_image for concept in concepts), "kinds": ", ".join(kinds),
        "pictures": pictures_fingerprint([concept.folder for concept in concepts])}
    beside = [lora_file(path) for path in results.values()]
    refuse_others(folder / "state.pt", [*results.values(), *beside])
    needed = ("step", "history", "recent", "trained", "best")
    state = load_state(folder / "state.pt", settings, needed, defaults=args.defaults) if (folder / "state.pt").exists() else None
    projected = [folder / "projections.safetensors"] if config.custom_diffusion else []
    if state and state["step"] >= config.steps and all(path.exists() for path in [*results.values(), *(beside if config.lora else ()), *projected]):
        accelerator.print(f"{words} {'are' if len(concepts) > 1 else 'is'} learned already: see {args.output}")
        return

    accelerator.free_memory()  # of the concept before, whose model it would keep
    device = accelerator.device
    parts = load_stable_diffusion(args.checkpoint, device, dtype)
    side = config.side or parts.side
    parts.latent_shape(side)  # refuses a side that does not fit
    drawing = DrawConfig(num_steps=20, guidance_weight=row.drawing.guidance_weight, side=side, dtype=dtype, batch_size=4)
    generator = torch.Generator().manual_seed(config.seed)
    rows = {concept.token: initial_rows(parts, {"src_image": concept.src_image, "noise": None}.get(config.init, config.init), config.vectors, generator)
            for concept in concepts}
    learned = add_words(parts, rows)
    sources, held = make_sources(parts, concepts, config, row, side, drawing), make_held(parts, concepts, config, row, side)
    if not args.sample_every:
        parts.vae.to("cpu")  # no longer needed
    if args.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        parts.unet.train()  # diffusers checkpoints in training mode only; there is no dropout
    trained = {"rows": learned.rows}
    if config.custom_diffusion:
        for name, module in projections(parts.unet).items():
            trained[name] = module.float().weight.requires_grad_(True)  # float32, like whatever an optimiser changes; autocast still computes in `dtype`
    if config.lora:
        weights = add_lora(parts.unet, config.lora, config.seed)
        trained |= weights
        free = free_directions(parts, row.templates["object"], config.hold)
    initial = learned.rows.detach().clone()
    lengths = initial.norm(dim=1, keepdim=True)
    step, history, recent, snapshots = 0, [], [], {0: learned.rows.detach().clone()}
    if state:
        with fitting(folder / "state.pt"):
            for name, parameter in trained.items():
                parameter.data.copy_(state["trained"][name])
            snapshots = {at: rows.to(device) for at, rows in state["snapshots"].items()}
    others = [parameter for name, parameter in trained.items() if name != "rows"]
    groups = [{"params": [learned.rows], "share": 1.0}]
    groups += [{"params": others, "share": (config.lr_lora if config.lora else config.lr_projections) / config.lr}] if others else []
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
    loss_of = Loss(parts, config.min_snr_gamma or None)
    best = Best(loss_of, parts, held, accelerator, config.batch_size, state["best"] if state else None)
    model, optimizer = accelerator.prepare(loss_of, optimizer)
    if state:
        step, history, recent = restore(folder / "state.pt", state, accelerator, optimizer=optimizer)
    else:
        best.update(0, trained)

    first_line_of(accelerator, dtype, f"learning {words}: {sum(p.numel() for p in trained.values()):,} numbers, "
                                      f"from {sum(len(source.means) for source in sources)} latents,")
    shown = [expand(row.templates[kind_of(c, config.kind)][-1].format(c.token), {c.token: config.vectors}) for c in concepts]
    strengths = [min(1, (config.steps - at) / max(config.decay * config.steps, 1)) for at in range(config.steps)]  # of learning and of the pull alike
    every = max(config.steps // VALIDATIONS, 1) if args.validate_every is None else args.validate_every
    log = Log(accelerator, folder, f"learning {words}", args, step, history)
    while step < config.steps and not is_flat(history, args.stop_when_flat):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # so that a resumed run draws the same numbers
        for group in optimizer.param_groups:
            waits = config.lora and group is not optimizer.param_groups[0] and step < config.pivot * config.steps
            group["lr"] = 0.0 if waits else group["share"] * config.lr * strengths[step]
        for _ in range(config.accumulate):
            x0, eps, t, texts = share(accelerator, *draw_batch(sources, parts.vae.config.scaling_factor, config.batch_size, generator))
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = model(x0, t, eps, *loss_of.ids(texts))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            recent.append(accelerator.reduce(loss.detach(), "mean"))
        if config.lora:
            keep_free(weights, free)
        with torch.no_grad():
            learned.rows.lerp_(initial, pull_of_step(pull, strengths[step], sum(strengths)))
            if config.norm == "keep":
                learned.rows.mul_(lengths / learned.rows.norm(dim=1, keepdim=True))
        step += 1
        log.bar.update()
        validating = every and (step % every == 0 or step == config.steps)
        if step % LOG_EVERY == 0 or step == config.steps or validating:
            refuse_nonfinite(step, recent, folder / "state.pt")
            numbers = {"loss": torch.stack(recent).mean().item(), "lr": config.lr * strengths[step - 1], "norm": learned.rows.norm(dim=1).mean().item()}
            log.add(step, **numbers, **(best.update(step, trained) if validating else {}))
            recent = []
        last = step == config.steps or is_flat(history, args.stop_when_flat)
        if step % max(config.steps // 10, 1) == 0 or last:
            snapshots[step] = learned.rows.detach().clone()
        if accelerator.is_main_process and args.sample_every and (step % args.sample_every == 0 or last):
            pictures = list(generate(parts, [prompt for prompt in shown for _ in range(4)], [f"sample/{i}" for i in range(4)] * len(shown), drawing))
            save_image(Image.fromarray(np.concatenate(pictures, axis=1)), folder / f"samples_{step:06d}.png")
        if step % args.save_every == 0 or last:
            refuse_nonfinite(step, [*recent, *trained.values()], folder / "state.pt")
            save_state(folder / "state.pt", accelerator, settings, step, history, recent, trained={name: p.detach() for name, p in trained.items()},
                       optimizer=optimizer, snapshots=on_cpu(snapshots), best={"losses": best.losses, "kept": best.kept})
    log.close(last=False)
    for name, parameter in trained.items():
        parameter.data.copy_(best.kept[name])
    if accelerator.is_main_process:
        accelerator.print(best.told(words))
        write_json(folder / "history.json", history)
        write_json(folder / "validation.json", {"kept_step": best.step, "losses": best.losses})
        with atomic_path(folder / "snapshots.safetensors") as temporary:
            save_file({f"{at:06d}": tensor for at, tensor in on_cpu(snapshots).items()}, temporary, metadata={"words": words})
        metadata = {name: str(value) for name, value in settings.items() if value is not None}
        for path in beside if config.lora else ():  # what learned together is beside each word
            save_lora(path, weights, metadata)
            save_kohya(folder / f"{path.stem}_kohya.safetensors", weights, metadata)
        for path in projected:
            save_projections(path, weights_of(parts.unet), metadata)
        for concept, part in zip(concepts, learned.rows.detach().split(config.vectors)):  # last: where these are, the rest is
            save_embedding(results[concept.token], concept.token, part, metadata)
        print(f"wrote {', '.join(map(str, results.values()))}; the run is in {folder}")


def parse_args():
    """(`TrainConfig`, all arguments, the model's `Defaults`, its name, a line that tells them)"""
    parser = argparse.ArgumentParser(description="Learns words for concepts by textual inversion.", formatter_class=HelpFormatter)
    parser.add_argument("input", type=Path, nargs="?", default=None, metavar="INPUT_JSON",
                        help="the concepts, pictures in 0/, 1/, ... beside it, or in concept_image/ (default: the model's, see defaults.py)")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--output", type=Path, default=Path("runs/p3"), help="folder for the embeddings and, by concept, their runs")
    parser.add_argument("--concepts", nargs="+", default=None, metavar="NAME", help="which of the concepts, by the names of their folders (default: all)")
    add_settings(parser, TrainConfig)
    add_arguments(parser, validate_every=None)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=100, help="steps between two rows of sample pictures; 0 for none")
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    identity = identify(args.checkpoint)
    row = row_of(identity.side)
    told = fill_in(args, row.learning if args.lora == 0 else SimpleNamespace(**vars(row.learning) | vars(row.low_rank)))
    name = model_name(row, identity)
    args.input, args.weights = input_of(args.input, row.input), weights_fingerprint(args.checkpoint)
    config = configured(TrainConfig, args)
    check_flags(args, ("save_every",), lambda value: value >= 1, "at least 1")
    check_flags(args, ("sample_every", "stop_when_flat"), lambda value: 0 <= value < math.inf, "a number from 0")
    check_flags(args, ("validate_every",), lambda value: value is None or value >= 1, "at least 1")
    return config, args, row, name, f"{row.name} ({name}), {config.side or identity.side} pixels: {told}"


def main():
    config, args, row, name, told = parse_args()
    concepts = concepts_of(args.input, args.concepts)
    check_files([concept.token for concept in concepts])
    refuse_examples(args.output, args.input, concepts)
    for concept in concepts:  # before any long work starts
        writable_file(file_of(args.output, concept.token))  # a long token's name may be too long for a file
        read_captions(concept.folder, read_pictures(concept.folder)[0], concept.token)
    accelerator, dtype = prepare(args, args.output, config.accumulate)
    accelerator.print(told + "".join(f"\n{c.token} ({kind_of(c, config.kind)}) begins as {c.src_image!r}" for c in concepts if config.init == "src_image"))
    started = time.perf_counter()
    groups = [concepts] if config.joint else [[concept] for concept in concepts]
    with held(accelerator, args.output), guarded(ADVICE):
        for group in groups:
            learn(group, config, args, row, name, accelerator, dtype)
    flag = ""
    if config.custom_diffusion:
        one = args.output / "+".join(concept.number for concept in concepts) / "projections.safetensors"
        flag = f" --projections {one}" if len(groups) == 1 else " --projections FILE, of one of the concepts' folders"
    accelerator.print(f"learned {', '.join(c.token for c in concepts)} in {time.perf_counter() - started:.0f} s\n"
                      f"next: bash scripts/p3_infer.sh {args.input} OUT {args.checkpoint} --embeddings {args.output}{flag}\n"
                      f"bash scripts/install.sh {args.output} puts the words where scripts/hw2_3.sh finds them")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
