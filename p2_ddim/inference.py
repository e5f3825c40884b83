"""Draws one face per noise file: OUT/{noise name}.png.

    python -m p2_ddim.inference NOISE_DIR OUT UNet.pt

**The convention**, by which the course's references were made and which is the default (`DrawConfig`, --quality exact): DDIM, 50 steps at t = 981, 961, ...,
21, 1, the network and alpha_bar both at that same t; the step before t = 1 goes to index 0, so that the last alpha_bar is alpha_bar[0] = 0.9999 and not 1; the
predicted x0 is clamped to [-1, 1], eps is not computed again afterwards; eta 0; each picture stretched from its own minimum and maximum.
"""

import argparse
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .data import read_noise_pairs, read_noises
from .device import DTYPES, by_the_first, compile_blocks, describe, in_batches, meet, name_of, pick_device, pick_dtype, processes, progress, use_tf32
from .diffusion import NUM_TIMESTEPS, Denoiser, make_alpha_bar
from .estimate import announce
from .files import UserError, fingerprint, lock, note, run, writable_file
from .inversion import belm, exact_batch
from .model import Block, load_unet
from .pictures import save_image
from .provenance import HelpFormatter, Made, claim, script_line
from .samplers import SAMPLERS, SPACINGS, ImageNoise, by_name


@dataclass(frozen=True)
class DrawConfig:
    """sampler: one of `SAMPLERS`, or "belm" (inversion.py). num_steps: of it. spacing: which (`SPACINGS`). last_alpha_bar: the alpha_bar after the last step,
    "first" (alpha_bar[0], the convention) or "one". clip: clamp x0 to [-1, 1]; belm never does. eta, of ddim: 0 is deterministic, 1 as noisy as DDPM."""

    sampler: str = "ddim"
    num_steps: int = 50
    spacing: str = "leading"
    last_alpha_bar: str = "first"
    clip: bool = True
    eta: float = 0.0

    def __post_init__(self):
        for what, value, choices in (("sampler", self.sampler, (*SAMPLERS, "belm")), ("spacing", self.spacing, SPACINGS),
                                     ("last alpha_bar", self.last_alpha_bar, ("first", "one"))):
            if value not in choices:
                raise ValueError(f"unknown {what} {value!r}; there are {', '.join(choices)}")
        if not 1 <= self.num_steps <= NUM_TIMESTEPS:
            raise ValueError(f"steps must be between 1 and {NUM_TIMESTEPS}, not {self.num_steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is for ddim, and {self.sampler} does without; leave it at 0")
        self.steps()

    def steps(self):
        """The `Steps` at which the network is asked."""
        alpha_bar = make_alpha_bar()
        return SPACINGS[self.spacing](alpha_bar, self.num_steps, end=float(alpha_bar[0]) if self.last_alpha_bar == "first" else 1.0)

    @property
    def evaluations(self):
        """How often the network is asked for a picture."""
        return 2 * self.num_steps - 1 if self.sampler == "heun" else self.num_steps

    def states(self, unet, x, noise=None, dtype=torch.float32):
        """The sampler's states from x [B, 3, H, W], or for belm also from pairs of states [B, 2, 3, H, W]. noise(): fresh, where eta is above 0."""
        model = Denoiser(unet, self.clip and self.sampler != "belm", dtype)
        if self.sampler == "belm":
            first, second = x.unbind(1) if x.ndim == 5 else (x, None)
            return belm(model, first, self.steps(), second=second)
        return by_name(self.sampler, self.eta)(model, x, self.steps(), noise=noise)


QUALITIES = {  # `DrawConfig`s by name, chosen from the table that p2_ddim.sweep makes (report/results/p2_samplers.json)
    "exact": DrawConfig(),  # the grader's convention
    "good": DrawConfig("unipc", 20, "trailing", "one"),
    "draft": DrawConfig("unipc", 10, "trailing", "one"),
}


def check_size(config, shape):
    """Refuses an image size [3, H, W] that the network cannot halve as often as it has levels."""
    factor = 2 ** (len(config.widths) - 1)
    if 0 in shape or shape[1] % factor or shape[2] % factor:
        raise UserError(f"{shape[1]}x{shape[2]} is no size for this network: it needs sides that are multiples of {factor}")


def to_pictures(x, low=0.0, high=255.0):
    """float [B, 3, H, W] -> uint8 numpy [B, H, W, 3]: each image stretched from its own minimum and maximum, over all channels together, to low..high."""
    least, most = (getattr(x.double() if x.dtype == torch.float64 else x.float(), f)(dim=(1, 2, 3), keepdim=True) for f in ("amin", "amax"))
    shares = (x.to(least.dtype) - least) / (most - least).clamp(min=1e-12)
    return (shares * (high - low) + low + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def generate(unet, noises, config, batch_size, seed=0, dtype=torch.float32, shown=True, share=(0, 1)):
    """noises: {name: [3, H, W]}, or pairs [2, 3, H, W] for belm. Yields (name, final x [3, H, W] on the CPU). A batch that memory cannot hold is halved.
    share: (rank, processes) of this one, which draws its part of the batches."""
    device = next(unet.parameters()).device
    if config.sampler == "belm":
        batch_size = exact_batch(batch_size, dtype)

    def draw(batch):
        x = torch.stack([noises[name] for name in batch]).to(device)
        noise = ImageNoise(seed, batch, x.shape[-3:], device)
        for state in config.states(unet, x, noise, dtype):
            bar.update(len(batch))
            x = state.x
        return x.cpu()

    with progress(total=len(noises) * config.num_steps // share[1], unit="step", desc="drawing faces", disable=not shown) as bar:
        for batch, x in in_batches(list(noises), batch_size, draw, "face", "--dtype bf16 or --device cpu", share):
            yield from zip(batch, x)


def add_arguments(parser):
    """The flags that inference and figures share."""
    parser.add_argument("--quality", choices=list(QUALITIES), default="exact",
                        help="; ".join(f"{name}: {c.sampler}, {c.num_steps} steps" for name, c in QUALITIES.items()) + "; exact is the grader's convention")
    parser.add_argument("--sampler", choices=[*SAMPLERS, "belm"], default=None, help="in place of the quality's; belm undoes p2_invert (default: by --quality)")
    parser.add_argument("--steps", type=int, default=None, help="steps of the sampler, a network call each (heun: two) (default: by --quality)")
    parser.add_argument("--spacing", choices=list(SPACINGS), default=None,
                        help="which steps; leading is the course's: 981, ..., 21, 1 (default: by --quality; of another --sampler trailing, but ddim's)")
    parser.add_argument("--last-alpha-bar", choices=["first", "one"], default=None,
                        help="alpha_bar after the last step: alpha_bar[0] or 1 (default: by --quality; of another --sampler one, but ddim's)")
    parser.add_argument("--no-clip", action="store_true", help="do not clamp the predicted x0 to [-1, 1]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fresh noise, where the sampler draws any")
    parser.add_argument("--batch-size", type=int, default=None, help="images at a time; they differ by rounding alone (default: 2 on a CPU, 10 on a GPU)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the network; auto: bf16 or fp16 where it is fast")
    parser.add_argument("--tf32", action="store_true", help="let a GPU compute fp32 with ten bits of mantissa: faster, no longer exact")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: slow to start, faster afterwards")


def draw_settings(args, eta=0.0):
    """(DrawConfig, device, dtype, batch size) of parsed arguments, checked."""
    config = QUALITIES[args.quality]
    given = {"num_steps": args.steps, "spacing": args.spacing, "last_alpha_bar": args.last_alpha_bar, "clip": not args.no_clip, "eta": eta}
    if args.sampler not in (None, config.sampler):
        config = DrawConfig(args.sampler, DrawConfig.num_steps if args.sampler == "belm" else config.num_steps)
        if args.sampler != "ddim":
            config = replace(config, spacing="trailing", last_alpha_bar="one")
    try:
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(f"--{error}") from None  # each begins with what it is about
    if config.num_steps > NUM_TIMESTEPS // 4 and (first := config.steps().t[0]) < 0.8 * NUM_TIMESTEPS:
        note(f"--steps {config.num_steps} of the {config.spacing} spacing begin at t = {first}, where noise alone is not expected; "
             f"--spacing trailing always begins at {NUM_TIMESTEPS - 1}")
    device = pick_device(args.device)
    use_tf32(args.tf32)
    batch_size = args.batch_size if args.batch_size is not None else 2 if device.type == "cpu" else 10
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    return config, device, pick_dtype(args.dtype, device), batch_size


def main():
    parser = argparse.ArgumentParser(description="Draws one face per noise file.", formatter_class=HelpFormatter)
    parser.add_argument("noise", type=Path, metavar="NOISE_DIR", help="folder with *.pt noise tensors, or with the files of p2_invert.sh")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write {noise name}.png into")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the network's state dict, UNet.pt")
    parser.add_argument("--eta", type=float, default=DrawConfig.eta, help="of ddim, fresh noise at each step: 0 none (deterministic), 1 as much as DDPM")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what OUT holds of other settings, models or seeds, which is refused "
                        "otherwise; of these what is not drawn now is removed")
    add_arguments(parser)
    args = parser.parse_args()
    started = time.perf_counter()
    settings = draw_settings(args, args.eta)
    noises, ranges = read_states(args.noise, settings[0], (args.checkpoint, name_of(settings[2])))
    for name in noises:
        writable_file(args.output / f"{name}.png")  # .png is longer than .pt
    with processes() as share, lock(args.output) if share[0] == 0 else nullcontext():
        draw(args, *settings, noises, ranges, share, started)


def read_states(folder, config, by=None):
    """({name: noise, or for belm a pair of states}, {name: range of the picture}) of a folder. by: (checkpoint, number format) that will draw them; a note
    tells where pairs were inverted with others."""
    if config.sampler != "belm":
        return read_noises(folder), {}
    noises, ranges = read_noise_pairs(folder, config.num_steps, by and {"network": fingerprint(by[0]), "dtype": by[1]})
    if noises and (config.spacing, config.last_alpha_bar) != ("trailing", "one"):
        raise UserError(f"{folder} was inverted at the trailing steps, to an alpha_bar of one; leave --spacing and --last-alpha-bar out")
    return noises or read_noises(folder), ranges


def draw(args, config, device, dtype, batch_size, noises, ranges, share, started):
    """The grader's files, or this process's share of them."""
    if args.batch_size is None:
        batch_size = min(batch_size, math.ceil(len(noises) / share[1]))  # a batch for each process
    unet = load_unet(args.checkpoint, device)
    if args.compile:
        compile_blocks(unet, Block)
    check_size(unet.config, next(iter(noises.values())).shape[-3:])
    print(f"drawing {len(noises)} faces with {args.checkpoint}, {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, {config.sampler} in "
          f"{config.num_steps} steps, on {f'{share[1]} x ' if share[1] > 1 else ''}{describe(device, dtype)}", flush=True)
    format_of = {"dtype": name_of(dtype)} | ({"tf32": True} if args.tf32 and device.type == "cuda" else {})
    made = Made("p2_ddim.inference", asdict(config) | {"seed": args.seed} | format_of, {"model": fingerprint(args.checkpoint)})
    own = {f"{name}.png": {"noise": fingerprint(args.noise / f"{name}.pt")} for name in noises}
    where = {"device": describe(device, dtype), "checkpoint": str(args.checkpoint.resolve()), "noises": str(args.noise.resolve())}
    by_the_first(share, lambda: claim(args.output, made, own, batch_size, where, args.overwrite, again=True))
    if share == (0, 1):
        first = torch.stack([noise.reshape(-1, *noise.shape[-3:])[0] for noise in list(noises.values())[:batch_size]]).to(device)
        announce([(config.evaluations * math.ceil(len(noises) / batch_size), lambda: Denoiser(unet, dtype=dtype).eps(first, NUM_TIMESTEPS - 1))],
                 unet, device, started)
    for name, x in generate(unet, noises, config, batch_size, args.seed, dtype, share[0] == 0, share):
        if not np.isfinite(x.sum().item()):
            raise UserError(f"the image of {name}.pt is not finite; try --dtype fp32")
        save_image(to_pictures(x[None], *ranges.get(name, (0, 255)))[0], args.output / f"{name}.png", made.with_own(own[f"{name}.png"]).as_json())
    meet(share)
    print(f"wrote {len(noises)} images to {args.output} in {time.perf_counter() - started:.1f} s\n"
          f"next: {script_line('p2_grade.sh', args.output, truth if (truth := args.noise.parent / 'GT').is_dir() else 'GT')}"
          + ("" if config == DrawConfig() else "  # the references are of --quality exact"))


if __name__ == "__main__":
    run(main)
