"""Draws a digit again from what its PNG tells: settings, seed and model, in the batch that it was drawn in.

    python -m p1_cfg_ddpm.redraw OUT/mnistm/3_001.png
"""

from pathlib import Path

import torch

from .device import DTYPES
from .files import UserError, fingerprint, note, run
from .inference import CHECKPOINT, STUDENT_CHECKPOINT, DrawConfig, Job, default_checkpoint, generate, load_generator
from .model import DOMAINS
from .provenance import redraw


def job_of(name):
    """The `Job` of a picture's name, {domain}/{digit}_{index}.png."""
    domain, file = name.removesuffix(".png").rsplit("/", 1)
    digit, index = file.split("_")
    if domain not in DOMAINS:
        raise ValueError(name)
    return Job(domain, int(digit), int(index))


def draw(made, name, batch, where, args):
    """uint8 [28, 28, 3] of the picture `name`, drawn with the others of its batch."""
    if "/" not in name:  # without its folder's record: the folder still tells the domain
        name = f"{args.picture.resolve().parent.name}/{name}"
        batch = {name: {}}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in made["settings"].items()}
    dtype = DTYPES[settings.pop("dtype")]
    for setting, value in (("guidance_parallel", (1.0,) * len(DOMAINS)), ("tries", 1)):  # what older records do not name was not there
        settings.setdefault(setting, value)
    if settings["sampler"] != "ddim":
        settings["eta"] = 0.0  # older records may name one, which did nothing
    if "steps" in settings:  # as they called it
        settings["num_steps"] = settings.pop("steps")
    checkpoint = Path(args.checkpoint or where.get("checkpoint", default_checkpoint()))
    if not checkpoint.is_file() and not args.checkpoint:  # moved: the same one may be bundled
        checkpoint = next((own for own in (CHECKPOINT, STUDENT_CHECKPOINT, default_checkpoint()) if fingerprint(own) == made["made_of"]["model"]), checkpoint)
    if not checkpoint.is_file():
        raise UserError(f"the model {checkpoint} is no longer there; give it by --checkpoint")
    if fingerprint(checkpoint) != made["made_of"]["model"]:
        note(f"{checkpoint} is another model than the one that drew {args.picture}")
    model, diffusion = load_generator(checkpoint, args.device, dtype)
    jobs = [job_of(other) for other in batch]
    with torch.inference_mode():
        pictures = dict(zip(batch, (image for _, image in generate(model, diffusion, jobs, DrawConfig(**settings), len(jobs)))))
    return pictures[name]


def main():
    redraw("p1_cfg_ddpm.inference", draw, __doc__.splitlines()[0])


if __name__ == "__main__":
    run(main)
