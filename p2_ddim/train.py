"""Trains a face UNet on a folder of images. Run the same command again to go on where a run was stopped.

    python -m p2_ddim.train --data runs/faces --output runs/p2
"""

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .ddim import NUM_TIMESTEPS, DDIMConfig, ImageNoise, ddim, make_alpha_bar
from .device import DTYPES, pick_device, pick_dtype
from .evaluate import read_picture
from .files import UserError, atomic_path, check_flags, load_pickle_safely, run, save_image, writable_folder, write_json
from .inference import predictor, to_pictures
from .model import UNet, UNetConfig

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "data", "steps", "save_every", "sample_every", "device")  # between a run and its continuation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures; p2_ddim.make_mini faces draws some")
    parser.add_argument("--output", type=Path, default=Path("runs/p2"), help="folder of the run: its state, sample grids and UNet.pt")
    parser.add_argument("--image-size", type=int, default=64, help="pictures are cropped to squares of this side")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 32, 64, 96, 128], help="channels at each resolution, multiples of 32")
    parser.add_argument("--attention", type=int, nargs="*", default=[4], help="levels with self-attention; 0 is the finest")
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks per level")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--flip", action="store_true", help="mirror half of the pictures")
    parser.add_argument("--steps", type=int, default=1600, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, over all processes together")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, of Muon (in AdamW's step size) and AdamW alike")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the steps, over which it falls to zero")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="not applied to norms and biases")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the result")
    parser.add_argument("--max-weight", type=float, default=20.0,
                        help="the loss is weighed by 1 / alpha_bar (as that of velocity is; Salimans and Ho 2022), up to this; 1 is plain DDPM")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two sample grids; 0 for none")
    args = parser.parse_args()
    check_flags(args, ("steps", "batch_size", "save_every", "image_size", "blocks"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("lr", "weight_decay", "warmup", "sample_every"), lambda value: 0 <= value < math.inf, "a number from 0")
    if not -10**12 < args.seed < 10**12:
        raise UserError(f"--seed must be a whole number of at most 12 digits, not {args.seed}")
    if not args.max_weight >= 1:  # not a number neither
        raise UserError(f"--max-weight must be at least 1, not {args.max_weight}")
    check_flags(args, ("decay", "ema", "dropout"), lambda value: 0 <= value <= 1, "between 0 and 1")
    if any(width < 32 or width % 32 for width in args.widths):
        raise UserError(f"--widths must be multiples of 32, not {args.widths}")
    if not set(args.attention) <= set(range(len(args.widths))):
        raise UserError(f"--attention must be levels from 0 to {len(args.widths) - 1}, as there are --widths, not {args.attention}")
    if args.image_size % 2 ** (len(args.widths) - 1):
        raise UserError(f"--image-size {args.image_size} cannot be halved {len(args.widths) - 1} times")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError("--dtype fp16 trains on a GPU only; on a CPU use bf16 or fp32")
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {world} processes")
    folder = writable_folder(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    state_file = folder / "state.pt"
    state = load_state(state_file, settings) if state_file.exists() else None
    images = torch.from_numpy(read_pictures(args.data, args.image_size)).to(device)

    torch.manual_seed(args.seed)
    net = UNet(UNetConfig(tuple(args.widths), tuple(args.attention), args.blocks, args.dropout))
    alpha_bar = make_alpha_bar().float().to(device)
    ema = AveragedModel(net, multi_avg_fn=ema_update(args.ema))
    step, history, recent = 0, [], []
    if state:
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        step, history, recent = state["step"], state["history"], [torch.tensor(loss, device=device) for loss in state["recent"]]
    # channels-last is the faster layout for a GPU's tensor cores; on a CPU the backward pass of GroupNorm is slow in it
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    net, ema = (m.to(device=device, memory_format=layout) for m in (net, ema))
    adamw, muon = make_optimizers(net, args)
    model, *optimizers = accelerator.prepare(net, adamw, muon)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    accelerator.print(f"{len(images)} images from {args.data}, UNet of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters on "
                      f"{world} x {device}, {precision if precision != 'no' else 'fp32'}" + (f", going on at step {step}" if step else ""))
    started, first_step = time.perf_counter(), step
    bar = tqdm(total=args.steps, initial=step, unit="step", desc="training P2", disable=not accelerator.is_main_process)
    while step < args.steps:
        index, t, eps, flip = (part.chunk(world)[rank] for part in draw_batch(step, args, len(images), device))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
        x0 = images[index].permute(0, 3, 1, 2).float() / 127.5 - 1
        x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
        ab = alpha_bar[t][:, None, None, None]
        xt = (ab.sqrt() * x0 + (1 - ab).sqrt() * eps).contiguous(memory_format=layout)
        error = (model(xt, t).float() - eps).square().mean(dim=(1, 2, 3))  # Ho et al. 2020, algorithm 1
        loss = (error / alpha_bar[t].clamp(min=1 / args.max_weight)).mean()
        accelerator.backward(loss)
        muon.take_gradients()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        ema.update_parameters(net)
        step += 1
        bar.update()

        recent.append(accelerator.reduce(loss.detach(), "mean"))
        if step % LOG_EVERY == 0 or step == args.steps:
            history.append([step, torch.stack(recent).mean().item()])
            recent = []
            bar.set_postfix_str(f"loss {history[-1][1]:.4f}, {(step - first_step) * args.batch_size / (time.perf_counter() - started):.0f} img/s")
            if not math.isfinite(history[-1][1]):
                raise UserError(f"the loss is not finite at step {step}; try a smaller --lr, or --dtype fp32")
        if accelerator.is_main_process:
            if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
                save_image(sample_grid(ema.module, args, device, dtype), folder / f"samples_{step:06d}.png")
            if step % args.save_every == 0 or step == args.steps:
                content = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                           "step": step, "history": history, "recent": [loss.item() for loss in recent], "settings": settings}
                with atomic_path(state_file) as temporary:
                    torch.save(content, temporary)
                write_json(folder / "history.json", history)
    bar.close()
    if accelerator.is_main_process:
        path = folder / "UNet.pt"
        with atomic_path(path) as temporary:  # the course's format: a plain state dict in float32
            torch.save({name: tensor.cpu().contiguous() for name, tensor in ema.module.state_dict().items()}, temporary)
        print(f"wrote {path}\nnext: bash scripts/p2_infer.sh NOISE_DIR OUT {path}")
    accelerator.end_training()


def read_pictures(folder, side):
    """Every picture in a folder, in name order, its largest centred square reduced to side x side: uint8 [N, side, side, 3]."""
    if not Path(folder).is_dir():
        raise UserError(f"no such folder of pictures: {folder}")
    paths = sorted(path for path in Path(folder).iterdir() if not path.name.startswith(".") and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise UserError(f"{folder} has no pictures (.png, .jpg, .webp)")

    def read(path):
        image = Image.fromarray(read_picture(path))
        square = min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        return np.asarray(image.resize((side, side), Image.Resampling.BOX, (left, top, left + square, top + square)))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(tqdm(pool.map(read, paths), total=len(paths), desc="decoding", unit="img", leave=False, disable=len(paths) < 1000)))


def draw_batch(step, args, num_images, device):
    """Everything random about one step, for the global batch: (image index, t, eps, flip). A function of (seed, step) alone, so that a
    resumed run, or one on several processes, draws the same numbers."""
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    torch.manual_seed(args.seed * 1_000_003 + step)  # the model's dropout, where it has any
    options = {"generator": generator, "device": device}
    n = args.batch_size
    flip = torch.rand(n, **options) < (0.5 if args.flip else 0.0)
    return (torch.randint(0, num_images, (n,), **options), torch.randint(0, NUM_TIMESTEPS, (n,), **options),
            torch.randn(n, 3, args.image_size, args.image_size, **options), flip)


def learning_rate(step, args):
    """Linear warm-up, then constant, then linear to zero."""
    return args.lr * min((step + 1) / max(args.warmup, 1), 1, (args.steps - step) / max(args.decay * args.steps, 1))


def make_optimizers(net, args):
    """Muon for the convolutions, AdamW for the rest, without weight decay on norms and biases."""
    kernels = [p for name, p in net.named_parameters() if p.ndim == 4 and not name.startswith(("down1.", "out."))]
    rest = [p for p in net.parameters() if not any(p is kernel for kernel in kernels)]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": args.weight_decay}, {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]
    return (torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99)),
            ConvolutionMuon(kernels, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))


class ConvolutionMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which takes matrices only, on convolution kernels: each as a matrix (`as_matrix`)."""

    def __init__(self, kernels, **options):
        self.kernels = kernels
        super().__init__([torch.nn.Parameter(as_matrix(kernel)) for kernel in kernels], **options)

    def take_gradients(self):
        """Lets the matrices' gradients share the kernels' memory; to be called after each backward pass, before clipping or unscaling."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels):
            kernel.grad = kernel.grad.contiguous(memory_format=torch.contiguous_format if kernel.is_contiguous() else torch.channels_last)
            matrix.grad = as_matrix(kernel.grad)


def as_matrix(kernel):
    """A kernel [out, in, k, k] as a matrix [out, in * k * k] that shares its memory, whichever of the two layouts it has."""
    kernel = kernel.detach()
    return (kernel if kernel.is_contiguous() else kernel.permute(0, 2, 3, 1)).flatten(1)


def ema_update(decay):
    """torch's EMA, with a shorter memory in the first steps, so that the random start is soon forgotten."""
    def update(averaged, current, count):
        get_ema_multi_avg_fn(min(decay, (1 + float(count)) / (10 + float(count))))(averaged, current, count)
    return update


def load_state(path, settings):
    """The state that a run of these settings saved; another run's is refused."""
    state = load_pickle_safely(path, "training state")
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise UserError(f"{path} is not a training state of this script; choose another --output")
    changed = [f"{name} {state['settings'].get(name)} is now {value}" for name, value in settings.items() if state["settings"].get(name) != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another --output")
    return state


@torch.inference_mode()
def sample_grid(net, args, device, dtype, rows=2, columns=8):
    """A picture of rows x columns faces, drawn with the averaged weights in 25 steps."""
    noise = ImageNoise(args.seed, [f"training grid {i}" for i in range(rows * columns)], (3, args.image_size, args.image_size), device)()
    *_, last = ddim(predictor(net.eval(), dtype), noise, DDIMConfig(25))
    pictures = to_pictures(last.x).reshape(rows, columns, args.image_size, args.image_size, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(pictures.reshape(rows * args.image_size, columns * args.image_size, 3))


if __name__ == "__main__":
    run(main)
