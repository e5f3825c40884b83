"""Makes the miniature of the course's later challenge: prompts.json and concept_image/, of two subjects, drawn as no word tells, and a style.

    python -m p3_clip_textual_inversion.miniature.challenge runs/emoji.npz      # of `miniature.drawings render`; writes hw2_data/mini/challenge

As in the challenge, the pictures have no captions, and are JPEG, or PNG with a transparent ground.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ..concepts import CHALLENGE_IMAGES
from ..files import MINI, UserError, run, writable_folder, write_json
from ..pictures import save_image
from ..provenance import HelpFormatter
from .world import GROUNDS, SIDE, SILHOUETTES, Drawings, words

SUBJECTS = {"cat2": ("cat-face", "twemoji", (2, 0, 1)), "dog6": ("dog-face", "fluent-emoji-flat", (1, 2, 0))}  # which channel red, green and blue become
STYLE = "silhouette"
OF_STYLE = ("star", "hot-dog", "turtle", "bus", "tulip")  # what is seen in it
# {name} stands for a concept; only words of the world's captions, which have no full stop: one at the end spoils the miniature's pictures
ENTRIES = (
    "A {cat2} above a {dog6}", "A {dog6} next to a {cat2}",
    "A drawing of a {cat2} in the style of {silhouette}", "A {cat2} next to a {dog6} in the style of {silhouette}")


def example(rgba, rng, ground=None):
    """A PIL picture of a drawing uint8 [64, 64, 4], a little smaller and shifted, on a ground (r, g, b), or on a transparent one."""
    side = round(SIDE * rng.uniform(0.8, 1))
    left, top = rng.integers(0, SIDE - side + 1, 2).tolist()
    picture = Image.new("RGBA", (SIDE, SIDE), (*ground, 255) if ground else (0, 0, 0, 0))
    picture.alpha_composite(Image.fromarray(rgba).resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return picture.convert("RGB") if ground else picture


def drawing(drawings, name, style, channels=(0, 1, 2)):
    row = drawings.rows[drawings.names.index(name), drawings.styles.index(style)]
    return np.ascontiguousarray(drawings.pixels[row].numpy().transpose(1, 2, 0)[..., [*channels, 3]])


def make(drawings, output, seed):
    """Writes the challenge into a folder."""
    shown = {name: [drawing(drawings, *look)] * 5 for name, look in SUBJECTS.items()} | {STYLE: [drawing(drawings, name, SILHOUETTES) for name in OF_STYLE]}
    for number, (name, rows) in enumerate(shown.items()):
        rng, folder = np.random.default_rng([seed, number]), writable_folder(output / CHALLENGE_IMAGES / name)
        grounds = rng.permutation(list(GROUNDS.values())).tolist()
        for i, rgba in enumerate(rows):
            cut_out = i > 2
            save_image(example(rgba, rng, None if cut_out else grounds[i]), folder / f"{i:02d}.{'png' if cut_out else 'jpg'}")
    called = {name: words(look[0]) for name, look in SUBJECTS.items()} | {STYLE: words(SILHOUETTES)}
    entries = {}
    for number, prompt in enumerate(ENTRIES):
        names = [name for name in called if f"{{{name}}}" in prompt]
        tokens = {name: f"<{name}>" for name in names}
        entries[str(number)] = {"src_image": names, "token_name": list(tokens.values()), "prompt": prompt.format(**tokens),
                                "prompt_4_clip_eval": prompt.format(**called)}
    write_json(output / "prompts.json", entries)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("path", type=Path, metavar="NPZ", help="file of drawings")
    parser.add_argument("--output", type=Path, default=MINI / "challenge", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of the examples")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")
    make(Drawings(args.path), writable_folder(args.output), args.seed)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
