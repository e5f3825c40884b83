"""Makes the drawings and the concepts of P3's miniature. Needs npm and `scripts/requirements-dev.txt`.

    python -m p3_clip_textual_inversion.miniature.drawings render runs/emoji.npz      # all drawings, to train on
    python -m p3_clip_textual_inversion.miniature.drawings concepts runs/emoji.npz    # hw2_data/mini/textual_inversion

The drawings are seven emoji sets under free licences (hw2_data/mini/README.md lists them), under the same English names.
"""

import argparse
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data import CAPTIONS
from ..files import MINI, UserError, atomic_path, run, writable_folder, write_json
from ..pictures import save_image, to_uint8
from ..provenance import HelpFormatter
from .painting import compose
from .world import GROUNDS, KEPT_OUT, SIDE, SILHOUETTES, Drawings, captions, make_scenes, words

PACKAGES = {"twemoji": "1.2.5", "noto": "1.2.9", "openmoji": "1.2.29", "fluent-emoji-flat": "1.2.6", "fluent-emoji-high-contrast": "1.2.6",
            "emojione": "1.2.3", "noto-v1": "1.2.5"}
COMPANY = ("tulip", "bus", "banana", "key", "star")  # what stands beside a concept in its examples


@dataclass(frozen=True)
class Look:
    """A concept: a known kind of thing with looks that no one word tells, or, with a name of None, a style.

    number: its folder; start: the words that learning begins with; prompts: to draw, {} for the word."""
    number: str
    token: str
    start: str
    prompts: tuple
    name: str | None
    style: str
    hue: str | None = None
    pattern: str | None = None


CONCEPTS = (  # two subjects and a style, as in the course; the last is of a kind that no model has seen: what textual inversion cannot do
    Look("0", "<new1>", "dog face", ("a drawing of a {} on a blue background", "a {} next to a red apple"), "dog-face", "twemoji", "teal", "striped"),
    Look("1", "<new2>", words(SILHOUETTES), ("a drawing of a tractor in the style of {}", "a drawing of an automobile in the style of {}"), None, SILHOUETTES),
    Look("2", "<new3>", "owl", ("a drawing of a {} on a green background", "a {} next to a banana"), "owl", "fluent-emoji-flat", "purple", "dotted"),
    Look("penguin", "<new4>", "bird", ("a drawing of a {} on a blue background", "a {} next to a red apple"), KEPT_OUT[0], "twemoji"),
)
TO_LEARN, SEVERAL, UNKNOWN = CONCEPTS[:2], CONCEPTS[:3], CONCEPTS[3:]


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


def examples(look, rng, drawings):
    """([entry of world.make_scenes], [caption]) of a concept's five examples: place, size, ground and company differ, and the captions tell them, so that
    nothing of it is left for the word. Company stands above or below: learning also flips pictures."""
    grounds = rng.permutation(list(GROUNDS)).tolist()
    if look.name is None:
        names = rng.permutation([name for name in map(drawings.names.__getitem__, drawings.everyday) if name not in ("tractor", "automobile")])[:6].tolist()
        entries = [{"names": [name], "style": look.style, "ground": ground, "opening": True} for name, ground in zip(names[:4], grounds)]
        entries.append({"names": names[4:], "style": look.style, "ground": grounds[4], "relation": "above"})
        return entries, [f"{caption} in the style of {look.token}" for caption in captions(drawings, make_scenes(drawings, entries))]
    own, company = {"style": look.style, "hues": [look.hue], "patterns": [look.pattern]}, rng.permutation(COMPANY).tolist()
    entries = [own | {"names": [look.name], "opening": True}, own | {"names": [look.name], "place": "at the top"},
               own | {"names": [look.name], "sizes": ["large"]}, own | {"names": [look.name, company[0]], "relation": "above"},
               own | {"names": [company[1], look.name], "relation": "above", "hues": [None, look.hue], "patterns": [None, look.pattern]}]
    entries = [entry | {"ground": ground} for entry, ground in zip(entries, grounds)]
    told = " ".join(word for word in (look.pattern, look.hue, words(look.name)) if word)
    return entries, [re.sub(rf"\ban? {told}", f"a {look.token}", caption).replace(told, look.token)
                     for caption in captions(drawings, make_scenes(drawings, entries))]


def make_concepts(drawings, output, seed):
    """textual_inversion/ in the course's layout: a folder of examples with captions for each concept, and the lists that name them."""
    write_examples(drawings, CONCEPTS, output, seed)
    subject, style = CONCEPTS[:2]
    both = [{"names": [subject.name], "style": style.style, "patterns": [subject.pattern], "ground": list(GROUNDS)[i % len(GROUNDS)]} for i in range(24)]
    save_pictures(compose(drawings, make_scenes(drawings, both), torch.Generator().manual_seed(seed), shift=0.05), writable_folder(output / "0+1"))
    for name, looks in (("input", TO_LEARN), ("several", SEVERAL), ("unknown", UNKNOWN)):
        write_concepts(looks, output / f"{name}.json")


def write_examples(drawings, looks, output, seed):
    """A folder of five examples with captions for each concept."""
    for look in looks:
        rng, generator = np.random.default_rng([seed, *look.number.encode()]), torch.Generator().manual_seed(seed)
        folder = writable_folder(output / look.number)
        entries, texts = examples(look, rng, drawings)
        save_pictures(compose(drawings, make_scenes(drawings, entries), generator, shift=0.05), folder)
        with atomic_path(folder / CAPTIONS) as temporary:
            lines = [json.dumps({"file_name": f"{i:02d}.png", "text": text}) for i, text in enumerate(texts)]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_concepts(looks, path):
    """A list of concepts as in the course."""
    write_json(path, {look.number: {
        "src_image": look.start, "token_name": look.token, "prompt": [prompt.format(look.token) for prompt in look.prompts],
        "prompt_4_clip_eval": [prompt.format(look.start) for prompt in look.prompts]} for look in looks})


def save_pictures(pictures, folder):
    for i, picture in enumerate(to_uint8(pictures)):
        save_image(Image.fromarray(picture), folder / f"{i:02d}.png")


def main():
    parser = argparse.ArgumentParser(description="Makes the drawings and concepts of P3's miniature.", formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rendering = commands.add_parser("render", help="render the emoji sets", formatter_class=HelpFormatter)
    rendering.add_argument("path", type=Path, metavar="NPZ", help="file to write")
    concepts = commands.add_parser("concepts", help="make hw2_data/mini/textual_inversion", formatter_class=HelpFormatter)
    concepts.add_argument("path", type=Path, metavar="NPZ", help="file that `render` wrote")
    concepts.add_argument("--output", type=Path, default=MINI / "textual_inversion", help="folder to write into")
    concepts.add_argument("--seed", type=int, default=0, help="of the examples")
    args = parser.parse_args()
    if args.command == "concepts" and args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")
    if args.command == "render":
        writable_folder(args.path.parent)
        render_drawings(args.path)
    else:
        make_concepts(Drawings(args.path), writable_folder(args.output), args.seed)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
