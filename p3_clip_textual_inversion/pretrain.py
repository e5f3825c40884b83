"""Trains the miniature's models on drawings: CLIP, then the VAE, then the UNet of Stable Diffusion. The same command again goes on where a run was stopped.

    python -m p3_clip_textual_inversion.make_mini drawings runs/emoji.npz
    python -m p3_clip_textual_inversion.pretrain clip --drawings runs/emoji.npz --output runs/clip
    python -m p3_clip_textual_inversion.pretrain vae  --drawings runs/emoji.npz --output runs/vae
    python -m p3_clip_textual_inversion.pretrain unet --drawings runs/emoji.npz --output runs/sd --clip runs/clip --vae runs/vae
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .device import DTYPES, describe, pick_device, pick_dtype, progress, use_tf32
from .files import UserError, atomic_path, check_flags, fingerprint, lock, run, writable_folder, write_json
from .pictures import save_image, to_uint8
from .tasks import TASKS
from .training import load_state
from .world import Drawings

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "drawings", "steps", "save_every", "sample_every", "device", "clip", "vae")  # between a run and its continuation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=list(TASKS), help="what to train")
    parser.add_argument("--drawings", type=Path, required=True, metavar="NPZ", help="file that make_mini drawings wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run: its state, sample grids and the result")
    parser.add_argument("--clip", type=Path, default=None, help="for unet: folder of the trained CLIP")
    parser.add_argument("--vae", type=Path, default=None, help="for unet: folder of the trained VAE")
    parser.add_argument("--start", type=Path, default=None, metavar="FOLDER", help="folder of a model to go on from; CLIP's text tower then stays as it is")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps in all (default: by task)")
    parser.add_argument("--batch-size", type=int, default=None, help="pictures per step (default: by task)")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate (default: by task)")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.6, help="last share of the steps, over which it falls to zero")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, which are the result")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two sample grids; 0 for none")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(TASKS[args.task], name))
    check_flags(args, ("steps", "batch_size", "lr", "save_every"), lambda value: 0 < value < math.inf, "a number above 0")
    check_flags(args, ("warmup", "sample_every"), lambda value: value >= 0, "a number from 0")
    check_flags(args, ("decay", "ema"), lambda value: 0 <= value <= 1, "between 0 and 1")
    if not 0 <= args.seed < 10**12:
        raise UserError(f"--seed must be a whole number from 0, of at most 12 digits, not {args.seed}")
    if args.start and args.task == "vae":
        raise UserError("--start is for clip and unet; the VAE is trained from the beginning")
    return args


def main():
    args = parse_args()
    with lock(writable_folder(args.output)):
        train(args, args.output)


def train(args, folder):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError("--dtype fp16 trains on a GPU only; on a CPU use bf16 or fp32")
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision={torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    device = accelerator.device
    use_tf32(True)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["made_of"] = fingerprint(args.drawings, *(path for path in (args.clip, args.vae) if path))
    state_file = folder / "state.pt"
    state = load_state(state_file, settings, row=list) if state_file.exists() else None
    torch.manual_seed(args.seed)
    task = TASKS[args.task](args, Drawings(args.drawings), device)
    net, step, history, recent = task.model, 0, [], []
    ema = AveragedModel(net, multi_avg_fn=ema_update(args.ema))
    if state:
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        step, history, recent = state["step"], state["history"], state["recent"]
    net, ema = net.to(device).train(), ema.to(device).eval()
    optimizers = make_optimizers(net, args.lr, task.weight_decay)
    model, *optimizers = accelerator.prepare(net, *optimizers)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    print(f"{args.task} of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters on {describe(device, dtype)}"
          + (f", going on at step {step}" if step else ""))
    started, first_step = time.perf_counter(), step
    bar = progress(total=args.steps, initial=step, unit="step", desc=f"training {args.task}")
    while step < args.steps:
        # everything random about a step is a function of (seed, step), so that a resumed run draws the same numbers
        rng, generator = np.random.default_rng([args.seed, step]), torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rate = args.lr * min((step + 1) / max(args.warmup, 1), 1, (args.steps - step) / max(args.decay * args.steps, 1))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with accelerator.autocast():
            loss = task.loss(model, *task.batch(rng, generator, args.batch_size), generator)
        accelerator.backward(loss)
        optimizers[1].optimizer.take_gradients()
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        ema.update_parameters(net)
        step += 1
        bar.update()
        recent.append(loss.item())
        if step % LOG_EVERY == 0 or step == args.steps:
            history.append([step, float(np.mean(recent))])
            recent = []
            bar.set_postfix_str(f"loss {history[-1][1]:.4f}, {(step - first_step) * args.batch_size / (time.perf_counter() - started):.0f} img/s")
            if not math.isfinite(history[-1][1]):
                raise UserError(f"the loss is not finite at step {step}; try a smaller --lr, or --dtype fp32")
        if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
            with accelerator.autocast():
                grid = task.samples(ema.module)
            if grid:
                save_image(tile(*grid), folder / f"samples_{step:06d}.png")
        if step % args.save_every == 0 or step == args.steps:
            with atomic_path(state_file) as temporary:
                torch.save({"model": net.state_dict(), "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
                            "history": history, "recent": recent, "settings": settings}, temporary)
            write_json(folder / "history.json", history)
    bar.close()
    task.export(ema.module)
    print(f"wrote {folder}")


def tile(pictures, columns):
    """[N, 3, H, W] in -1..1 -> one picture."""
    grid = to_uint8(pictures)
    rows = [np.concatenate(list(grid[i:i + columns]), axis=1) for i in range(0, len(grid), columns)]
    return Image.fromarray(np.concatenate(rows))


def make_optimizers(net, lr, weight_decay):
    """(AdamW, Muon): Muon for convolution kernels that are not depthwise, AdamW for the rest, without weight decay on norms and biases."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    kernels = [p for name, p in named if p.ndim == 4 and min(p.shape[:2]) > 4]
    rest = [p for _, p in named if not any(p is kernel for kernel in kernels)]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay}, {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)), ConvolutionMuon(kernels, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class ConvolutionMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which takes matrices only, on convolution kernels: each as a matrix [out, in * k * k]."""

    def __init__(self, kernels, **options):
        self.kernels = kernels
        super().__init__([torch.nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels], **options)

    def take_gradients(self):
        """Lets the matrices' gradients share the kernels' memory; to be called after each backward pass, before clipping or unscaling."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels):
            kernel.grad = kernel.grad.contiguous()
            matrix.grad = kernel.grad.flatten(1)


def ema_update(decay):
    """torch's EMA, with a shorter memory in the first steps, so that the random start is soon forgotten."""
    def update(averaged, current, count):
        get_ema_multi_avg_fn(min(decay, (1 + float(count)) / (10 + float(count))))(averaged, current, count)
    return update


if __name__ == "__main__":
    run(main)
