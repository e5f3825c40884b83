"""Draws the grader's images: OUT/{mnistm,svhn}/{digit}_{001..050}.png, 28x28 RGB.

    python -m p1_cfg_ddpm.inference OUT
"""

import argparse
import math
import os
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .device import DTYPES, by_the_first, describe, in_batches, meet, name_of, pick_device, pick_dtype, processes, progress
from .diffusion import Diffusion, DiffusionConfig, Distilled, Guided
from .estimate import announce
from .files import UserError, atomic_path, check_flags, fingerprint, lock, run, writable_folder
from .model import BUNDLED, DOMAINS, IMAGE_SIZE, NUM_DIGITS, load_model
from .pictures import save_image, to_uint8
from .provenance import Made, claim, script_line
from .reading import doubt
from .samplers import SAMPLERS, SPACINGS, ImageNoise, by_name, ddim, finish, steps_at

CHECKPOINT = BUNDLED / "small.safetensors"
STUDENT_CHECKPOINT = BUNDLED / "student.safetensors"  # of p1_cfg_ddpm.distill: one evaluation an image
INSTALLED = BUNDLED / "installed.safetensors"  # what scripts/install.sh has put there draws unasked, in the bundled one's place
OFFERED = tuple(name for name in SAMPLERS if name != "ipndm")  # its extrapolated eps leaves coloured spots in the long last leap of few guided steps
NOT_FOR_STUDENTS = ("sampler", "num_steps", "spacing", "guidance_interval", "guidance_parallel", "eta", "tries")  # what a student has no choice of
TRIES = {"cpu": 1, "cuda": 4}  # unasked: it triples the work, minutes on a slow CPU
WEIGHT_OF_TRIES = 3.0  # w with them: they find what less guidance leaves misread, and less guidance leaves more variety


@dataclass(frozen=True)
class DrawConfig:
    """How images are drawn. The defaults are those of a network that is no student; `scripts/p1_benchmark.sh` has the others."""

    sampler: str = "dpmpp_2m"
    num_steps: int = 6
    spacing: str = "logsnr"  # of the steps: even in the log of the signal-to-noise ratio, or "trailing", even in t
    guidance_weight: float = 4.0  # w of eps = (1+w) eps_cond - w eps_uncond; 0 is no guidance
    guidance_interval: tuple = (0.0, 1.0)  # guide only at these noise levels, t/T
    guidance_parallel: tuple = (1.0, 0.25)  # by domain: the share that is kept of what is parallel to the predicted image's deviation from its mean
    eta: float = 0.0  # of ddim; 0 is deterministic
    tries: int = 1  # at an image, while the network is not sure to see its digit in it (reading.py); 1 does not look
    seed: int = 0

    def __post_init__(self):
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--guidance-interval must be two numbers with 0 <= low <= high <= 1, not {low} {high}")
        if len(self.guidance_parallel) != len(DOMAINS) or not all(0 <= share <= 1 for share in self.guidance_parallel):
            raise UserError(f"--guidance-parallel must be {len(DOMAINS)} numbers from 0 to 1, for {' and '.join(DOMAINS)}, not "
                            + " ".join(map(str, self.guidance_parallel)))
        if not 1 <= self.num_steps <= 1000:
            raise UserError(f"--steps must be between 1 and 1000, not {self.num_steps}")
        if self.spacing == "logsnr" and self.num_steps > 500:
            raise UserError(f"--spacing logsnr is for up to 500 steps, not {self.num_steps}; use --spacing trailing")
        if not math.isfinite(self.guidance_weight):
            raise UserError(f"--guidance-weight must be a finite number, not {self.guidance_weight}")
        if not 1 <= self.tries <= 100:
            raise UserError(f"--tries must be between 1 and 100, not {self.tries}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta must be between 0 and 1, not {self.eta}")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"--eta is for --sampler ddim, and {self.sampler} does without; leave it out")


DEFAULT = DrawConfig()
# its steps are its own, its weight an input, at most the one that it has learned
STUDENT = DrawConfig(sampler="ddim", guidance_weight=5.0, guidance_parallel=(1.0, 1.0))


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
        # a student has learned guidance weights up to the first, half of its paths the second
        taught = metadata["training"] if model.config.times else {}
        model.max_weight = float(taught["max_weight"]) if taught else None
        model.most_learned = min(float(taught.get("guidance_weight", STUDENT.guidance_weight)), model.max_weight) if taught else None
        return model, Diffusion(DiffusionConfig(**metadata["diffusion"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of this project (its settings: {error})") from None


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


def steps_of(config, diffusion):
    """The `Steps` that a `DrawConfig` takes."""
    return SPACINGS[config.spacing](diffusion.alpha_bar, config.num_steps)


def conditions(jobs, device):
    """(digit, domain) of jobs, int [B] each."""
    return tuple(torch.tensor(told, device=device) for told in zip(*((job.digit, DOMAINS.index(job.domain)) for job in jobs)))


def names_of(jobs, attempt=1):
    """What the noise of each image is seeded by."""
    return [job.name if attempt == 1 else f"{job.name}, try {attempt}" for job in jobs]


def states(model, diffusion, jobs, config, guide=None, attempt=1):
    """Yields a `State` per step for a batch of jobs; the last one's `x` is the finished images, float [B, 3, 28, 28]."""
    device = next(model.parameters()).device
    digit, domain = conditions(jobs, device)
    noise = ImageNoise(config.seed, names_of(jobs, attempt), (3, IMAGE_SIZE, IMAGE_SIZE), device)
    if model.config.times:
        student = Distilled(model, diffusion, digit, domain, config.guidance_weight)
        yield from ddim(student, noise(), steps_at(diffusion.alpha_bar, model.config.times))
        return
    guided = Guided(model, diffusion, digit, domain, config.guidance_weight, config.guidance_interval, guide, parallel=config.guidance_parallel)
    yield from by_name(config.sampler, config.eta)(guided, noise(), steps_of(config, diffusion), noise=noise)


def draw_again(x, model, diffusion, jobs, config, guide=None):
    """Draws those of the finished images x [B, 3, 28, 28] again, from another noise, in which the network is not sure to see their digit, up to config.tries
    in all. Returns (x with that try of each which it doubts least, which try it is, int [B])."""
    digit, domain = conditions(jobs, x.device)
    doubts, kept = doubt(model, diffusion, x.clamp(-1, 1), digit, domain, config.seed, [f"{name}, read" for name in names_of(jobs)]), torch.ones_like(digit)
    for attempt in range(2, config.tries + 1):
        again = (doubts > 0).nonzero()[:, 0]
        if not len(again):
            break
        some = [jobs[i] for i in again]
        new = finish(states(model, diffusion, some, config, guide, attempt)).x
        found = doubt(model, diffusion, new.clamp(-1, 1), digit[again], domain[again], config.seed, [f"{name}, read" for name in names_of(some, attempt)])
        better = found < doubts[again]
        x[again[better]], doubts[again[better]], kept[again[better]] = new[better], found[better], attempt
    return x, kept


@torch.inference_mode()
def generate(model, diffusion, jobs, config, batch_size, shown=True, guide=None, share=(0, 1)):
    """Yields (job, uint8 image [28, 28, 3]) for every job, in batches. A batch that memory cannot hold is halved.

    shown: with a bar; share: (rank, processes) of this one."""
    with progress(total=len(jobs) * config.num_steps // share[1], unit="step", desc="drawing digits", disable=not shown) as bar:
        def draw(batch):
            for state in states(model, diffusion, batch, config, guide):
                bar.update(len(batch))
                last = state
            return last.x if config.tries == 1 else draw_again(last.x, model, diffusion, batch, config, guide)[0]

        for batch, x in in_batches(jobs, batch_size, draw, "image", "--device cpu", share):
            if not x.isfinite().all():
                raise UserError(f"an image among {batch[0].name} to {batch[-1].name} is not finite; try --dtype fp32 or a smaller --guidance-weight")
            yield from zip(batch, to_uint8(x))


def add_arguments(parser):
    """The flags that inference and figures share. Where none is given, `load_with_settings` takes the checkpoint's own."""
    parser.add_argument("--checkpoint", type=Path, default=None, help="a model.safetensors of p1_cfg_ddpm.train or p1_cfg_ddpm.distill "
                        f"(default: the installed one, or the bundled {CHECKPOINT.name})")
    parser.add_argument("--student", action="store_true", help=f"draw with the bundled {STUDENT_CHECKPOINT.name}: one evaluation an image")
    parser.add_argument("--guidance-weight", type=float, default=None, help="w of (1+w)*eps_cond - w*eps_uncond; 0: no guidance "
                        f"(default: {STUDENT.guidance_weight:g} for the bundled student, for others what they learned most; {DEFAULT.guidance_weight:g} for "
                        f"other networks, {WEIGHT_OF_TRIES:g} where digits are drawn again)")
    parser.add_argument("--sampler", choices=OFFERED, default=None, help="the update rule; heun asks the network twice a step; "
                        f"not for students, as the next five (default: {DEFAULT.sampler})")
    parser.add_argument("--steps", type=int, default=None, dest="num_steps", help=f"steps of the sampler (default: {DEFAULT.num_steps})")
    parser.add_argument("--spacing", choices=["logsnr", "trailing"], default=None, help="which steps: even in the log of the signal-to-noise ratio, best "
                        f"for few, or even in t (default: {DEFAULT.spacing})")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=None,
                        help="guide only at noise levels LOW <= t/1000 <= HIGH (default: {:g} {:g})".format(*DEFAULT.guidance_interval))
    parser.add_argument("--guidance-parallel", type=float, nargs=len(DOMAINS), metavar=tuple(map(str.upper, DOMAINS)), default=None,
                        help="of the guidance that only makes the predicted image's contrast stronger, the share that is kept, by domain: 1 is plain "
                        "guidance; chosen on the bundled network (default: {:g} {:g})".format(*DEFAULT.guidance_parallel))
    parser.add_argument("--eta", type=float, default=None, help="fresh noise in ddim: 0 none, 1 as much as ddpm (default: 0)")
    parser.add_argument("--seed", type=int, default=DEFAULT.seed, help=f"seed of all images (default: {DEFAULT.seed})")
    parser.add_argument("--batch-size", type=int, default=None, help="images at a time; they differ by rounding alone, or where that "
                        "decides which try is kept (default: 100 on a CPU, 1000 on a GPU)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format; auto: bf16 or fp16 where it is fast (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or, for the second GPU, cuda:1 (default: auto)")


def add_tries(parser):
    """The flag of the commands that draw the grader's files, or show them."""
    parser.add_argument("--tries", type=int, default=None, help="draw an image up to so many times, while the network does not clearly see its digit in it, "
                        "and keep the try that it doubts least: about three times the work, fewer misread digits. 1: never; not for students "
                        "(default: {cuda} on a GPU, {cpu} on a CPU and without guidance)".format(**TRIES))


def load_with_settings(args):
    """(UNet, Diffusion, `DrawConfig`, batch size, checkpoint) that parsed arguments ask for, checked."""
    if args.student and args.checkpoint:
        raise UserError("--student is the bundled one; give it or --checkpoint, not both")
    given = {name: value for name in (*NOT_FOR_STUDENTS, "guidance_weight") if (value := getattr(args, name, None)) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    replace(DEFAULT, **given)  # which checks them
    device = pick_device(args.device)
    batch_size = args.batch_size if args.batch_size is not None else 100 if device.type == "cpu" else 1000
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    checkpoint = args.checkpoint or (STUDENT_CHECKPOINT if args.student else default_checkpoint())
    model, diffusion = load_generator(checkpoint, device, pick_dtype(args.dtype, device))
    if not model.config.times:
        plain = given.get("guidance_weight", 1) <= 0  # without guidance, no tries unless they are asked for
        tries = given.get("tries", TRIES.get(device.type, 1) if hasattr(args, "tries") and not plain else DEFAULT.tries)
        unasked = {"tries": tries, "guidance_weight": WEIGHT_OF_TRIES if tries > 1 else DEFAULT.guidance_weight}
        return model, diffusion, replace(DEFAULT, **unasked | given, seed=args.seed), batch_size, checkpoint
    for name in NOT_FOR_STUDENTS:
        if name in given:
            flag = name.removeprefix("num_").replace("_", "-")
            raise UserError(f"--{flag} is not for {checkpoint.name}, a student that draws in {len(model.config.times)} steps of its own; "
                            "only other networks have it")
    weight = STUDENT.guidance_weight if fingerprint(checkpoint) == fingerprint(STUDENT_CHECKPOINT) else model.most_learned
    config = replace(STUDENT, **{"guidance_weight": weight, **given}, num_steps=len(model.config.times), seed=args.seed)
    if not 0 <= config.guidance_weight <= model.max_weight:
        raise UserError(f"--guidance-weight of {checkpoint.name} must be between 0 and {model.max_weight:g}, which it has learned, "
                        f"not {config.guidance_weight:g}")
    return model, diffusion, config, batch_size, checkpoint


def main():
    parser = argparse.ArgumentParser(description="Draws digits with the guided diffusion model, or the student of it.")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write {mnistm,svhn}/{digit}_{001..}.png into")
    add_arguments(parser)
    add_tries(parser)
    parser.add_argument("--images-per-digit", type=int, default=50, help="per domain (default: 50)")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS, help="only these")
    parser.add_argument("--digits", nargs="+", type=int, choices=range(NUM_DIGITS), default=range(NUM_DIGITS), metavar="D", help="only these (0..9)")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what OUT holds of other settings, models or seeds, which is refused "
                        "otherwise; of these what is not drawn now is removed")
    args = parser.parse_args()
    check_flags(args, ("images_per_digit",), lambda value: 1 <= value <= 999, "between 1 and 999")
    started = time.perf_counter()
    with processes() as share:
        loaded = load_with_settings(args)
        if any(os.path.isdir(args.output / domain / "data") for domain in args.domains):
            raise UserError(f"{args.output} is a folder of training images; choose another to write into")
        for domain in args.domains:
            writable_folder(args.output / domain)
        with lock(args.output) if share[0] == 0 else nullcontext():
            draw(args, *loaded, share, started)


def draw(args, model, diffusion, config, batch_size, checkpoint, share, started):
    """The grader's files, or this process's share of them."""
    parameter, jobs = next(model.parameters()), all_jobs(args.images_per_digit, args.domains, args.digits)
    if args.batch_size is None:
        batch_size = min(batch_size, math.ceil(len(jobs) / share[1]))  # a batch for each process
    device = describe(parameter.device, parameter.dtype)
    made = Made("p1_cfg_ddpm.inference", asdict(config) | {"dtype": name_of(parameter.dtype)}, {"model": fingerprint(checkpoint)})
    where = {"device": device, "checkpoint": str(checkpoint.resolve())}
    print(f"drawing with {checkpoint} on {device}", flush=True)
    by_the_first(share, lambda: claim(args.output, made, {f"{job.name}.png": {} for job in jobs}, batch_size, where, args.overwrite, again=True))
    if share == (0, 1) and not model.config.times:
        calls = config.num_steps * math.ceil(len(jobs) / batch_size)
        first = jobs[:batch_size]
        parts = [(calls, lambda: next(states(model, diffusion, first, config)))]
        if config.tries > 1:
            x = torch.zeros(len(first), 3, IMAGE_SIZE, IMAGE_SIZE, device=parameter.device)
            parts.append((calls / config.num_steps, lambda: doubt(model, diffusion, x, *conditions(first, x.device), config.seed, names_of(first))))
        announce(parts, model, parameter.device, started, config.num_steps if config.tries == 1 else None, "steps of the sampler")
    with ThreadPoolExecutor(1) as writer:  # PNGs are written while the network draws the next batch
        writing = deque()
        for job, image in generate(model, diffusion, jobs, config, batch_size, share[0] == 0, share=share):
            writing.append(writer.submit(save_image, image, args.output / f"{job.name}.png", made.as_json()))
            while writing and writing[0].done():
                writing.popleft().result()  # raises what went wrong
        for one in writing:
            one.result()
    meet(share)
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items() if not model.config.times or name not in NOT_FOR_STUDENTS)
    print(f"wrote {len(jobs)} images to {args.output} in {time.perf_counter() - started:.1f} s ({settings})\n"
          f"next: {script_line('p1_grade.sh', args.output)}")


if __name__ == "__main__":
    run(main)
