"""Draws a face again from what its PNG tells: settings, seed, network and noise, in the batch that it was drawn in.

    python -m p2_ddim.redraw OUT/00.png
"""

from pathlib import Path

from .data import MINI_DATA
from .device import DTYPES, use_tf32
from .files import UserError, fingerprint, note, run
from .inference import DrawConfig, generate, read_states, to_pictures
from .model import load_unet
from .provenance import redraw


def draw(made, name, batch, where, args):
    """uint8 [H, W, 3] of the picture `name`, drawn with the others of its batch."""
    settings = dict(made["settings"])
    dtype, seed = DTYPES[settings.pop("dtype")], settings.pop("seed")
    use_tf32(settings.pop("tf32", False))
    config, folder = DrawConfig(**settings), Path(args.noises or where.get("noises", "."))
    checkpoint = Path(args.checkpoint or where.get("checkpoint", "UNet.pt"))
    bundled = MINI_DATA / "UNet.pt"
    if not checkpoint.is_file() and not args.checkpoint and fingerprint(bundled) == made["made_of"]["model"]:
        checkpoint = bundled  # moved with the project
    if not checkpoint.is_file():
        raise UserError(f"the network {checkpoint} is no longer there; give it by --checkpoint")
    if fingerprint(checkpoint) != made["made_of"]["model"]:
        note(f"{checkpoint} is another network than the one that drew {args.picture}")
    noises, ranges = read_states(folder, config)
    for other, own in batch.items():
        path = folder / f"{other.removesuffix('.png')}.pt"
        if path.stem not in noises:
            raise UserError(f"the noise {path} is no longer there")
        if fingerprint(path) != own["noise"]:
            note(f"{path} is another noise than the one of {other}")
    noises = {stem: noises[stem] for stem in (other.removesuffix(".png") for other in batch)}
    stem = name.removesuffix(".png")
    faces = dict(generate(load_unet(checkpoint, args.device), noises, config, len(noises), seed, dtype))
    return to_pictures(faces[stem][None], *ranges.get(stem, (0, 255)))[0]


def main():
    redraw("p2_ddim.inference", draw, __doc__.splitlines()[0],
           {"--noises": {"type": Path, "default": None, "help": "the folder of noises, where it no longer lies where it was (default: as recorded)"}})


if __name__ == "__main__":
    run(main)
