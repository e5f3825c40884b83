"""Trains the miniature's models on drawings: the autoencoder, CLIP and the second judge, then the UNet. The same command again goes on where a run stopped.

    python -m p3_clip_textual_inversion.miniature.drawings render runs/emoji.npz
    python -m p3_clip_textual_inversion.miniature.train autoencoder --drawings runs/emoji.npz --output runs/vae
    python -m p3_clip_textual_inversion.miniature.train clip        --drawings runs/emoji.npz --output runs/clip
    python -m p3_clip_textual_inversion.miniature.train judge       --drawings runs/emoji.npz --output runs/judge --seed 1
    python -m p3_clip_textual_inversion.miniature.train unet        --drawings runs/emoji.npz --output runs/sd --clip runs/clip --vae runs/vae

A run that goes on ends with the same numbers, but for the UNet's, whose pool of pictures is filled anew. They are composed on the device, never the same
twice. With --seconds a training ends by the clock, its learning rate falling by the share of the time that is gone: for a GPU that is lent for minutes. A row
of results and the command of each: README.md beside this file.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from ..files import UserError, check_flags, fingerprint, lock, run, writable_folder
from ..provenance import HelpFormatter
from ..state import load_state, refuse_nonfinite, restore, save_state
from ..training import (
    Log,
    add_arguments,
    averaged_copy,
    ema_update,
    first_line_of,
    guarded,
    is_flat,
    make_optimizer,
    prepare,
    share_of_peak,
)
from .models import PARTS, through
from .world import DRAWINGS, Drawings

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "drawings", "steps", "seconds", "save_every", "keep", "compile", "device", "clip", "vae", "start", "validate_every", "report_to",
                  "stop_when_flat", "dtype")  # between a run and its continuation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("part", choices=list(PARTS), help="what to train")
    parser.add_argument("--drawings", type=Path, default=DRAWINGS, metavar="NPZ", help="file that miniature.drawings render wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run: its state, its log and the result")
    parser.add_argument("--clip", type=Path, default=None, help="for unet: folder of the trained CLIP")
    parser.add_argument("--vae", type=Path, default=None, help="for unet: folder of the trained autoencoder")
    parser.add_argument("--start", type=Path, default=None, metavar="FOLDER", help="folder of a model of this kind whose weights are the first ones")
    parser.add_argument("--lock-text", action="store_true", help="for clip, with --start: its text tower, by now Stable Diffusion's text encoder, stays")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps, at most (default: by part)")
    parser.add_argument("--seconds", type=float, default=None, help="of training, at most (default: no limit); the learning rate falls by the clock then")
    parser.add_argument("--batch-size", type=int, default=None, help="pictures per step (default: by part)")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate (default: by part)")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.6, help="last share of the training, over which it falls to zero")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, which are the result")
    parser.add_argument("--pool", type=int, default=65536, help="for unet: latents kept on the device, renewed all the time")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between two saved states")
    parser.add_argument("--keep", type=float, nargs="*", default=(), metavar="SHARE", help="shares of the training at which the result so far is kept")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute at first, faster steps")
    add_arguments(parser)
    args = parser.parse_args()
    for name in ("steps", "batch_size", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(PARTS[args.part], name))
    check_flags(args, ("steps", "batch_size", "lr", "pool"), lambda value: 0 < value < math.inf, "a number above 0")
    check_flags(args, ("seconds",), lambda value: value is None or 0 < value < math.inf, "a number above 0")
    check_flags(args, ("warmup", "save_every", "validate_every"), lambda value: value >= 0, "a number from 0")
    check_flags(args, ("decay", "ema"), lambda value: 0 <= value <= 1, "between 0 and 1")
    check_flags(args, ("keep",), lambda values: all(0 < value < 1 for value in values), "shares between 0 and 1")
    if args.lock_text and (args.part != "clip" or not args.start):
        raise UserError("--lock-text is for clip, and needs --start: the folder of a CLIP whose text tower is to stay")
    if not 0 <= args.seed < 10**12:
        raise UserError(f"--seed must be a whole number from 0, of at most 12 digits, not {args.seed}")
    return args


def main():
    args = parse_args()
    with lock(writable_folder(args.output)):
        train(args, args.output)


def train(args, folder):
    accelerator, dtype = prepare(args, folder)
    if accelerator.num_processes > 1:
        raise UserError("the miniature's models are trained by one process")
    device = accelerator.device
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["made_of"] = fingerprint(args.drawings, *(path for path in (args.clip, args.vae) if path))
    state_file = folder / "state.pt"
    state = load_state(state_file, settings, ("step", "history", "recent", "model", "averaged", "optimizer", "gone")) if state_file.exists() else None
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # the shapes stay
    if device.type == "cpu":  # over so few tokens the fused attention's backward pass takes six to ten times as long in bf16 as the plain one's
        torch.backends.cuda.enable_flash_sdp(False)  # a CPU's, too, in spite of its name
    part = PARTS[args.part](args, Drawings(args.drawings, device), device)
    net = part.model.to(device).train()
    averaged, optimizer = averaged_copy(net), accelerator.prepare(make_optimizer(net, args.lr, part.weight_decay, (0.9, 0.98)))
    step, history, recent, gone = 0, [], [], 0.0  # gone: seconds of training before
    if state:
        step, history, recent = restore(state_file, state, accelerator, model=net, averaged=averaged, optimizer=optimizer)
        gone = state["gone"]
    model, part.through = (torch.compile(net), torch.compile(through)) if args.compile else (net, through)
    first_line_of(accelerator, dtype, f"{args.part}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters,"
                                      + (f" going on at step {step}," if step else ""))
    log = Log(accelerator, folder, f"training {args.part}", args, args.batch_size, step, history)
    started = saved = time.perf_counter()
    keep = sorted(share for share in args.keep if share > progress_of(step, gone, args))
    with guarded("lower --batch-size"):
        while progress_of(step, gone + time.perf_counter() - started, args) < 1:
            done = progress_of(step, gone + time.perf_counter() - started, args)
            # everything random about a step is a function of (seed, step), so that a resumed run draws the same numbers
            torch.manual_seed(args.seed * 1_000_003 + step)
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            rate = args.lr * share_of_peak(step, done, args)
            optimizer.param_groups[0]["lr"] = rate
            batch = part.batch(generator, args.batch_size)
            with accelerator.autocast():
                loss = part.loss(model, batch, generator)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema_update(averaged, net, step, args.ema)
            average_buffers(averaged, net)
            step += 1
            log.bar.update()
            recent.append(loss.detach())
            now = time.perf_counter()
            done = progress_of(step, gone + now - started, args)
            if step % LOG_EVERY == 0 or done >= 1:
                row = {"loss": torch.stack(recent).mean().item(), "lr": rate}
                recent = []
                if hasattr(part, "validate") and args.validate_every and (step % args.validate_every == 0 or done >= 1):
                    with accelerator.autocast():
                        bands = part.validate(averaged)
                    row |= {"validation": sum(bands) / len(bands), **{f"band_{i}": value for i, value in enumerate(bands)}}
                log.add(step, **row)
                refuse_nonfinite(step, [torch.tensor(row["loss"])], state_file)
            while keep and done >= keep[0]:
                part.export(averaged, writable_folder(folder / f"at_{round(100 * keep.pop(0)):03d}"))
            flat = is_flat(history, args.stop_when_flat)
            if now - saved >= args.save_every or done >= 1 or flat:
                refuse_nonfinite(step, list(net.parameters()), state_file)
                save_state(state_file, accelerator, settings, step, history, recent, model=net, averaged=averaged, optimizer=optimizer,
                           gone=gone + now - started)
                part.export(averaged, folder)
                saved = time.perf_counter()
            if flat:
                break
    log.close()
    part.export(averaged, folder)
    print(f"wrote {folder}")


def progress_of(step, seconds, args):
    """The share of the training that is done, 0..1, by steps or by the clock, whichever is further."""
    return max(step / args.steps, seconds / args.seconds if args.seconds else 0)


@torch.no_grad()
def average_buffers(averaged, net):
    """The averaged network's running statistics are the network's own."""
    theirs = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    if theirs:
        torch._foreach_copy_([buffer for buffer in averaged.buffers() if buffer.is_floating_point()], theirs)


if __name__ == "__main__":
    run(main)
