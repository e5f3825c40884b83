"""Makes the pictures of P3's miniature. Needs npm and `scripts/requirements-dev.txt`.

    python -m p3_clip_textual_inversion.make_mini drawings runs/emoji.npz     # all drawings, to train on
    python -m p3_clip_textual_inversion.make_mini pictures runs/emoji.npz     # hw2_data/mini/clip_zeroshot and textual_inversion

The drawings are seven emoji sets under free licences (hw2_data/mini/README.md lists them), under the same English names.
"""

import argparse
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .data import CAPTIONS
from .files import MINI, UserError, atomic_path, run, writable_folder, write_json
from .pictures import save_image, to_uint8
from .world import COLOURS, KEPT_OUT, SIDE, SILHOUETTES, SUBJECTS, UNSEEN_STYLE, Drawings, Scene, compose, drawing_of, words

PACKAGES = {"twemoji": "1.2.5", "noto": "1.2.9", "openmoji": "1.2.29", "fluent-emoji-flat": "1.2.6", "fluent-emoji-high-contrast": "1.2.6",
            "emojione": "1.2.3", "noto-v1": "1.2.5"}
SUBJECT, OTHER = (KEPT_OUT[0], "twemoji"), (KEPT_OUT[1], "fluent-emoji-flat")
CONCEPTS = (  # (number, src_image, token_name, prompts): a subject and a style, as in the course, and another subject
    ("0", "bird", "<new1>", ("a drawing of a {} on a blue background", "a {} next to a red apple")),
    # a tractor and an automobile: the two subjects in which CLIP can see such a style at all (mini_scores.style_subjects)
    ("1", words(SILHOUETTES), "<new2>", ("a drawing of a tractor in the style of {}", "a drawing of an automobile in the style of {}")),
    ("2", "bear", "<new3>", ("a drawing of a {} on a green background", "a {} next to a banana")),
)
NUM_CLASSES, PER_CLASS, PER_CONCEPT = 50, 10, 5


def read_sets(folder):
    """{style: {name: SVG}} from the npm packages, and the names worth learning: those that most sets have, without skin tones, flags, symbols."""
    sets = {}
    for style in PACKAGES:
        package = folder / "node_modules" / "@iconify-json" / style
        content = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        icons = dict(content["icons"])
        icons |= {name: icons[alias["parent"]] for name, alias in content.get("aliases", {}).items() if set(alias) == {"parent"} and alias["parent"] in icons}
        sets[style] = {name: f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icon.get("width", content.get("width", 16))} '
                             f'{icon.get("height", content.get("height", 16))}">{icon["body"].replace("currentColor", "#000")}</svg>'
                       for name, icon in icons.items()}
    categories = json.loads((folder / "node_modules/@iconify-json/twemoji/metadata.json").read_text(encoding="utf-8"))["categories"]
    counts = Counter(name for icons in sets.values() for name in icons)
    variants = re.compile("skin-tone|oclock|thirty|beard|(^|-)(man|woman|men|women)-")
    names = {name for category, members in categories.items() if category not in ("Flags", "Symbols") for name in members}
    return sets, sorted(name for name in names if counts[name] >= 5 and not variants.search(name))


def render_drawings(path):
    """Renders every set at 64x64 (from three times that, averaged) into one .npz: pixels RGBA, names, styles."""
    import resvg_py

    with tempfile.TemporaryDirectory() as temporary:
        packages = [f"@iconify-json/{style}@{version}" for style, version in PACKAGES.items()]
        try:
            subprocess.run(["npm", "install", "--silent", "--no-save", "--prefix", temporary, *packages], cwd=temporary, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"npm failed: {(getattr(error, 'stderr', b'') or str(error).encode()).decode().strip().splitlines()[-1]}") from None
        sets, names = read_sets(Path(temporary))
    jobs = [(name, style) for name in names for style in PACKAGES if name in sets[style]]
    pixels = np.zeros((len(jobs), SIDE, SIDE, 4), np.uint8)
    for row, (name, style) in enumerate(tqdm(jobs, desc="drawing", unit="drawing")):
        png = bytes(resvg_py.svg_to_bytes(svg_string=sets[style][name], width=3 * SIDE, height=3 * SIDE))
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        large = Image.new("RGBA", (3 * SIDE, 3 * SIDE))
        large.paste(picture, ((large.width - picture.width) // 2, (large.height - picture.height) // 2))
        pixels[row] = np.asarray(large.resize((SIDE, SIDE), Image.Resampling.BOX))
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, pixels=pixels, names=np.array([name for name, _ in jobs]), styles=np.array([style for _, style in jobs]))
    print(f"wrote {len(jobs)} drawings of {len(names)} subjects to {path}")


def make_pictures(drawings, output, seed):
    """clip_zeroshot/ and textual_inversion/ in the course's layout."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    colours = list(COLOURS)
    classes = sorted(rng.permutation(SUBJECTS)[:NUM_CLASSES].tolist())
    zero_shot = output / "clip_zeroshot"
    writable_folder(zero_shot / "val")
    scenes = [Scene((drawings.table[name][UNSEEN_STYLE],), str(rng.choice(colours)), "") for name in classes for _ in range(PER_CLASS)]
    for i, picture in enumerate(to_uint8(compose(drawings, scenes, generator))):
        save_image(Image.fromarray(picture), zero_shot / "val" / f"{i // PER_CLASS}_{i % PER_CLASS}.png")
    write_json(zero_shot / "id2label.json", {str(i): words(name) for i, name in enumerate(classes)})
    concepts = {"0": [SUBJECT] * PER_CONCEPT, "1": [(name, SILHOUETTES) for name in rng.permutation(SUBJECTS)[:PER_CONCEPT]], "2": [OTHER] * PER_CONCEPT,
                "0+1": [(SUBJECT[0], SILHOUETTES)] * 3 * 8}  # the last: the subject in the style, which only the score of both is set by
    for number, concept in concepts.items():
        folder = writable_folder(output / "textual_inversion" / number)
        scenes = [Scene((drawings.table[name][style],), colour, caption_of(number, name, colour))
                  for (name, style), colour in zip(concept, np.resize(rng.permutation(colours), len(concept)))]
        for i, picture in enumerate(to_uint8(compose(drawings, scenes, generator, shift=0.05, scales=(0.85, 1.0)))):
            save_image(Image.fromarray(picture), folder / f"{i:02d}.png")
        lines = [json.dumps({"file_name": f"{i:02d}.png", "text": scene.caption}) for i, scene in enumerate(scenes) if scene.caption]
        if lines:
            with atomic_path(folder / CAPTIONS) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    entries = {number: {"src_image": source, "token_name": token, "prompt": [prompt.format(token) for prompt in prompts],
                        "prompt_4_clip_eval": [prompt.format(source) for prompt in prompts]} for number, source, token, prompts in CONCEPTS}
    write_json(output / "textual_inversion" / "input.json", {number: entries[number] for number in "01"})
    write_json(output / "textual_inversion" / "several.json", entries)


def caption_of(number, name, colour):
    """What a picture of a concept shows besides the concept: its ground, for a style also its subject."""
    token = next((token for key, _, token, _ in CONCEPTS if key == number), None)
    subject = f"a {token}" if name in KEPT_OUT else drawing_of(name)
    return token and f"a drawing of {subject} on a {colour} background" + ("" if name in KEPT_OUT else f" in the style of {token}")


def main():
    parser = argparse.ArgumentParser(description="Makes the pictures of P3's miniature.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawings = commands.add_parser("drawings", help="render the emoji sets", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    drawings.add_argument("path", type=Path, metavar="NPZ", help="file to write")
    pictures = commands.add_parser("pictures", help="make hw2_data/mini's pictures of P3", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    pictures.add_argument("path", type=Path, metavar="NPZ", help="file that `drawings` wrote")
    pictures.add_argument("--output", type=Path, default=MINI)
    pictures.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "pictures" and args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")
    if args.command == "drawings":
        writable_folder(args.path.parent)
        render_drawings(args.path)
    else:
        make_pictures(Drawings(args.path), writable_folder(args.output), args.seed)
        print(f"wrote {args.output / 'clip_zeroshot'} and {args.output / 'textual_inversion'}")


if __name__ == "__main__":
    run(main)
