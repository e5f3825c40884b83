"""A teacher's paths from noise to image, from which a student learns (distill.py), drawn once and kept in files."""

import math

import torch

from .device import progress
from .diffusion import Guided
from .files import UserError, atomic_path
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS
from .samplers import SAMPLERS, steps_at
from .tensors import is_plain, read_tensors

LEAPS = {1: (), 2: (0.8,), 3: (2.0, 0.4)}  # sigma / alpha of the student's times after the first; 0.8: as the second step of Song and Dhariwal 2024
CLEAN = -1  # the time after the last
CHUNK, AT_ONCE = 2000, {"cpu": 100, "cuda": 500}  # paths per file; at a time: a CPU's cache holds few (half as long again otherwise), 11 GB as many of base


def student_times(timesteps, alpha_bar, leaps):
    """Which of the teacher's timesteps the student is called at: the first, and those nearest to the noise levels of `LEAPS`."""
    log_sigma = 0.5 * ((1 - alpha_bar) / alpha_bar).log()[timesteps]
    return [timesteps[0], *(timesteps[int((log_sigma - math.log(level)).abs().argmin())] for level in LEAPS[leaps])]


@torch.inference_mode()
def draw_paths(teacher, guide, diffusion, config, timesteps, points, count, max_weight, generator):
    """`count` of the teacher's paths from noise to image: {"x": fp16 [len(points) + 1, N, 3, H, W], where they are at the times `points`, and the images;
    "digit", "domain": int [N]; "w": float [N], for every second one that of `config`, for the others any up to `max_weight`}."""
    device = next(teacher.parameters()).device
    digit = torch.randint(NUM_DIGITS, (count,), generator=generator).to(device)
    domain = torch.randint(len(DOMAINS), (count,), generator=generator).to(device)
    w = torch.rand(count, generator=generator) * max_weight
    w[::2] = config.guidance_weight  # so too among the last, by which the student is watched
    x, w = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device), w.to(device)
    kept = []
    for some in torch.arange(count, device=device).split(AT_ONCE.get(device.type, count)):
        guided = Guided(teacher, diffusion, digit[some], domain[some], w[some], config.guidance_interval, guide, parallel=config.guidance_parallel)
        states = SAMPLERS[config.sampler](guided, x[some], steps_at(diffusion.alpha_bar, timesteps))
        kept.append(torch.stack([x[some], *(s.x for s, after in zip(states, [*timesteps[1:], CLEAN]) if after in points or after == CLEAN)]))
    return {"x": torch.cat(kept, dim=1).half(), "digit": digit, "domain": domain, "w": w}


def chosen(paths, some):
    """Those of paths, as `draw_paths` has them, that the slice `some` names."""
    return {name: part[:, some] if name == "x" else part[some] for name, part in paths.items()}


def all_paths(folder, draw, count, seed, points, times, device, teacher=""):
    """`count` paths, from the files of `folder` or drawn by `draw(count, generator)` into it, with a generator for each file. Of the times `points`, at
    which the files have them, those at the student's `times` and the images are returned, on the device; as `draw_paths`. teacher: what tells it."""
    rows, chunks = [points.index(t) for t in times] + [len(points)], []
    for number in progress(range(-(-count // CHUNK)), desc="the teacher draws", unit="file"):
        path, size = folder / f"paths_{seed}_{number:04d}.pt", min(CHUNK, count - number * CHUNK)
        if not path.exists():
            chunk = draw(size, torch.Generator().manual_seed(seed * 1_000_003 + number))
            with atomic_path(path) as temporary:
                torch.save({name: tensor.cpu() for name, tensor in chunk.items()} | {"points": points, "teacher": teacher}, temporary)
        else:
            chunk = read_tensors(path, "file of the teacher's paths")
            fits = isinstance(chunk, dict) and all(is_plain(chunk.get(part)) for part in ("x", "digit", "domain", "w"))
            if not fits or chunk.get("points") != points or chunk.get("teacher", teacher) != teacher or len(chunk["w"]) != size:
                raise UserError(f"{path} has paths of another teacher, of other settings or of another number; choose another --paths-in")
        chunks.append({"x": chunk["x"][rows].to(device), **{name: chunk[name].to(device) for name in ("digit", "domain", "w")}})
    return {name: torch.cat([chunk[name] for chunk in chunks], dim=1 if name == "x" else 0) for name in chunks[0]}
