"""Trains the conditional UNet. Run the same command again to go on where a run was stopped.

    python -m p1_cfg_ddpm.train --size small --output runs/p1                    # one GPU, or the CPU
    accelerate launch --num_processes 4 -m p1_cfg_ddpm.train --output runs/p1    # several GPUs
    python -m p1_cfg_ddpm.train --size medium --minutes 5 --batch-size 512 --compile --output runs/medium    # as long as a GPU is there
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .data import default_data, load_digits
from .device import compile_blocks
from .diffusion import Diffusion, DiffusionConfig, Guided, moment_density
from .files import UserError, check_flags, fingerprint, run, writable_folder
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS, SIZES, Block, UNet, save_model
from .pictures import save_image, to_model, to_uint8
from .provenance import HelpFormatter, script_line
from .samplers import ImageNoise, dpmpp_2m, finish, trailing
from .state import add_row, data_fingerprint, fitting, held, load_state, refuse_nonfinite, refuse_others, restore, save_state, settings_of
from .tensors import fill, load_weights
from .training import (
    WATCHING,
    Log,
    Validation,
    add_arguments,
    add_settings,
    configured,
    due,
    first_line_of,
    guarded,
    is_flat,
    make_optimizer,
    one_first,
    optimizer_step,
    prepare,
    seed_dropout,
    setting,
    share,
    share_of_peak,
)

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "data", "steps", "minutes", "save_every", "sample_every", "compile", "init", *WATCHING)  # when a run goes on
NEEDED = ("step", "history", "recent", "model", "ema", "optimizer")  # of a state
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
    accelerator, dtype = prepare(args, folder := writable_folder(args.output))
    if args.minutes and accelerator.num_processes > 1:
        raise UserError("--minutes is for one process: several would not stop at the same step; give --steps")
    with held(accelerator, folder), guarded(ADVICE):
        train(config, args, clock, folder, accelerator, dtype)


def train(config, args, clock, folder, accelerator, dtype):
    """Trains until --steps or --minutes are over or the validation is flat, from the run's last state where there is one; leaves the averages' files.

    config: `TrainConfig`; args: where its digits and its results are, and what is seen on the way; clock: `Clock` of --minutes."""
    device, state_file = accelerator.device, folder / "state.pt"
    refuse_others(state_file, [folder / "model.safetensors"])
    with one_first(accelerator):
        data, val = (load_digits(args.data, split) for split in ("train", "val"))
    begun = args.init and fingerprint(args.init)
    settings = settings_of(args, FREE_TO_CHANGE, pictures=data_fingerprint(data.images, data.digit, data.domain), begun_from=begun)
    state = load_state(state_file, settings, NEEDED, None if args.minutes else config.steps, args.defaults) if state_file.exists() else None
    digits, held_out = on_device(data, device), on_device(val, device)
    diffusion = Diffusion(DiffusionConfig(config.schedule, config.prediction))
    clock.go_on(state, state_file)
    run = make_run(SIZES[config.size], config.ema, args, accelerator, state_file, settings, state, diffusion)
    first_line_of(accelerator, dtype, f"{len(data)} images from {args.data}, {config.size} UNet of {sum(p.numel() for p in run.net.parameters()) / 1e6:.2f} M "
                  "parameters" + (f", going on at step {run.step}," if run.step else ""), run)
    log = Log(accelerator, folder, "training P1", args, config.batch_size, run.step, run.history)
    steps_until = cumulative_density(diffusion, config, device)

    def came():  # what share of the training is done
        return clock.share() if args.minutes else run.step / config.steps

    last = came() >= 1 or is_flat(run.history, args.stop_when_flat)
    while not last:
        index, t, eps, drop = share(accelerator, *draw_batch(run.step, config, len(data), steps_until, device))
        seed_dropout(config.seed, run.step, accelerator.process_index)
        rate = config.lr * share_of_peak(run.step, came(), config)
        loss = diffusion.loss(run.model, *batch_of(digits, index), t, eps, drop, config.min_snr_gamma).mean()
        optimizer_step(accelerator, run.model, run.optimizer, loss, rate)
        run.step += 1
        run.ema.update(run.net, run.step)
        run.recent.append(accelerator.reduce(loss.detach(), "mean"))
        log.bar.update()
        over = came() >= 1
        validating = due(args.validate_every, run.step, over)
        if validating or due(LOG_EVERY, run.step, over):
            add_row(run, log, rate, validate(run.ema.network(), diffusion, held_out, accelerator, config.batch_size) if validating else {})
        last = over or is_flat(run.history, args.stop_when_flat)
        if accelerator.is_main_process and due(args.sample_every, run.step, last):
            save_image(sample_grid(run.ema.network(), diffusion, device, config.seed), folder / f"samples_{run.step:06d}.png")
        if due(args.save_every, run.step, last):
            save_run(run, accelerator, clock)
            if accelerator.is_main_process:
                export(run, config, args, diffusion, folder, len(data))
    log.close()
    refuse_nothing(run, args)
    if accelerator.is_main_process:
        path = export(run, config, args, diffusion, folder, len(data))  # also where nothing was left to learn: the run may have been killed before it
        print(f"wrote {path} after {run.step} steps\nnext: {script_line('p1_infer.sh', 'out/p1', '--checkpoint', path)}")


def on_device(data, device):
    """The tensors (images uint8 [N, 28, 28, 3], digit int [N], domain int [N]) of what `load_digits` has read."""
    return [torch.from_numpy(array).to(device) for array in (data.images, data.digit, data.domain)]


def batch_of(digits, index):
    """(x0 float32 [B, 3, 28, 28] in [-1, 1], digit int [B], domain int [B]) of those in the places `index`, int [B], of `on_device`."""
    images, digit, domain = (part[index] for part in digits)
    return to_model(images), digit, domain


@dataclass
class Run:
    """A training on its way: what its steps change, and how it is known when it goes on."""

    state_file: Path
    settings: dict  # what decides it
    net: UNet
    model: torch.nn.Module  # the network too, wrapped for this machine and its processes: what the loss calls
    optimizer: torch.optim.Optimizer
    ema: "PowerEMA"  # the averages of its weights, which are the result
    step: int = 0
    history: list = field(default_factory=list)  # the rows of log.csv
    recent: list = field(default_factory=list)  # losses of the steps since the last row, float32 []


def make_run(shape, lengths, args, accelerator, state_file, settings, state, diffusion):
    """A `Run` from its beginning, or from where its state is. shape: `UNetConfig`; lengths: of `PowerEMA`; args: --seed, --init and the optimiser's;
    diffusion: what the weights of --init must have been trained for."""
    torch.manual_seed(args.seed)
    net = UNet(shape)
    if args.init and not state:
        weights, facts = load_weights(args.init)
        if (theirs := facts.get("diffusion")) != (ours := asdict(diffusion.config)):
            raise UserError(f"{args.init} was trained for another diffusion ({theirs}) than this training ({ours})")
        fill(net, weights, args.init).requires_grad_(True)
    net.to(device=accelerator.device, memory_format=torch.channels_last)
    ema = PowerEMA(net, lengths)
    model, optimizer = accelerator.prepare(net, make_optimizer(net, args.lr, args.weight_decay, (0.9, 0.99), edges=("stem", "head")))
    run = Run(state_file, settings, net, model, optimizer, ema)
    if state:
        run.step, run.history, run.recent = restore(state_file, state, accelerator, model=net, ema=ema, optimizer=optimizer)
    if args.compile:
        compile_blocks(net, Block)
    return run


def save_run(run, accelerator, clock, **more):
    """Writes what `make_run` and a `Clock` go on from, if it is finite; more: what else the state keeps."""
    refuse_nonfinite(run.step, [*run.recent, *run.net.parameters(), *run.ema.averages[0].values()], run.state_file)
    save_state(run.state_file, accelerator, run.settings, run.step, run.history, run.recent, model=run.net, ema=run.ema, optimizer=run.optimizer,
               seconds=clock.gone(), prepared=clock.prepared, allowed=clock.seconds, **more)


def refuse_nothing(run, args):
    """A `UserError` where the clock was over before the first step: what would be written has learned nothing."""
    if run.step == 0:
        raise UserError(f"--minutes {args.minutes:g} were over before the first step; give it more, or --steps")


def validate(net, diffusion, held_out, accelerator, batch_size):
    """The losses, of `Validation`, of an averaged network on held-out digits (of `on_device`), none of which is without its condition."""
    all_told = torch.zeros(1, dtype=torch.bool, device=accelerator.device)

    def loss(index, t, eps):
        return diffusion.loss(net, *batch_of(held_out, index), t, eps, all_told)

    validation = Validation(len(held_out[0]), (3, IMAGE_SIZE, IMAGE_SIZE), num_timesteps=diffusion.config.num_timesteps)
    return validation(loss, accelerator, batch_size)


def export(run, config, args, diffusion, folder, num_images):
    """Writes each average of the weights, in half precision: half the size, no measurable difference. Returns the path of the first, the result."""
    for number, length in enumerate(config.ema):
        facts = run.settings | {"init": args.init and args.init.name, "ema": length, "steps": run.step, "images": num_images,
                                "of_steps": None if args.minutes else args.steps}
        save_model(folder / ("model.safetensors" if number == 0 else f"model_ema{length:g}.safetensors"), run.ema.network(number).half(), diffusion, facts)
    return folder / "model.safetensors"


class Clock:
    """How far a training of so many minutes has come: `share()` in 0..1 and beyond, of what was left at `begin()`, a hundredth at least."""

    def __init__(self, minutes):
        self.started, self.before, self.prepared, self.seconds = time.perf_counter(), 0.0, 0.0, 60 * (minutes or math.inf)

    def go_on(self, state, path):
        """Counts on from where a state, which is at `path`, was saved; from nothing where it is None."""
        with fitting(path):
            self.before, self.prepared, allowed = (float((state or {}).get(name, 0)) for name in ("seconds", "prepared", "allowed"))
        if self.before >= self.seconds != allowed:  # otherwise the run is over and this its command again
            raise UserError(f"--minutes {self.seconds / 60:g} are over: the training in {path} has taken {self.before / 60:.1f} so far; give it more")

    def begin(self):
        self.prepared = min(self.gone(), 0.99 * self.seconds)

    def gone(self):
        return self.before + time.perf_counter() - self.started

    def share(self):
        return (self.gone() - self.prepared) / (self.seconds - self.prepared)


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
    if not density.isfinite().all():
        raise UserError(f"--log-sigma {mean:g} {std:g} lies outside of the schedule's noise levels: no step would be trained")
    return density.cumsum(0).float().to(device)


class PowerEMA:
    """Averages of the weights with a power function for their memory (Karras et al. 2024, section 3.1): `length` is the average's width as a share of
    the training so far, whatever its number of steps, and the random start is forgotten by itself. Several lengths cost little; one is chosen afterwards."""

    def __init__(self, net, lengths):
        # the width of t^gamma on [0, 1] is ((gamma + 1) / (gamma + 2)^2 / (gamma + 3))^(1/2), eq. 27
        self.gammas = [np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max() for length in lengths]
        self.shape = net.config
        self.averages = [{name: tensor.detach().clone() for name, tensor in net.state_dict().items()} for _ in lengths]

    @torch.no_grad()
    def update(self, net, step):
        """To be called after each step, counted from 1."""
        current = list(net.state_dict().values())
        for gamma, average in zip(self.gammas, self.averages):
            torch._foreach_lerp_(list(average.values()), current, 1 - (1 - 1 / step) ** (gamma + 1))

    def network(self, number=0):
        """A network of its own with one of the averages, in eval mode, where they are."""
        net = UNet(self.shape)
        net.load_state_dict(self.averages[number])
        return net.to(device=next(iter(self.averages[number].values())).device, memory_format=torch.channels_last).eval()

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
    last = finish(dpmpp_2m(Guided(net.eval(), diffusion, digit, domain, w), noise, trailing(diffusion.alpha_bar, num_steps)))
    grid = to_uint8(last.x).reshape(len(DOMAINS), NUM_DIGITS, IMAGE_SIZE, IMAGE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return ImageOps.scale(Image.fromarray(grid.reshape(len(DOMAINS) * IMAGE_SIZE, NUM_DIGITS * IMAGE_SIZE, 3)), 3, Image.Resampling.NEAREST)


if __name__ == "__main__":
    run(main)
