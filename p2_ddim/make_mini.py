"""Makes the miniature of P2. Needs node, npm and `scripts/requirements-dev.txt`.

    python -m p2_ddim.make_mini faces runs/faces                  # drawn faces to train on
    python -m p2_ddim.make_mini miniature runs/p2/UNet.pt         # hw2_data/mini/face: noise, GT, UNet.pt

The faces are DiceBear's "personas" (by Draftbit, CC BY 4.0): skin, hair, eyes, mouth, beard, clothes and background vary independently. The
miniature's reference images are drawn by diffusers, with the same weights: an implementation that is not ours.
"""

import argparse
import io
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .data import MINI_DATA
from .files import UserError, atomic_path, check_flags, run, writable_folder
from .inference import to_pictures
from .model import load_unet
from .pictures import save_image
from .provenance import HelpFormatter
from .samplers import ImageNoise

PACKAGES = ["@dicebear/core@9.4.3", "@dicebear/personas@9.4.3"]
SIDE = 64
DRAW = """
import { createAvatar } from '@dicebear/core';
import * as personas from '@dicebear/personas';
import { createHash } from 'node:crypto';
const [first, count, seed] = process.argv.slice(2).map(Number);
const svgs = [];
for (let i = first; i < first + count; i++) svgs.push(createAvatar(personas, {
  seed: createHash('sha256').update(`${seed}/${i}`).digest('hex'),  // DiceBear's own hash draws faces alike from seeds alike
  scale: 135, translateY: 8, facialHairProbability: 20,
  backgroundColor: ['b6e3f4', 'ffd5dc', 'd1f4d9', 'f6e3b4', 'c0aede', 'ffffff'],
  mouth: ['smile', 'frown', 'surprise', 'bigSmile', 'smirk', 'lips'],
}).toString());
process.stdout.write(JSON.stringify(svgs));
"""


def draw_faces(folder, count, seed):
    """Writes count pictures 00000.png, ... of 64x64; a face depends on (seed, its number) alone."""
    import resvg_py

    with tempfile.TemporaryDirectory() as temporary:
        call(["npm", "install", "--silent", "--no-save", "--prefix", temporary, *PACKAGES], temporary)
        script = Path(temporary) / "draw.mjs"
        script.write_text(DRAW, encoding="utf-8")
        for first in tqdm(range(0, count, 500), desc="drawing faces", unit="500 faces"):
            svgs = json.loads(call(["node", script, str(first), str(min(500, count - first)), str(seed)], temporary))
            for number, svg in enumerate(svgs, start=first):
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=3 * SIDE, height=3 * SIDE))
                picture = Image.open(io.BytesIO(png)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
                save_image(picture, folder / f"{number:05d}.png")


def call(command, folder):
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{command[0]} failed: {(getattr(error, 'stderr', '') or str(error)).strip().splitlines()[-1]}") from None


def make_miniature(checkpoint, output, count, seed):
    """noise/00.pt ..., GT/00.png ... and UNet.pt in the course's layout."""
    from .reference import sample

    model = load_unet(checkpoint)
    for name in ("noise", "GT"):
        writable_folder(output / name)
    names = [f"{i:02d}" for i in range(count)]
    noise = ImageNoise(seed, [f"face/{name}" for name in names], (3, SIDE, SIDE))()
    for name, x, picture in zip(names, noise, to_pictures(sample(model, noise))):
        with atomic_path(output / "noise" / f"{name}.pt") as temporary:
            torch.save(x[None].clone(), temporary)
        save_image(Image.fromarray(np.ascontiguousarray(picture)), output / "GT" / f"{name}.png")
    if Path(checkpoint).resolve() != (output / "UNet.pt").resolve():
        with atomic_path(output / "UNet.pt") as temporary:
            shutil.copyfile(checkpoint, temporary)


def main():
    parser = argparse.ArgumentParser(description="Makes the miniature of P2.", formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    faces = commands.add_parser("faces", help="draw faces to train on", formatter_class=HelpFormatter)
    faces.add_argument("output", type=Path, metavar="OUT", help="folder to write 00000.png, ... into")
    faces.add_argument("--count", type=int, default=12000, help="faces")
    faces.add_argument("--seed", type=int, default=0, help="of the faces")
    miniature = commands.add_parser("miniature", help="make hw2_data/mini/face", formatter_class=HelpFormatter)
    miniature.add_argument("checkpoint", type=Path, metavar="CKPT", help="UNet.pt of p2_ddim.train")
    miniature.add_argument("--output", type=Path, default=MINI_DATA, help="folder to write into")
    miniature.add_argument("--count", type=int, default=10, help="noises and reference images")
    miniature.add_argument("--seed", type=int, default=0, help="of the noises")
    args = parser.parse_args()
    check_flags(args, ("count",), lambda value: value >= 1, "at least 1")
    writable_folder(args.output)
    if args.command == "faces":
        draw_faces(args.output, args.count, args.seed)
    else:
        make_miniature(args.checkpoint, args.output, args.count, args.seed)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
