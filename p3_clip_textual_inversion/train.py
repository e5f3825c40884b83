"""Textual inversion (Gal et al. 2023): learns a word for what a few pictures show, everything else frozen. The same command again goes on where it stopped.

    python -m p3_clip_textual_inversion.train                                                        # both bundled concepts, on the miniature
    python -m p3_clip_textual_inversion.train hw2_data/textual_inversion/input.json --checkpoint sd-v1-4.ckpt --output runs/p3_sd
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from . import diffusion
from .data import read_concepts, read_pictures, varied
from .device import DTYPES, pick_device, pick_dtype
from .embedding import add_words, expand, file_of, initial_rows, save_embedding
from .files import UserError, atomic_path, load_pickle_safely, run, save_image, writable_folder, write_json
from .inference import GUIDANCE, MINI_GUIDANCE, DrawConfig, draw
from .stable_diffusion import MINI_SD, load_stable_diffusion
from .world import MINI

TEMPLATES = {  # by (what the model draws, what is learned)
    ("photo", "object"): ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
                          "a photo of my {}", "a close-up photo of a {}", "a bright photo of the {}", "a good photo of the {}", "a photo of one {}"),
    ("photo", "style"): ("a painting in the style of {}", "a rendering in the style of {}", "a picture in the style of {}",
                         "a cropped painting in the style of {}", "a close-up painting in the style of {}", "a nice painting in the style of {}"),
    ("drawing", "object"): ("a {}", "a drawing of a {}"),
    ("drawing", "style"): ("a drawing in the style of {}", "a drawing of a thing in the style of {}"),
}
LOG_EVERY = 20
FREE_TO_CHANGE = ("output", "save_every", "sample_every", "device", "concepts", "input", "checkpoint")  # between a run and its continuation


class Loss(torch.nn.Module):
    """The training loss as a function of token ids; what accelerate wraps. Only the new rows of the text encoder's table learn."""

    def __init__(self, parts, min_snr_gamma):
        super().__init__()
        self.text_encoder, self.unet, self.alpha_bar, self.gamma = parts.text_encoder, parts.unet, parts.alpha_bar, min_snr_gamma

    def forward(self, x0, eps, t, ids):
        hidden = self.text_encoder(ids).last_hidden_state
        return diffusion.loss(self.unet, self.alpha_bar, x0, eps, t, hidden, self.gamma).mean()


@torch.no_grad()
def encode_pictures(parts, pictures, side, crops, seed):
    """Means and deviations [N, 4, h, w] of the latents of `crops` variations of each picture, encoded once; each step draws afresh from them."""
    rng = np.random.default_rng(seed)
    means, deviations = [], []
    for picture in tqdm(pictures, desc="encoding pictures", unit="picture"):
        for part in varied(picture, side, crops, rng).split(4):
            posterior = parts.vae.encode(part.to(parts.vae.device, parts.vae.dtype)).latent_dist
            means.append(posterior.mean.float())
            deviations.append(posterior.std.float())
    return torch.cat(means), torch.cat(deviations)


def draw_batch(latents, prompts, scaling, batch_size, generator):
    """(x0, eps, t, prompts) of a batch from (means, deviations) [N, 4, h, w]. Everything is drawn on the CPU from the generator."""
    means, deviations = latents
    rows = torch.randint(0, len(means), (batch_size,), generator=generator).to(means.device)
    fresh, eps = (torch.randn((batch_size, *means.shape[1:]), generator=generator).to(means.device) for _ in range(2))
    t = torch.randint(0, 1000, (batch_size,), generator=generator).to(means.device)
    chosen = torch.randint(0, len(prompts), (batch_size,), generator=generator).tolist()
    return scaling * (means[rows] + deviations[rows] * fresh), eps, t, [prompts[i] for i in chosen]


def learn(concept, args, accelerator, dtype):
    """Learns one concept; writes its run into OUTPUT/{number}/ and its word's file into OUTPUT."""
    folder = writable_folder(args.output / concept.number)
    result = file_of(args.output, concept.token)
    mini = Path(args.checkpoint).resolve() == MINI_SD.resolve()
    kind = args.kind if args.kind != "auto" else "style" if all(f"style of {concept.token}" in prompt for prompt in concept.prompts) else "object"
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE} | {"token": concept.token, "kind": kind}
    state = load_state(folder / "state.pt", settings) if (folder / "state.pt").exists() else None
    if state and state["step"] >= args.steps and result.exists():
        print(f"{concept.token} is learned already: {result}")
        return
    pictures, skipped = read_pictures(args.input.parent / concept.number)
    if skipped:
        print(f"note: left out what is no picture: {', '.join(skipped)}")

    device = accelerator.device
    parts = load_stable_diffusion(args.checkpoint, device, dtype)
    side = args.side or parts.side
    parts.latent_shape(side)  # refuses a side that does not fit
    words = concept.src_image if args.init == "src_image" else None if args.init == "noise" else args.init
    rows = initial_rows(parts, words, args.vectors, torch.Generator().manual_seed(args.seed))
    learned = add_words(parts, {concept.token: rows})
    prompts = [expand(template.format(concept.token), {concept.token: args.vectors}) for template in TEMPLATES["drawing" if mini else "photo", kind]]
    latents = encode_pictures(parts, pictures, side, args.crops, args.seed)
    if not args.sample_every:
        parts.vae.to("cpu")  # no longer needed
    if args.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        parts.unet.train()  # diffusers checkpoints in training mode only; there is no dropout
    lengths = rows.norm(dim=1, keepdim=True).to(device)
    step, history, recent, snapshots = 0, [], [], {0: rows}
    if state:
        learned.rows.data.copy_(state["rows"])
        step, history, recent, snapshots = state["step"], state["history"], state["recent"], state["snapshots"]
    model, optimizer = accelerator.prepare(Loss(parts, args.min_snr_gamma), torch.optim.AdamW([learned.rows], lr=args.lr, weight_decay=0.0))
    if state:
        optimizer.load_state_dict(state["optimizer"])

    print(f"learning {concept.token} ({kind}, {args.vectors} vector{'s' * (args.vectors > 1)} of {rows.shape[1]}) from {len(pictures)} pictures on {device}")
    config = DrawConfig(num_steps=20, guidance_weight=MINI_GUIDANCE if mini else GUIDANCE, side=side, dtype=dtype, batch_size=4)
    share = slice(accelerator.process_index, None, accelerator.num_processes)  # of each batch, this process's
    with tqdm(total=args.steps, initial=step, unit="step", desc=f"learning {concept.token}", disable=not accelerator.is_main_process) as bar:
        while step < args.steps:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # so that a resumed run draws the same numbers
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (args.steps - step) / max(args.decay * args.steps, 1))
            for _ in range(args.accumulate):
                x0, eps, t, texts = draw_batch(latents, prompts, parts.vae.config.scaling_factor, args.batch_size, generator)
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        loss = model(x0[share], eps[share], t[share], parts.tokens(texts[share]).to(device))
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                recent.append(accelerator.reduce(loss.detach(), "mean").item())
            if args.norm == "keep":
                with torch.no_grad():
                    learned.rows.mul_(lengths / learned.rows.norm(dim=1, keepdim=True))
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == args.steps:
                history.append({"step": step, "loss": float(np.mean(recent)), "norm": learned.rows.norm(dim=1).mean().item()})
                recent = []
                bar.set_postfix_str(f"loss {history[-1]['loss']:.4f}, norm {history[-1]['norm']:.3f}")
                if not math.isfinite(history[-1]["loss"]):
                    raise UserError(f"the loss is not finite at step {step}; try a smaller --lr, or --dtype fp32")
            if step % max(args.steps // 10, 1) == 0 or step == args.steps:
                snapshots[step] = learned.rows.detach().cpu().clone()
            if accelerator.is_main_process and args.sample_every and (step % args.sample_every == 0 or step == args.steps):
                shown = list(draw(parts, [prompts[-1]] * 4, [f"sample/{i}" for i in range(4)], config))
                save_image(Image.fromarray(np.concatenate(shown, axis=1)), folder / f"samples_{step:06d}.png")
            if accelerator.is_main_process and (step % args.save_every == 0 or step == args.steps):
                with atomic_path(folder / "state.pt") as temporary:
                    torch.save({"rows": learned.rows.detach(), "optimizer": optimizer.state_dict(), "step": step, "history": history, "recent": recent,
                                "snapshots": snapshots, "settings": settings}, temporary)
    if accelerator.is_main_process:
        write_json(folder / "history.json", history)
        with atomic_path(folder / "snapshots.safetensors") as temporary:
            save_file({f"{at:06d}": tensor for at, tensor in snapshots.items()}, temporary, metadata={"word": concept.token})
        save_embedding(result, concept.token, learned.rows, {name: str(value) for name, value in settings.items()})
        print(f"wrote {result}; its run is in {folder}")


def load_state(path, settings):
    state = load_pickle_safely(path, "training state")
    if not isinstance(state, dict) or "settings" not in state:
        raise UserError(f"{path} is not a training state of this script; choose another --output")
    changed = [f"{name} {state['settings'].get(name)} is now {value}" for name, value in settings.items() if state["settings"].get(name) != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another --output")
    return state


def parse_args():
    parser = argparse.ArgumentParser(description="Learns words for concepts by textual inversion.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("input", type=Path, nargs="?", default=MINI / "textual_inversion" / "input.json", metavar="INPUT_JSON",
                        help="the concepts; their pictures are in folders 0, 1, ... beside it")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--output", type=Path, default=Path("runs/p3"), help="folder for the embeddings and, by concept, their runs")
    parser.add_argument("--concepts", nargs="+", default=None, metavar="NUMBER", help="which of the concepts (default: all)")
    parser.add_argument("--kind", choices=["auto", "object", "style"], default="auto",
                        help="which captions to train with; auto: style where each prompt has 'style of'")
    parser.add_argument("--vectors", type=int, default=1, help="per word")
    parser.add_argument("--init", default="src_image", help="words to start from; src_image: those of input.json; noise: none")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps; several thousand for the real model")
    parser.add_argument("--batch-size", type=int, default=8, help="latents per step, over all processes together")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step, where memory has no place for a large one")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of AdamW")
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the steps, over which the learning rate falls to zero")
    parser.add_argument("--norm", choices=["keep", "free"], default="keep", help="keep each vector as long as the word it started from, or let it grow")
    parser.add_argument("--min-snr-gamma", type=float, default=None, help="min-SNR loss weighting (5 is usual); none if not given")
    parser.add_argument("--crops", type=int, default=8, help="variations of each picture: crops up to 15 %% closer, half of them flipped")
    parser.add_argument("--side", type=int, default=None, help="of the pictures, in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the UNet; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=100, help="steps between two rows of sample pictures; 0 for none")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "accumulate", "lr", "vectors", "crops", "save_every"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    return args


def main():
    args = parse_args()
    concepts = read_concepts(args.input)
    if args.concepts:
        known = [concept.number for concept in concepts]
        for number in args.concepts:
            if number not in known:
                raise UserError(f"{args.input} has no concept {number!r}; it has {', '.join(known)}")
        concepts = [concept for concept in concepts if concept.number in args.concepts]
    for concept in concepts:
        read_pictures(args.input.parent / concept.number)  # before any long work starts
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=args.accumulate,
                              mixed_precision={torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    if args.batch_size % accelerator.num_processes:
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of the {accelerator.num_processes} processes")
    writable_folder(args.output)
    started = time.perf_counter()
    for concept in concepts:
        learn(concept, args, accelerator, dtype)
    print(f"learned {', '.join(c.token for c in concepts)} in {time.perf_counter() - started:.0f} s\n"
          f"next: bash scripts/p3_infer.sh {args.input} OUT {args.checkpoint} --embeddings {args.output}")


if __name__ == "__main__":
    run(main)
