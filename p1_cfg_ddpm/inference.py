"""Draws the grader's images: OUT/{mnistm,svhn}/{digit}_{001..050}.png, 28x28 RGB.

    python -m p1_cfg_ddpm.inference OUT
"""

import argparse
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .device import DTYPES, describe, name_of, pick_device, pick_dtype
from .diffusion import SAMPLERS, Diffusion, DiffusionConfig, Guided, ImageNoise, logsnr_timesteps, sample, spaced_timesteps
from .estimate import announce
from .files import UserError, atomic_path, fingerprint, lock, run, writable_folder
from .model import BUNDLED, DOMAINS, IMAGE_SIZE, NUM_DIGITS, load_model
from .pictures import save_image, to_uint8
from .provenance import Made, claim

CHECKPOINT = BUNDLED / "small.safetensors"
INSTALLED = BUNDLED / "installed.safetensors"  # what scripts/install.sh has put there draws unasked, in the bundled one's place


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. The defaults draw the grader's files in about 20 seconds on 2 cores; `scripts/p1_benchmark.sh` has the others."""

    sampler: str = "dpmpp_2m"
    steps: int = 6
    spacing: str = "logsnr"  # of the steps: even in the log of the signal-to-noise ratio, or "trailing", even in t
    guidance_weight: float = 4.0  # w of eps = (1+w) eps_cond - w eps_uncond; 0 is no guidance
    guidance_interval: tuple = (0.0, 1.0)  # guide only at these noise levels, t/T
    eta: float = 0.0  # of ddim; 0 is deterministic
    seed: int = 2

    def check(self):
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--guidance-interval must be two numbers with 0 <= low <= high <= 1, not {low} {high}")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"--steps must be between 1 and 1000, not {self.steps}")
        if self.spacing == "logsnr" and self.steps > 500:
            raise UserError(f"--spacing logsnr is for up to 500 steps, not {self.steps}; use --spacing trailing")
        if not math.isfinite(self.guidance_weight):
            raise UserError(f"--guidance-weight must be a finite number, not {self.guidance_weight}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta must be between 0 and 1, not {self.eta}")


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    domain: str
    digit: int
    index: int  # from 1

    @property
    def name(self):
        return f"{self.domain}/{self.digit}_{self.index:03d}"


def all_jobs(images_per_digit=50, domains=DOMAINS, digits=range(NUM_DIGITS)):
    return [Job(domain, digit, index) for domain in domains for digit in digits for index in range(1, images_per_digit + 1)]


def load_generator(checkpoint, device, dtype):
    """Returns (UNet in eval mode, Diffusion) of a checkpoint."""
    model, metadata = load_model(checkpoint, device, dtype)
    try:
        return model, Diffusion(DiffusionConfig(**metadata["diffusion"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of this project (its diffusion settings: {error})") from None


def default_checkpoint():
    """The installed checkpoint or, without one, the bundled one."""
    return INSTALLED if INSTALLED.is_file() else CHECKPOINT


def install(path):
    """Copies a checkpoint of a training to where drawing finds it unasked; returns that path. One that was there before is kept in the folder `replaced`."""
    load_generator(path, torch.device("cpu"), torch.float32)  # or says what is wrong with it
    if INSTALLED.is_file() and INSTALLED.read_bytes() != Path(path).read_bytes():
        replaced = INSTALLED.parent / "replaced"
        replaced.mkdir(exist_ok=True)
        shutil.copyfile(INSTALLED, next(p for i in range(10**6) if not (p := replaced / f"installed_{i}.safetensors").exists()))
    with atomic_path(INSTALLED) as temporary:
        shutil.copyfile(path, temporary)
    return INSTALLED


def states(model, diffusion, jobs, sampling, guide=None):
    """Yields a `State` per step for a batch of jobs; the last one's `x` is the finished images, float [B, 3, 28, 28]."""
    device = next(model.parameters()).device
    digit = torch.tensor([job.digit for job in jobs], device=device)
    domain = torch.tensor([DOMAINS.index(job.domain) for job in jobs], device=device)
    noise = ImageNoise(sampling.seed, [job.name for job in jobs], (3, IMAGE_SIZE, IMAGE_SIZE), device)
    predict = Guided(model, diffusion, digit, domain, sampling.guidance_weight, sampling.guidance_interval, guide)
    if sampling.spacing == "logsnr":
        timesteps = logsnr_timesteps(sampling.steps, diffusion.alpha_bar)
    else:
        timesteps = spaced_timesteps(sampling.steps, diffusion.config.num_timesteps)
    yield from sample(sampling.sampler, predict, diffusion, noise(), timesteps, sampling.eta, noise)


@torch.inference_mode()
def generate(model, diffusion, jobs, sampling, batch_size, progress=True, guide=None):
    """Yields (job, uint8 image [28, 28, 3]) for every job, in batches. A batch that a GPU has no memory for is halved."""
    with tqdm(total=len(jobs) * sampling.steps, unit="step", desc="drawing digits", unit_scale=1 / sampling.steps, disable=not progress,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]") as bar:
        start = 0
        while start < len(jobs):
            batch = jobs[start:start + batch_size]
            try:
                for state in states(model, diffusion, batch, sampling, guide):
                    bar.update(len(batch))
                    last = state
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise UserError("the GPU has no memory for even one image; try --device cpu") from None
                batch_size //= 2
                torch.cuda.empty_cache()
                continue
            if not last.x.isfinite().all():
                raise UserError(f"an image among {batch[0].name} to {batch[-1].name} is not finite; try --dtype fp32 or a smaller --guidance-weight")
            yield from zip(batch, to_uint8(last.x))
            start += len(batch)


def add_arguments(parser):
    """The flags that inference and figures share."""
    defaults = Sampling()
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint(), help="a model.safetensors of p1_cfg_ddpm.train")
    parser.add_argument("--sampler", choices=SAMPLERS, default=defaults.sampler, help="the update rule")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps of the sampler")
    parser.add_argument("--spacing", choices=["logsnr", "trailing"], default=defaults.spacing,
                        help="which steps: even in the log of the signal-to-noise ratio (best for few), or even in t")
    parser.add_argument("--guidance-weight", type=float, default=defaults.guidance_weight, help="w of (1+w)*eps_cond - w*eps_uncond; 0: no guidance")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=defaults.guidance_interval,
                        help="guide only at noise levels LOW <= t/1000 <= HIGH")
    parser.add_argument("--eta", type=float, default=defaults.eta, help="fresh noise in ddim: 0 none, 1 as much as ddpm")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of all images")
    parser.add_argument("--batch-size", type=int, default=None, help="images at a time; the images do not depend on it (default: 100 on a CPU, 1000 on a GPU)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the network; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def settings_of(args):
    """The `Sampling`, device, dtype and batch size that parsed arguments ask for, checked."""
    sampling = Sampling(args.sampler, args.steps, args.spacing, args.guidance_weight, tuple(args.guidance_interval), args.eta, args.seed)
    sampling.check()
    device = pick_device(args.device)
    batch_size = args.batch_size if args.batch_size is not None else 100 if device.type == "cpu" else 1000
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    return sampling, device, pick_dtype(args.dtype, device), batch_size


def main():
    parser = argparse.ArgumentParser(description="Draws digits with the guided diffusion model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write {mnistm,svhn}/{digit}_{001..}.png into")
    add_arguments(parser)
    parser.add_argument("--images-per-digit", type=int, default=50, help="per domain")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS, help="only these")
    parser.add_argument("--digits", nargs="+", type=int, choices=range(NUM_DIGITS), default=range(NUM_DIGITS), metavar="D", help="only these (0..9)")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what OUT holds of other settings, models or seeds, which is refused otherwise")
    args = parser.parse_args()
    sampling, device, dtype, batch_size = settings_of(args)
    if not 1 <= args.images_per_digit <= 999:
        raise UserError(f"--images-per-digit must be between 1 and 999, not {args.images_per_digit}")
    for domain in args.domains:
        writable_folder(args.output / domain)
    with lock(args.output):
        draw(args, sampling, device, dtype, batch_size)


def draw(args, sampling, device, dtype, batch_size):
    """The grader's files."""
    started = time.perf_counter()
    model, diffusion = load_generator(args.checkpoint, device, dtype)
    print(f"drawing with {args.checkpoint}", flush=True)
    jobs = all_jobs(args.images_per_digit, args.domains, args.digits)
    made = Made("p1_cfg_ddpm.inference", asdict(sampling) | {"dtype": name_of(dtype)}, {"model": fingerprint(args.checkpoint)})
    claim(args.output, made, {f"{job.name}.png": {} for job in jobs}, batch_size,
          {"device": describe(device, dtype), "checkpoint": str(args.checkpoint.resolve())}, args.overwrite)
    calls = sampling.steps * math.ceil(len(jobs) / batch_size)
    announce([(calls, lambda: next(states(model, diffusion, jobs[:batch_size], sampling)))], model, device, started, sampling.steps)
    for job, image in generate(model, diffusion, jobs, sampling, batch_size):
        save_image(image, args.output / f"{job.name}.png", made.as_json())
    settings = ", ".join(f"{name} {value}" for name, value in asdict(sampling).items())
    print(f"wrote {len(jobs)} images to {args.output} in {time.perf_counter() - started:.1f} s ({settings})\n"
          f"next: bash scripts/p1_grade.sh {args.output}")


if __name__ == "__main__":
    run(main)
