"""Trains a face UNet on a folder of images. Run the same command again to go on where a run was stopped.

    python -m p2_ddim.train --data runs/faces --output runs/p2
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from . import diffusion
from .data import read_pictures
from .diffusion import NUM_TIMESTEPS, make_alpha_bar
from .files import UserError, atomic_path, check_flags, run, writable_folder
from .inference import DrawConfig, to_pictures
from .model import Block, UNet, UNetConfig, load_unet
from .pictures import save_image
from .samplers import ImageNoise, finish
from .training import (
    WATCHING,
    Log,
    Validation,
    add_arguments,
    averaged_copy,
    data_fingerprint,
    ema_update,
    first_line_of,
    fitting,
    guarded,
    held,
    is_flat,
    learning_rate,
    load_state,
    make_optimizer,
    prepare,
    refuse_nonfinite,
    refuse_others,
    seed_dropout,
    share,
)

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "data", "steps", "save_every", "sample_every", "compile", *WATCHING)  # between a run and its continuation
ADVICE = "lower --batch-size or --image-size, or use more processes; --dtype bf16 or fp16 takes less than fp32"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures; p2_ddim.make_mini faces draws some")
    parser.add_argument("--init", type=Path, default=None, help="begin with these weights, of a network of the same shape, to go on with a result")
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
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: a minute at the start, then faster on a GPU")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the pictures that validation keeps for itself")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two sample grids; 0 for none")
    add_arguments(parser)
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    check_flags(args, ("steps", "batch_size", "save_every", "image_size", "blocks"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("lr", "weight_decay", "warmup", "sample_every", "validate_every", "stop_when_flat"), lambda value: 0 <= value < math.inf,
                "a number from 0")
    if not -10**12 < args.seed < 10**12:
        raise UserError(f"--seed must be a whole number of at most 12 digits, not {args.seed}")
    if not args.max_weight >= 1:  # not a number neither
        raise UserError(f"--max-weight must be at least 1, not {args.max_weight}")
    check_flags(args, ("decay", "ema", "dropout", "held_out"), lambda value: 0 <= value <= 1, "between 0 and 1")
    if any(width < 32 or width % 32 for width in args.widths):
        raise UserError(f"--widths must be multiples of 32, not {args.widths}")
    if not set(args.attention) <= set(range(len(args.widths))):
        raise UserError(f"--attention must be levels from 0 to {len(args.widths) - 1}, as there are --widths, not {args.attention}")
    if args.image_size % 2 ** (len(args.widths) - 1):
        raise UserError(f"--image-size {args.image_size} cannot be halved {len(args.widths) - 1} times")
    return args


def main():
    args = parse_args()
    folder = writable_folder(args.output)
    accelerator, dtype = prepare(args, folder)
    with held(accelerator, folder), guarded(ADVICE):
        train(args, folder, accelerator, dtype)


def train(args, folder, accelerator, dtype):
    device = accelerator.device
    state_file = folder / "state.pt"
    refuse_others(state_file, [folder / "UNet.pt"])
    pictures = torch.from_numpy(read_pictures(args.data, args.image_size))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["pictures"] = data_fingerprint(pictures.numpy())
    needed = ("step", "history", "recent", "model", "ema", "optimizer")
    state = load_state(state_file, settings, needed, args.steps, args.defaults) if state_file.exists() else None
    kept = round(args.held_out * len(pictures)) if len(pictures) > 1 else 0
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(args.seed))
    images, held_out = (pictures[part].to(device) for part in (order[kept:].sort().values, order[:kept] if kept else order[:256]))

    torch.manual_seed(args.seed)
    net = UNet(UNetConfig(tuple(args.widths), tuple(args.attention), args.blocks, args.dropout))
    if args.init:
        begun = load_unet(args.init)
        if replace(begun.config, dropout=args.dropout) != net.config:
            raise UserError(f"{args.init} is another network: --widths {told(begun.config.widths)} --attention {told(begun.config.attention)} "
                            f"--blocks {begun.config.num_blocks}")
        net.load_state_dict(begun.state_dict())
    # channels-last is the faster layout for a GPU's tensor cores; on a CPU the backward pass of GroupNorm is slow in it
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    net = net.to(device=device, memory_format=layout)
    ema = averaged_copy(net)
    alpha_bar = make_alpha_bar().float().to(device)
    optimizer = make_optimizer(net, args.lr, args.weight_decay, (0.9, 0.99), edges=("down1.", "out."))
    model, optimizer = accelerator.prepare(net, optimizer)
    step, history, recent = 0, [], []
    if state:
        with fitting(state_file):
            net.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(state["scaler"])
            step, history, recent = state["step"], state["history"], [torch.tensor(loss, device=device) for loss in state["recent"]]

    if args.compile:
        compile_blocks(net)

    def loss_of(network, x0, t, eps):
        return diffusion.loss(network, alpha_bar, x0.contiguous(memory_format=layout), t, eps, args.max_weight)

    first_line_of(accelerator, dtype, f"{len(images)} pictures from {args.data}, UNet of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"
                  + (f", going on at step {step}," if step else ""))
    log = Log(accelerator, folder, "training P2", args, step, history)
    validate = Validation(len(held_out), (3, args.image_size, args.image_size), num_timesteps=NUM_TIMESTEPS)
    while step < args.steps and not is_flat(history, args.stop_when_flat):
        index, t, eps, flip = share(accelerator, *draw_batch(step, args, len(images), device))
        seed_dropout(args.seed, step, accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        x0 = to_range(images[index])
        x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
        loss = loss_of(model, x0, t, eps).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(ema, net, step, args.ema)
        step += 1
        log.bar.update()
        recent.append(accelerator.reduce(loss.detach(), "mean"))

        validating = args.validate_every and (step % args.validate_every == 0 or step == args.steps)
        if step % LOG_EVERY == 0 or step == args.steps or validating:
            refuse_nonfinite(step, recent, state_file)
            numbers = {"loss": torch.stack(recent).mean().item(), "lr": learning_rate(step - 1, args)}
            if validating:
                numbers |= validate(lambda index, t, eps: loss_of(ema, to_range(held_out[index]), t, eps), accelerator, args.batch_size)
            log.add(step, **numbers)
            recent = []
        last = step == args.steps or is_flat(history, args.stop_when_flat)
        if accelerator.is_main_process and args.sample_every and (step % args.sample_every == 0 or last):
            save_image(sample_grid(ema, args, device, dtype), folder / f"samples_{step:06d}.png")
        if step % args.save_every == 0 or last:
            refuse_nonfinite(step, [*recent, *net.parameters(), *ema.parameters()], state_file)
            content = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "history": history,
                       "scaler": accelerator.scaler and accelerator.scaler.state_dict(), "recent": [loss.item() for loss in recent], "settings": settings}
            if accelerator.is_main_process:
                with atomic_path(state_file) as temporary:
                    torch.save(content, temporary)
    log.close()
    if accelerator.is_main_process:
        path = folder / "UNet.pt"
        with atomic_path(path) as temporary:  # the course's format: a plain state dict in float32
            torch.save({name: tensor.cpu().contiguous() for name, tensor in ema.state_dict().items()}, temporary)
        print(f"wrote {path}\nnext: bash scripts/p2_infer.sh NOISE_DIR OUT {path}")


def told(numbers):
    return " ".join(map(str, numbers))


def compile_blocks(net):
    """torch.compile, block by block: blocks of the same shape share what was compiled."""
    torch._dynamo.config.recompile_limit = 64  # one for each shape, and for gradients or none
    for module in net.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def to_range(images):
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(step, args, num_images, device):
    """Everything random about one step, for the global batch: (image index, t, eps, flip). A function of (seed, step) alone, so that a
    resumed run, or one on several processes, draws the same numbers."""
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    options = {"generator": generator, "device": device}
    n = args.batch_size
    flip = torch.rand(n, **options) < (0.5 if args.flip else 0.0)
    return (torch.randint(0, num_images, (n,), **options), torch.randint(0, NUM_TIMESTEPS, (n,), **options),
            torch.randn(n, 3, args.image_size, args.image_size, **options), flip)


@torch.inference_mode()
def sample_grid(net, args, device, dtype, rows=2, columns=8):
    """A picture of rows x columns faces, drawn with the averaged weights in 25 steps."""
    noise = ImageNoise(args.seed, [f"training grid {i}" for i in range(rows * columns)], (3, args.image_size, args.image_size), device)()
    last = finish(DrawConfig(num_steps=25).states(net, noise, dtype=dtype))
    pictures = to_pictures(last.x).reshape(rows, columns, args.image_size, args.image_size, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(pictures.reshape(rows * args.image_size, columns * args.image_size, 3))


if __name__ == "__main__":
    run(main)
