"""Makes the miniature's benchmark of subjects, hw2_data/mini/dreambench, in the layouts of DreamBench and, for its pairs, of CustomConcept101.

    python -m p3_clip_textual_inversion.miniature.bench runs/emoji.npz      # the drawings that `drawings render` made

Ten subjects, five of them live: known kinds with looks that no one word tells, two of them of one kind. Four pictures each, which differ in ground, place and
size; ten prompts for each class of subjects: four grounds, three things beside it, three styles. No model had a say in the choice.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import MINI, run, writable_folder, write_json, write_whole
from ..pictures import save_image, to_uint8
from ..provenance import HelpFormatter
from .drawings import Look
from .painting import compose
from .world import GROUNDS, Drawings, make_scenes, words

LOOKS = tuple(Look(name, f"<{name}>", words(kind), (), kind, style, hue, pattern) for name, kind, style, hue, pattern in (
    ("cat", "cat-face", "fluent-emoji-flat", "green", "dotted"), ("dog", "dog-face", "openmoji", "purple", "striped"),
    ("dog2", "dog-face", "noto-v1", "blue", "checked"), ("owl", "owl", "emojione", "pink", "striped"), ("turtle", "turtle", "twemoji", "orange", "dotted"),
    ("bus", "bus", "twemoji", "purple", "checked"), ("guitar", "guitar", "noto-v1", "teal", "dotted"), ("key", "key", "openmoji", "pink", "striped"),
    ("rocket", "rocket", "emojione", "green", "checked"), ("umbrella", "umbrella", "fluent-emoji-flat", "orange", "striped")))
LIVE = ("cat", "dog", "dog2", "owl", "turtle")
EVERYWHERE = tuple(f"a {{0}} {{1}} on a {ground} background" for ground in ("blue", "pink", "yellow", "green"))
STYLED = tuple(f"a drawing of a {{0}} {{1}} in the style of {style}" for style in ("ink", "blueprint", "pastel"))
PROMPTS = {"Object": (*EVERYWHERE, *(f"a {{0}} {{1}} next to a {other}" for other in ("red apple", "fox", "tulip")), *STYLED),
           "Live Subject": (*EVERYWHERE, *(f"a {{0}} {{1}} next to a {other}" for other in ("red apple", "house", "banana")), *STYLED)}
PAIRS = (("cat", "dog"), ("dog2", "turtle"), ("owl", "cat"), ("bus", "rocket"), ("guitar", "key"), ("dog", "guitar"), ("turtle", "umbrella"), ("owl", "bus"),
         ("rocket", "cat"), ("key", "dog2"))
PAIR_PROMPTS = ("a {0} next to a {1}", "a {0} next to a {1} on a blue background")
PALETTE = 64  # colours of a picture: a third of the bytes, next to no difference


def write_subjects(drawings, folder, seed):
    """A folder of four pictures for each subject: no captions, as the field's benchmarks have none."""
    for look in LOOKS:
        grounds = np.random.default_rng([seed, *look.number.encode()]).permutation(list(GROUNDS)).tolist()
        own = {"names": [look.name], "style": look.style, "hues": [look.hue], "patterns": [look.pattern]}
        entries = [own | more | {"ground": ground} for more, ground in zip(({}, {"place": "at the top"}, {"sizes": ["large"]}, {"sizes": ["small"]}), grounds)]
        pictures = to_uint8(compose(drawings, make_scenes(drawings, entries), torch.Generator().manual_seed(seed), shift=0.05))
        for i, picture in enumerate(pictures):
            save_image(Image.fromarray(picture).quantize(PALETTE, dither=Image.Dither.NONE), writable_folder(folder / look.number) / f"{i:02d}.png")


def write_lists(folder):
    """prompts_and_classes.txt as DreamBench has it, with a third column that tells which subjects are live; dataset_multiconcept.json and its prompts as
    CustomConcept101 has them."""
    lines = ["Classes", "", "subject_name,class,kind", *(f"{look.number},{look.start},{'live' if look.number in LIVE else 'object'}" for look in LOOKS), "",
             "Prompts"]
    for kind, prompts in PROMPTS.items():
        lines += ["", f"{kind} Prompts", "", "prompt_list = [", *(f"'{prompt}'.format(unique_token, class_token)," for prompt in prompts), "]"]
    write_whole(folder / "prompts_and_classes.txt", "\n".join(lines) + "\n")
    starts = {look.number: look.start for look in LOOKS}
    pairs = [[*({"instance_prompt": f"a drawing of a <new{i + 1}> {starts[name]}", "class_prompt": starts[name], "instance_data_dir": f"./{name}"}
                for i, name in enumerate(pair)), {"prompt_filename_compose": "prompts/pair.txt"}] for pair in PAIRS]
    write_json(folder / "dataset_multiconcept.json", pairs)
    write_whole(writable_folder(folder / "prompts") / "pair.txt", "\n".join(PAIR_PROMPTS) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Makes the miniature's benchmark of subjects.", formatter_class=HelpFormatter)
    parser.add_argument("path", type=Path, metavar="NPZ", help="file that `drawings render` wrote")
    parser.add_argument("--output", type=Path, default=MINI / "dreambench", help="folder to write into")
    args = parser.parse_args()
    folder = writable_folder(args.output)
    write_subjects(Drawings(args.path), folder, seed=0)
    write_lists(folder)
    print(f"wrote {len(LOOKS)} subjects, {len(PROMPTS['Object'])} prompts each, and {len(PAIRS)} pairs to {folder}")


if __name__ == "__main__":
    run(main)
