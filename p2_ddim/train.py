"""Trains a face UNet on a folder of images. Run the same command again to go on where a run was stopped.

    python -m p2_ddim.train --data runs/faces --output runs/p2
"""

import argparse
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from . import diffusion
from .data import read_faces
from .device import compile_blocks
from .diffusion import NUM_TIMESTEPS, make_alpha_bar
from .files import UserError, atomic_path, check_flags, fingerprint, run, writable_folder
from .inference import DrawConfig, to_pictures
from .model import Block, UNet, UNetConfig, load_unet
from .pictures import save_image, to_model
from .provenance import HelpFormatter, script_line
from .samplers import ImageNoise, finish
from .state import add_row, data_fingerprint, held, load_state, refuse_nonfinite, refuse_others, restore, save_state, settings_of
from .training import (
    WATCHING,
    Log,
    Validation,
    add_arguments,
    add_settings,
    averaged_copy,
    configured,
    due,
    ema_update,
    first_line_of,
    guarded,
    is_flat,
    make_optimizer,
    optimizer_step,
    prepare,
    seed_dropout,
    setting,
    share,
    share_of_peak,
)

LOG_EVERY, MOST_ON_GPU = 50, 2**30  # steps; bytes of pictures
FREE_TO_CHANGE = ("output", "data", "steps", "save_every", "sample_every", "compile", "accumulate", "init", *WATCHING)  # when a run goes on
NEEDED = ("step", "history", "recent", "model", "ema", "optimizer")  # of a state
ADVICE = "raise --accumulate, lower --batch-size or --image-size, or use more processes; --dtype bf16 or fp16 takes less than fp32"


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
    held_out: float = setting(0.02, "share of the pictures that validation keeps for itself; where that is none it measures on up to 256 that are trained on")
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
        return UNetConfig(tuple(self.widths), tuple(sorted(set(self.attention))), self.blocks, self.dropout)  # as a checkpoint tells them


def parse_args():
    """(`TrainConfig`, all arguments)"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures; p2_ddim.make_mini faces draws some")
    parser.add_argument("--init", type=Path, default=None, help="begin with these weights, of a network of the same shape, to go on with a result")
    parser.add_argument("--output", type=Path, default=Path("runs/p2"), help="folder of the run: its state, sample grids and UNet.pt")
    add_settings(parser, TrainConfig)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: a minute at the start, then faster on a GPU")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which a batch's gradient is taken, where memory has no place for the whole")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two sample grids; 0 for none")
    add_arguments(parser)
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    check_flags(args, ("save_every", "accumulate"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("sample_every", "validate_every", "stop_when_flat"), lambda value: 0 <= value < math.inf, "a number from 0")
    return configured(TrainConfig, args), args


def main():
    config, args = parse_args()
    folder = writable_folder(args.output)
    accelerator, dtype = prepare(args, folder)
    with held(accelerator, folder), guarded(ADVICE):
        train(config, args, folder, accelerator, dtype)


def train(config, args, folder, accelerator, dtype):
    """Trains until --steps are over or the validation is flat, from the run's last state where there is one; leaves UNet.pt.

    config: `TrainConfig`; args: where its pictures and its results are, and what is seen on the way."""
    device, state_file = accelerator.device, folder / "state.pt"
    refuse_others(state_file, [folder / "UNet.pt"])
    pictures = torch.from_numpy(read_faces(args.data, config.image_size))
    settings = settings_of(args, FREE_TO_CHANGE, pictures=data_fingerprint(pictures.numpy()), begun_from=args.init and fingerprint(args.init))
    state = load_state(state_file, settings, NEEDED, config.steps, args.defaults) if state_file.exists() else None
    place = device if pictures.nbytes <= MOST_ON_GPU else torch.device("cpu")  # many large ones: each batch goes there by itself
    faces, held_out = (part.to(place) for part in parted(pictures, config))
    del pictures

    alpha_bar = make_alpha_bar().float().to(device)
    run = make_run(config, args, accelerator, state_file, settings, state)
    first_line_of(accelerator, dtype, f"{len(faces)} pictures from {args.data}, UNet of {sum(p.numel() for p in run.net.parameters()) / 1e6:.2f} M parameters"
                  + (f", going on at step {run.step}," if run.step else ""), run)
    log = Log(accelerator, folder, "training P2", args, config.batch_size, run.step, run.history)

    last = run.step >= config.steps or is_flat(run.history, args.stop_when_flat)
    while not last:
        index, t, eps, flip = share(accelerator, *draw_batch(run.step, config, len(faces), device))
        seed_dropout(config.seed, run.step, accelerator.process_index)
        rate = config.lr * share_of_peak(run.step, run.step / config.steps, config)
        loss = backward(run, accelerator, faces, (index, t, eps, flip), alpha_bar, config, args.accumulate)
        optimizer_step(accelerator, run.model, run.optimizer, None, rate)
        ema_update(run.ema, run.net, run.step, config.ema)
        run.step += 1
        run.recent.append(accelerator.reduce(loss, "mean"))
        log.bar.update()

        over = run.step == config.steps
        validating = due(args.validate_every, run.step, over)
        if validating or due(LOG_EVERY, run.step, over):
            add_row(run, log, rate, validate(run.ema, alpha_bar, held_out, config, accelerator, args.accumulate) if validating else {})
        last = over or is_flat(run.history, args.stop_when_flat)
        if accelerator.is_main_process and due(args.sample_every, run.step, last):
            save_image(sample_grid(run.ema, config, device, dtype), folder / f"samples_{run.step:06d}.png")
        if due(args.save_every, run.step, last):
            save_run(run, accelerator)
            if accelerator.is_main_process:
                export(run, folder)
    log.close()
    if accelerator.is_main_process:
        path = export(run, folder)  # also where nothing was left to learn: the run may have been killed before it
        print(f"wrote {path}\nnext: {script_line('p2_infer.sh', 'NOISE_DIR', 'OUT', path)}")


def backward(run, accelerator, faces, batch, alpha_bar, config, accumulate):
    """The mean loss of this process's share of a batch, as `draw_batch`, whose gradient is taken in `accumulate` parts, one after the other."""
    total, parts = 0, list(zip(*(part.tensor_split(accumulate) for part in batch)))
    for number, (index, t, eps, flip) in enumerate(parts, start=1):
        with accelerator.no_sync(run.model) if number < len(parts) else nullcontext():  # processes meet once a step
            losses = diffusion.loss(run.model, alpha_bar, batch_of(faces, index, flip), t, eps, config.max_weight)
            loss = losses.sum() / len(batch[0])
            accelerator.backward(loss)
        total = total + loss.detach()
    return total


def parted(pictures, config):
    """(those to learn from, those that validation keeps for itself), by chance; where none are kept it measures on up to 256 of those.

    pictures: uint8 [N, H, W, 3]."""
    kept = min(round(config.held_out * len(pictures)), len(pictures) - 1)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(config.seed))
    return pictures[order[kept:].sort().values], pictures[order[:kept] if kept else order[:256]]


def layout_of(device):
    """channels-last is the faster layout for a GPU's tensor cores; on a CPU the backward pass of GroupNorm is slow in it."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def batch_of(faces, index, flip=None):
    """float32 [B, 3, H, W] in [-1, 1] of uint8 faces, [N, H, W, 3], in the places `index`, int [B], mirrored where `flip`, bool [B], is set."""
    x0 = to_model(faces[index.to(faces.device)], index.device)
    x0 = x0 if flip is None else torch.where(flip[:, None, None, None], x0.flip(3), x0)
    return x0.contiguous(memory_format=layout_of(x0.device))


@dataclass
class Run:
    """A training on its way: what its steps change, and how it is known when it goes on."""

    state_file: Path
    settings: dict  # what decides it
    net: UNet
    model: torch.nn.Module  # the network too, wrapped for this machine and its processes: what the loss calls
    optimizer: torch.optim.Optimizer
    ema: UNet  # with the averages of its weights, which are the result
    step: int = 0
    history: list = field(default_factory=list)  # the rows of log.csv
    recent: list = field(default_factory=list)  # losses of the steps since the last row, float32 []


def make_run(config, args, accelerator, state_file, settings, state):
    """A `Run` from its beginning, with the weights of --init where it is given, or from where its state is."""
    torch.manual_seed(config.seed)
    net = UNet(config.unet)
    if args.init and not state:
        begun = load_unet(args.init)
        if replace(begun.config, dropout=config.dropout) != config.unet:
            raise UserError(f"{args.init} is another network: --widths {told(begun.config.widths)} --attention {told(begun.config.attention)} "
                            f"--blocks {begun.config.num_blocks}")
        net.load_state_dict(begun.state_dict())
    net.to(device=accelerator.device, memory_format=layout_of(accelerator.device))
    ema = averaged_copy(net)
    model, optimizer = accelerator.prepare(net, make_optimizer(net, config.lr, config.weight_decay, (0.9, 0.99), edges=("down1.", "out.")))
    run = Run(state_file, settings, net, model, optimizer, ema)
    if state:
        run.step, run.history, run.recent = restore(state_file, state, accelerator, model=net, ema=ema, optimizer=optimizer)
    if args.compile:
        compile_blocks(net, Block)
    return run


def save_run(run, accelerator):
    """Writes what `make_run` goes on from, if it is finite."""
    refuse_nonfinite(run.step, [*run.recent, *run.net.parameters(), *run.ema.parameters()], run.state_file)
    save_state(run.state_file, accelerator, run.settings, run.step, run.history, run.recent, model=run.net, ema=run.ema, optimizer=run.optimizer)


def validate(net, alpha_bar, held_out, config, accelerator, accumulate):
    """The losses, of `Validation`, of the averaged network on the faces that are kept for it."""
    def loss(index, t, eps):
        return diffusion.loss(net, alpha_bar, batch_of(held_out, index), t, eps, config.max_weight)

    validation = Validation(len(held_out), (3, config.image_size, config.image_size), num_timesteps=NUM_TIMESTEPS)
    return validation(loss, accelerator, max(config.batch_size // accumulate, 1))


def export(run, folder):
    """Writes the averaged weights in the course's format, a plain state dict in float32; returns their path."""
    path = folder / "UNet.pt"
    with atomic_path(path) as temporary:
        torch.save({name: tensor.cpu().contiguous() for name, tensor in run.ema.state_dict().items()}, temporary)
    return path


def told(numbers):
    return " ".join(map(str, numbers))


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
