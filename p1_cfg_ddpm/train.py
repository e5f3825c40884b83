"""Trains the conditional UNet. Run the same command again to go on where a run was stopped.

    python -m p1_cfg_ddpm.train --size small --output runs/p1                    # one GPU, or the CPU
    accelerate launch --num_processes 4 -m p1_cfg_ddpm.train --output runs/p1    # several GPUs
    python -m p1_cfg_ddpm.train --size medium --minutes 5 --batch-size 512 --compile --output runs/medium    # as long as a GPU is there
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .data import default_data, load_digits
from .device import compile_blocks
from .diffusion import Diffusion, DiffusionConfig, Guided, moment_density
from .files import UserError, check_flags, run, writable_folder
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS, SIZES, Block, UNet, save_model
from .pictures import save_image, to_model, to_uint8
from .provenance import HelpFormatter
from .samplers import ImageNoise, dpmpp_2m, finish, trailing
from .state import data_fingerprint, held, load_state, refuse_nonfinite, refuse_others, restore, save_state
from .tensors import fill, load_weights
from .training import (
    WATCHING,
    Log,
    Validation,
    add_arguments,
    add_settings,
    configured,
    first_line_of,
    guarded,
    is_flat,
    make_optimizer,
    prepare,
    seed_dropout,
    setting,
    share,
    share_of_peak,
)

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "data", "steps", "minutes", "save_every", "sample_every", "compile", *WATCHING)  # between a run and its continuation
ADVICE = "lower --batch-size, or choose a smaller --size"


@dataclass(frozen=True)
class TrainConfig:
    """What decides a training's result, beside its digits. `UserError` for what no training can be."""

    size: str = setting("small", "the network: small (the bundled one) for a CPU, medium or base for a GPU", choices=list(SIZES))
    steps: int = setting(3800, "optimiser steps in all")
    batch_size: int = setting(128, "images per step, over all processes together")
    lr: float = setting(2e-3, "peak learning rate, of Muon (in AdamW's step size) and AdamW alike")
    warmup: int = setting(100, "steps over which the learning rate rises")
    decay: float = setting(0.5, "last share of the steps, over which it falls to zero")
    weight_decay: float = setting(0.01, "not applied to embeddings, norms and biases")
    ema: tuple = setting((0.1,), "lengths of the averages of the weights, as shares of the training; the first is the result, the others are kept beside it",
                         metavar="LENGTH")
    drop_condition: float = setting(0.1, "share of images trained without their condition")
    schedule: str = setting("cosine", "noise schedule", choices=["cosine", "linear"])
    prediction: str = setting("v", "what the network predicts", choices=["v", "eps"])
    log_sigma: tuple = setting((-0.5, 1.3), "which noise levels are trained on: the normal distribution of ln(sigma / alpha); STD 0: t uniform",
                               nargs=2, metavar=("MEAN", "STD"))
    min_snr_gamma: float | None = setting(None, "min-SNR loss weighting (5 is usual); none if not given", type=float)
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        check_flags(self, ("steps", "batch_size"), lambda value: value >= 1, "at least 1")
        check_flags(self, ("lr", "weight_decay", "warmup"), lambda value: 0 <= value < math.inf, "a number from 0")
        check_flags(self, ("seed",), lambda value: -10**12 < value < 10**12, "a whole number of at most 12 digits")
        check_flags(self, ("min_snr_gamma",), lambda value: value is None or 0 < value < math.inf, "a number above 0")
        check_flags(self, ("drop_condition", "decay"), lambda value: 0 <= value <= 1, "between 0 and 1")
        check_flags(self, ("ema",), lambda lengths: all(0.001 <= length <= 0.25 for length in lengths), "between 0.001 and 0.25")
        check_flags(self, ("log_sigma",), lambda pair: all(map(math.isfinite, pair)) and pair[1] >= 0, "two finite numbers, the second from 0")


def parse_args():
    """(`TrainConfig`, all arguments)"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with mnistm/ and svhn/ in the course's layout, or a .npz of it")
    parser.add_argument("--output", type=Path, default=Path("runs/p1"), help="folder of the run: its state, sample grids and model.safetensors")
    parser.add_argument("--init", type=Path, default=None, help="begin with these weights, of the same --size, to go on with a result")
    parser.add_argument("--minutes", type=float, default=None, help="stop by the clock in place of --steps; the learning rate falls to zero by then")
    add_settings(parser, TrainConfig)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: a minute at the start, then faster on a GPU")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=1000, help="steps between two sample grids; 0 for none")
    add_arguments(parser)
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    check_flags(args, ("save_every",), lambda value: value >= 1, "at least 1")
    check_flags(args, ("sample_every", "validate_every", "stop_when_flat"), lambda value: 0 <= value < math.inf, "a number from 0")
    check_flags(args, ("minutes",), lambda value: value is None or 0 < value < math.inf, "a number above 0")
    return configured(TrainConfig, args), args


def main():
    config, args = parse_args()
    clock = Clock(args.minutes)
    folder = writable_folder(args.output)
    accelerator, dtype = prepare(args, folder)
    if args.minutes and accelerator.num_processes > 1:
        raise UserError("--minutes is for one process: several would not stop at the same step; give --steps")
    with held(accelerator, folder), guarded(ADVICE):
        train(config, args, clock, folder, accelerator, dtype)


def train(config, args, clock, folder, accelerator, dtype):
    """config: `TrainConfig`; args: where its digits and its results are, and what is seen on the way."""
    device = accelerator.device
    state_file = folder / "state.pt"
    refuse_others(state_file, [folder / "model.safetensors"])
    with accelerator.local_main_process_first():
        data, held_out = (load_digits(args.data, split) for split in ("train", "val"))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["pictures"] = data_fingerprint(data.images, data.digit, data.domain)
    last = None if args.minutes else config.steps
    state = load_state(state_file, settings, ("step", "history", "recent", "model", "ema", "optimizer"), last, args.defaults) if state_file.exists() else None
    (images, digits, domains), kept = ([torch.from_numpy(a).to(device) for a in (part.images, part.digit, part.domain)] for part in (data, held_out))

    torch.manual_seed(config.seed)
    net = UNet(SIZES[config.size]).to(device=device, memory_format=torch.channels_last)
    if args.init and not state:
        fill(net, load_weights(args.init)[0], args.init).requires_grad_(True)
        net.to(device=device, memory_format=torch.channels_last)
    diffusion = Diffusion(DiffusionConfig(config.schedule, config.prediction))
    ema = PowerEMA(net, config.ema)
    model, optimizer = accelerator.prepare(net, make_optimizer(net, config.lr, config.weight_decay, (0.9, 0.99), edges=("stem", "head")))
    step, history, recent = 0, [], []
    if state:
        step, history, recent = restore(state_file, state, accelerator, model=net, ema=ema, optimizer=optimizer)
    if args.compile:
        compile_blocks(net, Block)

    first_line_of(accelerator, dtype, f"{len(data)} images from {args.data}, {config.size} UNet of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M "
                  "parameters" + (f", going on at step {step}," if step else ""))
    log = Log(accelerator, folder, "training P1", args, step, history)
    validate = Validation(len(held_out), (3, IMAGE_SIZE, IMAGE_SIZE), num_timesteps=diffusion.config.num_timesteps)
    steps_until = cumulative_density(diffusion, config, device)

    def came():  # what share of the training is done
        return clock.share() if args.minutes else step / config.steps

    averaged, all_told = None, torch.zeros(1, dtype=torch.bool, device=device)

    def validation_loss(index, t, eps):
        x0, digit, domain = (part[index] for part in kept)
        return diffusion.loss(averaged, to_model(x0), digit, domain, t, eps, all_told)

    def export():
        for number, length in enumerate(config.ema):  # half precision: half the size, no measurable difference
            name = "model.safetensors" if number == 0 else f"model_ema{length:g}.safetensors"
            facts = {**settings, "init": args.init and args.init.name, "ema": length, "steps": step, "images": len(data)}
            save_model(folder / name, ema.network(net.config, device, number).half(), diffusion, facts)

    last = came() >= 1 or is_flat(history, args.stop_when_flat)
    while not last:
        index, t, eps, drop = share(accelerator, *draw_batch(step, config, len(data), steps_until, device))
        seed_dropout(config.seed, step, accelerator.process_index)
        rate = config.lr * share_of_peak(step, came(), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = diffusion.loss(model, to_model(images[index]), digits[index], domains[index], t, eps, drop, config.min_snr_gamma).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(net, step)
        log.bar.update()
        recent.append(accelerator.reduce(loss.detach(), "mean"))

        done = came() >= 1
        validating = args.validate_every and (step % args.validate_every == 0 or done)
        if step % LOG_EVERY == 0 or done or validating:
            refuse_nonfinite(step, recent, state_file)
            numbers = {"loss": torch.stack(recent).mean().item(), "lr": rate}
            if validating:
                averaged = ema.network(net.config, device)
                numbers |= validate(validation_loss, accelerator, config.batch_size)
            log.add(step, **numbers)
            recent = []
        last = done or is_flat(history, args.stop_when_flat)
        if accelerator.is_main_process and args.sample_every and (step % args.sample_every == 0 or last):
            save_image(sample_grid(ema.network(net.config, device), diffusion, device, config.seed), folder / f"samples_{step:06d}.png")
        if accelerator.is_main_process and (step % args.save_every == 0 or last):
            refuse_nonfinite(step, [*recent, *net.parameters(), *ema.averages[0].values()], state_file)
            save_state(state_file, accelerator, settings, step, history, recent, model=net, ema=ema, optimizer=optimizer)
            if not last:
                export()
    log.close()
    if accelerator.is_main_process:
        export()  # also where nothing was left to learn: the run may have been killed between its last state and this
        path = folder / "model.safetensors"
        print(f"wrote {path} after {step} steps\nnext: bash scripts/p1_infer.sh out/p1 --checkpoint {path}")


class Clock:
    """How far a training of so many minutes has come, from now on: `share()` in 0..1 and beyond."""

    def __init__(self, minutes):
        self.started, self.seconds = time.perf_counter(), 60 * (minutes or math.inf)

    def share(self):
        return (time.perf_counter() - self.started) / self.seconds


def draw_batch(step, config, num_images, steps_until, device):
    """Everything random about one step, for the global batch: (image index, t, eps, drop), each of length batch_size.

    A function of (seed, step) alone, so that a resumed run, or one on several processes, draws the same numbers. t is stratified: the batch is
    spread evenly over the distribution whose cumulative sum is `steps_until`, [T], so that losses of different batches can be compared."""
    eps = torch.empty(config.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)  # first: too large a batch ends here
    index, position, end = [], step * config.batch_size, (step + 1) * config.batch_size
    while position < end:
        epoch, place = divmod(position, num_images)
        index.append(permutation(config.seed, epoch, num_images, device)[place:place + end - position])
        position += len(index[-1])
    options = {"generator": torch.Generator(device).manual_seed(config.seed * 1_000_003 + step), "device": device}
    spread = (torch.arange(config.batch_size, device=device) + torch.rand(config.batch_size, **options)) / config.batch_size
    t = torch.searchsorted(steps_until, spread).clamp(max=len(steps_until) - 1)
    eps.normal_(generator=options["generator"])
    drop = torch.rand(config.batch_size, **options) < config.drop_condition
    return torch.cat(index), t, eps, drop


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def permutation(seed, epoch, length, device):
    """The order of the images in an epoch; on the device, so that no step waits for a copy."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)


def cumulative_density(diffusion, config, device):
    """How much of the training falls on the steps up to t, float32 [T]."""
    mean, std = config.log_sigma
    density = moment_density(diffusion.alpha_bar, mean, std) if std > 0 else torch.full_like(diffusion.alpha_bar, 1 / len(diffusion.alpha_bar))
    return density.cumsum(0).float().to(device)


class PowerEMA:
    """Averages of the weights with a power function for their memory (Karras et al. 2024, section 3.1): `length` is the average's width as a share of
    the training so far, whatever its number of steps, and the random start is forgotten by itself. Several lengths cost little; one is chosen afterwards."""

    def __init__(self, net, lengths):
        # the width of t^gamma on [0, 1] is ((gamma + 1) / (gamma + 2)^2 / (gamma + 3))^(1/2), eq. 27
        self.gammas = [np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max() for length in lengths]
        self.averages = [{name: tensor.detach().clone() for name, tensor in net.state_dict().items()} for _ in lengths]

    @torch.no_grad()
    def update(self, net, step):
        """To be called after each step, counted from 1."""
        current = list(net.state_dict().values())
        for gamma, average in zip(self.gammas, self.averages):
            torch._foreach_lerp_(list(average.values()), current, 1 - (1 - 1 / step) ** (gamma + 1))

    def network(self, config, device, number=0):
        """A network of its own with one of the averages, in eval mode."""
        net = UNet(config)
        net.load_state_dict(self.averages[number])
        return net.to(device=device, memory_format=torch.channels_last).eval()

    def state_dict(self):
        return self.averages

    def load_state_dict(self, averages):
        for own, saved in zip(self.averages, averages, strict=True):
            for name in own:
                own[name].copy_(saved[name])


@torch.inference_mode()
def sample_grid(net, diffusion, device, seed, w=1.0, num_steps=12):
    """A picture with a row per domain and a column per digit, drawn with the averaged weights."""
    digit = torch.arange(NUM_DIGITS, device=device).repeat(len(DOMAINS))
    domain = torch.arange(len(DOMAINS), device=device).repeat_interleave(NUM_DIGITS)
    noise = ImageNoise(seed, [f"training grid {i}" for i in range(len(digit))], (3, IMAGE_SIZE, IMAGE_SIZE), device)()
    guided = Guided(net.eval(), diffusion, digit, domain, w)
    last = finish(dpmpp_2m(guided, noise, trailing(diffusion.alpha_bar, num_steps)))
    grid = to_uint8(last.x).reshape(len(DOMAINS), NUM_DIGITS, IMAGE_SIZE, IMAGE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(len(DOMAINS) * IMAGE_SIZE, NUM_DIGITS * IMAGE_SIZE, 3))
    return picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)


if __name__ == "__main__":
    run(main)
