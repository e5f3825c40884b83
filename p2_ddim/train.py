"""Trains a face UNet on a folder of images. Run the same command again to go on where a run was stopped.

    python -m p2_ddim.train --data runs/faces --output runs/p2
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from . import diffusion
from .data import read_faces
from .device import compile_blocks
from .diffusion import NUM_TIMESTEPS, make_alpha_bar
from .files import UserError, atomic_path, check_flags, run, writable_folder
from .inference import DrawConfig, to_pictures
from .model import Block, UNet, UNetConfig, load_unet
from .pictures import save_image
from .provenance import HelpFormatter
from .samplers import ImageNoise, finish
from .state import data_fingerprint, held, load_state, refuse_nonfinite, refuse_others, restore, save_state
from .training import (
    WATCHING,
    Log,
    Validation,
    add_arguments,
    add_settings,
    averaged_copy,
    configured,
    ema_update,
    first_line_of,
    guarded,
    is_flat,
    make_optimizer,
    prepare,
    seed_dropout,
    setting,
    share,
)

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "data", "steps", "save_every", "sample_every", "compile", *WATCHING)  # between a run and its continuation
ADVICE = "lower --batch-size or --image-size, or use more processes; --dtype bf16 or fp16 takes less than fp32"


@dataclass(frozen=True)
class TrainConfig:
    """What decides a training's result, beside its pictures. `UserError` for what no training can be."""

    image_size: int = setting(64, "pictures are cropped to squares of this side")
    widths: tuple = setting((32, 32, 64, 96, 128), "channels at each resolution, multiples of 32")
    attention: tuple = setting((4,), "levels with self-attention; 0 is the finest", nargs="*")
    blocks: int = setting(1, "residual blocks per level")
    dropout: float = setting(0.0, "share of a block's features that are left out in training")
    flip: bool = setting(False, "mirror half of the pictures")
    steps: int = setting(1600, "optimiser steps in all")
    batch_size: int = setting(32, "images per step, over all processes together")
    lr: float = setting(2e-3, "peak learning rate, of Muon (in AdamW's step size) and AdamW alike")
    warmup: int = setting(100, "steps over which the learning rate rises")
    decay: float = setting(0.5, "last share of the steps, over which it falls to zero")
    weight_decay: float = setting(0.01, "not applied to norms and biases")
    ema: float = setting(0.999, "decay of the averaged weights, which are the result")
    max_weight: float = setting(20.0, "the loss is weighed by 1 / alpha_bar (as that of velocity is; Salimans and Ho 2022), up to this; 1 is plain DDPM")
    held_out: float = setting(0.02, "share of the pictures that validation keeps for itself")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        check_flags(self, ("steps", "batch_size", "image_size", "blocks", "max_weight"), lambda value: value >= 1, "at least 1")
        check_flags(self, ("lr", "weight_decay", "warmup"), lambda value: 0 <= value < math.inf, "a number from 0")
        check_flags(self, ("decay", "ema", "dropout", "held_out"), lambda value: 0 <= value <= 1, "between 0 and 1")
        check_flags(self, ("seed",), lambda value: -10**12 < value < 10**12, "a whole number of at most 12 digits")
        check_flags(self, ("widths",), lambda widths: all(width >= 32 and width % 32 == 0 for width in widths), "multiples of 32")
        if not set(self.attention) <= set(range(len(self.widths))):
            raise UserError(f"--attention must be levels from 0 to {len(self.widths) - 1}, as there are --widths, not {self.attention}")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise UserError(f"--image-size {self.image_size} cannot be halved {len(self.widths) - 1} times")

    @property
    def unet(self):
        """The network's own."""
        return UNetConfig(tuple(self.widths), tuple(self.attention), self.blocks, self.dropout)


def parse_args():
    """(`TrainConfig`, all arguments)"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures; p2_ddim.make_mini faces draws some")
    parser.add_argument("--init", type=Path, default=None, help="begin with these weights, of a network of the same shape, to go on with a result")
    parser.add_argument("--output", type=Path, default=Path("runs/p2"), help="folder of the run: its state, sample grids and UNet.pt")
    add_settings(parser, TrainConfig)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: a minute at the start, then faster on a GPU")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two sample grids; 0 for none")
    add_arguments(parser)
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    check_flags(args, ("save_every",), lambda value: value >= 1, "at least 1")
    check_flags(args, ("sample_every", "validate_every", "stop_when_flat"), lambda value: 0 <= value < math.inf, "a number from 0")
    return configured(TrainConfig, args), args


def main():
    config, args = parse_args()
    folder = writable_folder(args.output)
    accelerator, dtype = prepare(args, folder)
    with held(accelerator, folder), guarded(ADVICE):
        train(config, args, folder, accelerator, dtype)


def train(config, args, folder, accelerator, dtype):
    """config: `TrainConfig`; args: where its pictures and its results are, and what is seen on the way."""
    device = accelerator.device
    state_file = folder / "state.pt"
    refuse_others(state_file, [folder / "UNet.pt"])
    pictures = torch.from_numpy(read_faces(args.data, config.image_size))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["pictures"] = data_fingerprint(pictures.numpy())
    needed = ("step", "history", "recent", "model", "ema", "optimizer")
    state = load_state(state_file, settings, needed, config.steps, args.defaults) if state_file.exists() else None
    kept = round(config.held_out * len(pictures)) if len(pictures) > 1 else 0
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(config.seed))
    images, held_out = (pictures[part].to(device) for part in (order[kept:].sort().values, order[:kept] if kept else order[:256]))

    torch.manual_seed(config.seed)
    net = UNet(config.unet)
    if args.init and not state:
        begun = load_unet(args.init)
        if replace(begun.config, dropout=config.dropout) != config.unet:
            raise UserError(f"{args.init} is another network: --widths {told(begun.config.widths)} --attention {told(begun.config.attention)} "
                            f"--blocks {begun.config.num_blocks}")
        net.load_state_dict(begun.state_dict())
    # channels-last is the faster layout for a GPU's tensor cores; on a CPU the backward pass of GroupNorm is slow in it
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    net = net.to(device=device, memory_format=layout)
    ema = averaged_copy(net)
    alpha_bar = make_alpha_bar().float().to(device)
    optimizer = make_optimizer(net, config.lr, config.weight_decay, (0.9, 0.99), edges=("down1.", "out."))
    model, optimizer = accelerator.prepare(net, optimizer)
    step, history, recent = 0, [], []
    if state:
        step, history, recent = restore(state_file, state, accelerator, model=net, ema=ema, optimizer=optimizer)

    if args.compile:
        compile_blocks(net, Block)

    def loss_of(network, x0, t, eps):
        return diffusion.loss(network, alpha_bar, x0.contiguous(memory_format=layout), t, eps, config.max_weight)

    first_line_of(accelerator, dtype, f"{len(images)} pictures from {args.data}, UNet of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"
                  + (f", going on at step {step}," if step else ""))
    log = Log(accelerator, folder, "training P2", args, step, history)
    validate = Validation(len(held_out), (3, config.image_size, config.image_size), num_timesteps=NUM_TIMESTEPS)
    while step < config.steps and not is_flat(history, args.stop_when_flat):
        index, t, eps, flip = share(accelerator, *draw_batch(step, config, len(images), device))
        seed_dropout(config.seed, step, accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        x0 = to_range(images[index])
        x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
        loss = loss_of(model, x0, t, eps).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(ema, net, step, config.ema)
        step += 1
        log.bar.update()
        recent.append(accelerator.reduce(loss.detach(), "mean"))

        validating = args.validate_every and (step % args.validate_every == 0 or step == config.steps)
        if step % LOG_EVERY == 0 or step == config.steps or validating:
            refuse_nonfinite(step, recent, state_file)
            numbers = {"loss": torch.stack(recent).mean().item(), "lr": learning_rate(step - 1, config)}
            if validating:
                numbers |= validate(lambda index, t, eps: loss_of(ema, to_range(held_out[index]), t, eps), accelerator, config.batch_size)
            log.add(step, **numbers)
            recent = []
        last = step == config.steps or is_flat(history, args.stop_when_flat)
        if accelerator.is_main_process and args.sample_every and (step % args.sample_every == 0 or last):
            save_image(sample_grid(ema, config, device, dtype), folder / f"samples_{step:06d}.png")
        if step % args.save_every == 0 or last:
            refuse_nonfinite(step, [*recent, *net.parameters(), *ema.parameters()], state_file)
            save_state(state_file, accelerator, settings, step, history, recent, model=net, ema=ema, optimizer=optimizer)
    log.close()
    if accelerator.is_main_process:
        path = folder / "UNet.pt"
        with atomic_path(path) as temporary:  # the course's format: a plain state dict in float32
            torch.save({name: tensor.cpu().contiguous() for name, tensor in ema.state_dict().items()}, temporary)
        print(f"wrote {path}\nnext: bash scripts/p2_infer.sh NOISE_DIR OUT {path}")


def learning_rate(step, config):
    """Linear warm-up, then constant, then linear to zero over the last share `decay` of the steps."""
    return config.lr * min((step + 1) / max(config.warmup, 1), 1, (config.steps - step) / max(config.decay * config.steps, 1))


def told(numbers):
    return " ".join(map(str, numbers))


def to_range(images):
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(step, config, num_images, device):
    """Everything random about one step, for the global batch: (image index, t, eps, flip). A function of (seed, step) alone, so that a
    resumed run, or one on several processes, draws the same numbers."""
    generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
    options = {"generator": generator, "device": device}
    n = config.batch_size
    flip = torch.rand(n, **options) < (0.5 if config.flip else 0.0)
    return (torch.randint(0, num_images, (n,), **options), torch.randint(0, NUM_TIMESTEPS, (n,), **options),
            torch.randn(n, 3, config.image_size, config.image_size, **options), flip)


@torch.inference_mode()
def sample_grid(net, config, device, dtype, rows=2, columns=8):
    """A picture of rows x columns faces, drawn with the averaged weights in 25 steps."""
    noise = ImageNoise(config.seed, [f"training grid {i}" for i in range(rows * columns)], (3, config.image_size, config.image_size), device)()
    last = finish(DrawConfig(num_steps=25).states(net, noise, dtype=dtype))
    pictures = to_pictures(last.x).reshape(rows, columns, config.image_size, config.image_size, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(pictures.reshape(rows * config.image_size, columns * config.image_size, 3))


if __name__ == "__main__":
    run(main)
