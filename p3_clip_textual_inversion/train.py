"""Textual inversion (Gal et al. 2023): learns a word for what a few pictures show, everything else frozen. The same command again goes on where it stopped.

    python -m p3_clip_textual_inversion.train                                                        # both bundled concepts, on the miniature
    python -m p3_clip_textual_inversion.train --checkpoint hw2_data/weights/sd-v1-4.ckpt --output runs/words    # the course's, on the real model

With --joint all concepts learn in one run, each picture of a batch of one of them, at random; with --custom-diffusion (Kumari et al. 2023) the key and value
projections of every cross-attention learn too, with --lora weights of low rank beside the word (lora.py); both are held in place by ordinary pictures that
the model draws itself.
"""

import argparse
import hashlib
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from .concepts import concepts_of, kind_of, refuse_examples
from .custom_diffusion import save_projections, weights_of
from .data import read_captions
from .defaults import fill_in, input_of, of_model, row_of
from .embedding import add_words, check_files, expand, file_of, initial_rows, model_name, save_embedding
from .files import UserError, atomic_path, check_flags, note, run, writable_file, writable_folder, write_json
from .formats.identity import identify, weights_fingerprint
from .inference import DrawConfig, generate
from .lora import lora_file, save_kohya, save_lora
from .model import MINI_SD, load_stable_diffusion
from .objective import NEEDED, hold_back, make_run, on_cpu, pull_of_step, save_run, set_rates
from .pictures import read_pictures, save_image
from .provenance import HelpFormatter, script_line
from .sources import MOST_TOKENS, counts_of, draw_batch, initial_words, make_held, make_sources
from .state import add_row, held, load_state, refuse_others
from .training import Log, add_arguments, add_settings, configured, due, first_line_of, guarded, is_flat, prepare, setting, share

LOG_EVERY, SAMPLE_STEPS = 20, 20  # the latter of the sampler, for samples and for a prior's ordinary pictures
MOST = {"vectors": 73, "crops": 1000, "prior": 100_000, "steps": 10**7, "lora": 1024}  # what a prompt of CLIP and a memory hold
VALIDATIONS = 15  # how often in a run
ADVICE = "lower --batch-size (--accumulate makes up for it) or --side, or give --gradient-checkpointing"
NEEDS = {"lr_projections": ["--custom-diffusion"], "lr_lora": ["--lora"], "pivot": ["--lora"], "hold": ["--lora"], "prior_waits": ["--lora"],
         "prior": ["--custom-diffusion", "--lora"]}


@dataclass(frozen=True)
class TrainConfig:
    """What decides a word, beside its pictures and the model. `UserError` for what no training can be.

    Where no flag says otherwise (None), `parse_args` puts in what the model's row of defaults.py has."""

    kind: str = setting("auto", "which captions to train with; auto: style where each prompt has 'style of'", choices=["auto", "object", "style"])
    vectors: int = setting(None, f"per word; 0: as many as its initial words have tokens, {MOST_TOKENS} at most {of_model('learning', 'vectors')}", type=int)
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
    joint: bool = setting(False, "learn all concepts in one run: each picture of a batch is of one of them, at random")
    custom_diffusion: bool = setting(False, "also learn the key and value projections of the cross-attentions, at steps and rates of their own (defaults.py)")
    lr_projections: float = setting(None, f"peak learning rate of those {of_model('learning', 'lr_projections')}", type=float)
    lora: int = setting(0, "also learn weights of low rank in the cross-attentions, and for as many --steps as they need; without the flag the word "
                        f"alone, without RANK the model's {of_model('low_rank', 'lora')}", type=int, nargs="?", metavar="RANK")
    lr_lora: float = setting(None, f"peak learning rate of those {of_model('low_rank', 'lr_lora')}", type=float)
    pivot: float = setting(None, f"share of the steps in which the word learns alone, before those do {of_model('low_rank', 'pivot')}", type=float)
    hold: float = setting(None, "share of what ordinary captions say that those do not hear, which keeps ordinary prompts; 0: they hear all "
                          + of_model("low_rank", "hold"), type=float)
    prior_waits: int = setting(None, "1: ordinary pictures come when low-rank weights begin to learn; 0: from the first step, which leaves the word half as "
                               f"many of its own at a time {of_model('low_rank', 'prior_waits')}", type=int, choices=[0, 1])
    prior: int = setting(None, f"ordinary pictures that hold projections or low-rank weights in place; 0 for none {of_model('learning', 'prior')}", type=int)
    crops: int = setting(8, "variations of each picture: crops up to 15 %% closer, half of them flipped")
    side: int | None = setting(None, "of the pictures, in pixels (default: the model's own)", type=int)
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        check_flags(self, ("steps", "batch_size", "accumulate", "lr", "crops", "lr_projections"),
                    lambda value: 0 < value < math.inf, "a number above 0")
        check_flags(self, ("vectors", "min_snr_gamma", "prior"), lambda value: 0 <= value < math.inf, "a number from 0")
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


def learn(concepts, config, args, row, model_id, accelerator, dtype):
    """Learns concepts in one run, from its last state where there is one; writes it into OUTPUT/{numbers}/ and each word's file into OUTPUT.

    config: `TrainConfig`; args: where it all is, and what is seen on the way; row: the model's `Defaults`; model_id: its name."""
    results, words = results_of(concepts, args.output), ", ".join(concept.token for concept in concepts)
    settings, state_file = word_settings(concepts, config, args, row, model_id), results.folder / "state.pt"
    refuse_others(state_file, [*results.words, *results.lora])
    state = load_state(state_file, settings, NEEDED, defaults=args.defaults) if state_file.exists() else None
    if state and state["step"] >= config.steps and results.are_there(config):
        accelerator.print(f"{words} {'are' if len(concepts) > 1 else 'is'} learned already: see {args.output}")
        return

    accelerator.free_memory()  # of the concept before, whose model it would keep
    parts = load_stable_diffusion(args.checkpoint, accelerator.device, dtype)
    side = config.side or parts.side
    parts.latent_shape(side)  # refuses a side that does not fit
    drawing = DrawConfig(num_steps=SAMPLE_STEPS, guidance_weight=row.drawing.guidance_weight, side=side, dtype=dtype, batch_size=4)
    rows = add_words(parts, first_rows(parts, concepts, config)).rows
    sources, held_out = make_sources(parts, concepts, config, row, side, drawing), make_held(parts, concepts, config, row, side)
    if not args.sample_every:
        parts.vae.to("cpu")  # no longer needed
    if args.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        parts.unet.train()  # diffusers checkpoints in training mode only; there is no dropout
    run = make_run(parts, rows, held_out, config, row, accelerator, state_file, settings, state)
    first_line_of(accelerator, dtype, f"learning {words}: {sum(p.numel() for p in run.trained.values()):,} numbers, "
                                      f"from {sum(map(len, {id(source.means): source.means for source in sources}.values()))} latents,", run)
    train(run, parts, sources, concepts, config, args, row, drawing, accelerator)
    run.best.put_back(run.trained)
    if accelerator.is_main_process:
        accelerator.print(run.best.told(words))
        export(run, results, concepts, config, parts)
        print(f"wrote {', '.join(map(str, results.words))}; the run is in {results.folder}")


def train(run, parts, sources, concepts, config, args, row, drawing, accelerator):
    """Takes the steps of a `Run` until there are --steps, or the validation is flat.

    parts: Stable Diffusion with the words; sources: what they learn from; drawing: `DrawConfig` of the samples; the rest as in `learn`."""
    folder, rows = run.state_file.parent, run.trained["rows"]
    log = Log(accelerator, folder, f"learning {run.settings['tokens']}", args, config.batch_size * config.accumulate, run.step, run.history)
    strengths = [min(1, (config.steps - at) / max(config.decay * config.steps, 1)) for at in range(config.steps)]  # of learning and of the pull alike
    every = max(config.steps // VALIDATIONS, 1) if args.validate_every is None else args.validate_every
    alone, waiting = [source for source in sources if not source.ordinary], config.pivot * config.steps if config.lora and config.prior_waits else 0
    last = run.step >= config.steps or is_flat(run.history, args.stop_when_flat)
    while not last:
        strength = strengths[run.step]
        set_rates(run, config, strength)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + run.step)  # so that a resumed run draws the same numbers
        learned_from = alone if run.step < waiting else sources
        for _ in range(config.accumulate):
            x0, eps, t, texts = share(accelerator, *draw_batch(learned_from, parts.vae.config.scaling_factor, config.batch_size, generator))
            with accelerator.accumulate(run.model):
                with accelerator.autocast():
                    loss = run.model(x0, t, eps, *run.loss.ids(texts))
                accelerator.backward(loss)
                run.optimizer.step()
                run.optimizer.zero_grad()
            run.recent.append(accelerator.reduce(loss.detach(), "mean"))
        hold_back(run, config, pull_of_step(run.settings["pull"], strength, sum(strengths)))
        run.step += 1
        log.bar.update()

        over = run.step == config.steps
        validating = due(every, run.step, over)
        if validating or due(LOG_EVERY, run.step, over):
            add_row(run, log, config.lr * strength, {"norm": rows.norm(dim=1).mean().item()} | (run.best.update(run.step, run.trained) if validating else {}))
        last = over or is_flat(run.history, args.stop_when_flat)
        if due(max(config.steps // 10, 1), run.step, last):
            run.snapshots[run.step] = rows.detach().clone()
        if accelerator.is_main_process and due(args.sample_every, run.step, last):
            save_image(sample_row(parts, concepts, config, row, drawing), folder / f"samples_{run.step:06d}.png")
        if due(args.save_every, run.step, last):
            save_run(run, accelerator)
    log.close(last=False)


def word_settings(concepts, config, args, row, model_id):
    """What a run is known by when it goes on: the configuration with the pull that it means, the model, the concepts and their pictures."""
    kinds = [kind_of(concept, config.kind) for concept in concepts]
    pull = config.pull
    if pull is None:
        pull = row.learning.style_pull if set(kinds) == {"style"} else 0.0
    return asdict(config) | {
        "pull": pull, "dtype": args.dtype, "model": model_id, "weights": args.weights,
        "tokens": ", ".join(concept.token for concept in concepts), "src_images": ", ".join(concept.src_image for concept in concepts),
        "kinds": ", ".join(kinds), "pictures": pictures_fingerprint([concept.folder for concept in concepts])}


class Results(NamedTuple):
    """Where a run leaves what."""

    folder: Path  # its state, samples and history
    words: list  # a file for each concept
    lora: list  # beside each of them, with --lora
    projections: Path  # with --custom-diffusion

    def are_there(self, config):
        return all(path.exists() for path in [*self.words, *(self.lora if config.lora else ()), *([self.projections] if config.custom_diffusion else ())])


def results_of(concepts, output):
    """The `Results` of concepts that learn together, whose folder is there from now on."""
    folder, words = writable_folder(output / "+".join(concept.number for concept in concepts)), [file_of(output, concept.token) for concept in concepts]
    return Results(folder, words, [lora_file(path) for path in words], folder / "projections.safetensors")


def first_rows(parts, concepts, config):
    """{token: float32 [vectors, dim]} to start from."""
    generator, counts = torch.Generator().manual_seed(config.seed), counts_of(parts, concepts, config)
    return {concept.token: initial_rows(parts, initial_words(concept, config), counts[concept.token], generator) for concept in concepts}


def sample_row(parts, concepts, config, row, drawing):
    """A picture of four drawings of each concept, beside each other."""
    counts = counts_of(parts, concepts, config)
    shown = [expand(row.templates[kind_of(c, config.kind)][-1].format(c.token), counts) for c in concepts]
    pictures = list(generate(parts, [prompt for prompt in shown for _ in range(4)], [f"sample/{i}" for i in range(4)] * len(shown), drawing))
    return Image.fromarray(np.concatenate(pictures, axis=1))


def export(run, results, concepts, config, parts):
    """Writes what was measured, the weights that learned, and last, so that where these are the rest is, the words."""
    write_json(results.folder / "history.json", run.history)
    write_json(results.folder / "validation.json", {"kept_step": run.best.step, "losses": run.best.losses})
    with atomic_path(results.folder / "snapshots.safetensors") as temporary:
        save_file({f"{at:06d}": tensor for at, tensor in on_cpu(run.snapshots).items()}, temporary, metadata={"words": run.settings["tokens"]})
    metadata = {name: str(value) for name, value in run.settings.items() if value is not None}
    for path in results.lora if config.lora else ():  # what learned together is beside each word
        save_lora(path, run.weights, metadata)
        save_kohya(results.folder / f"{path.stem}_kohya.safetensors", run.weights, metadata)
    if config.custom_diffusion:
        save_projections(results.projections, weights_of(parts.unet), metadata)
    counts = counts_of(parts, concepts, config)
    for concept, path, rows in zip(concepts, results.words, run.trained["rows"].detach().split(list(counts.values()))):
        save_embedding(path, concept.token, rows, metadata)


def fill_in_learning(args, row):
    """Gives parsed arguments what the model's row says of the chosen way to learn; returns a line that tells it. Notes flags that do nothing in it."""
    custom, lora = args.custom_diffusion, args.lora != 0
    chosen = {flag for flag, on in (("--custom-diffusion", custom), ("--lora", lora)) if on}
    idle = [name for name, ways in NEEDS.items() if chosen.isdisjoint(ways)]
    for name in idle:
        if getattr(args, name) is not None:
            note(f"--{name.replace('_', '-')} does nothing without {' or '.join(NEEDS[name])}")
    used = vars(row.learning) | (vars(row.custom) if custom else {}) | (vars(row.low_rank) if lora else {})
    told = fill_in(args, SimpleNamespace(**{name: value for name, value in used.items() if name not in idle}))
    fill_in(args, SimpleNamespace(**used))
    return told


def learning_of(flags, row):
    """The arguments that flags, a text, mean with a model's row of the table."""
    args = make_parser().parse_args(shlex.split(flags))
    fill_in_learning(args, row)
    return args


def make_parser():
    """All flags; those that depend on the model have no default yet."""
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
    return parser


def parse_args():
    """(`TrainConfig`, all arguments, the model's `Defaults`, its name, a line that tells them)"""
    parser = make_parser()
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    identity = identify(args.checkpoint)
    row = row_of(identity.side)
    told = fill_in_learning(args, row)
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
    scaler = accelerator.scaler and accelerator.scaler.state_dict()
    with held(accelerator, args.output), guarded(ADVICE):
        for group in groups:
            if scaler:  # as if each were learned by itself
                accelerator.scaler.load_state_dict(scaler)
            learn(group, config, args, row, name, accelerator, dtype)
    flags = []
    if config.custom_diffusion:
        flags = ["--projections", args.output / "+".join(concept.number for concept in groups[0]) / "projections.safetensors"]
    accelerator.print(f"learned {', '.join(c.token for c in concepts)} in {time.perf_counter() - started:.0f} s\n"
                      f"next: {script_line('p3_infer.sh', args.input, 'OUT', args.checkpoint, '--embeddings', args.output, *flags)}"
                      f"{'  # or those of another concept' if flags and len(groups) > 1 else ''}\n"
                      f"{script_line('install.sh', args.output)}  # puts the words where scripts/hw2_3.sh finds them")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
