"""Two or three subjects in one picture, each learned apart, over known words of the same kinds, by where they are told to be.

    bash scripts/p3_dreambench.sh                                        # learns the ten subjects of the miniature's benchmark, runs/dreambench/words
    python -m p3_clip_textual_inversion.miniature.together               # report/results/p3_together.json, report/figures/p3_together.png

Sets of subjects are drawn by seed. In each picture the place of each subject is cut out, and CLIP tells of learned words whose looks these are (`looks`: the
nearest examples, of all the subjects'), of known words which kind it is (`kinds`: of all their kinds). Where boxes are given, each has to be in its own; else
they may stand in any order in a row, in a column or in corners. Real pictures pasted together, and some in which one is another subject, are judged alike.
"""

import argparse
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..device import progress
from ..embedding import add_words, expand
from ..evaluate import add_judge_arguments, judge_of
from ..experiments.finders import in_company
from ..experiments.subjects import read_benchmark
from ..files import MINI, ROOT, check_flags, lock, run, writable_folder, write_json
from ..formats.words import gather
from ..inference import add_arguments, generate, load, settings_of
from ..measures import share
from ..model import MINI_SD
from ..pictures import read_pictures, save_image, sheet
from ..places import AUTO, strips
from ..provenance import HelpFormatter
from ..regions import plans_of

ATTENTION = "attention"
CORNERS = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))
NATURAL = "a {} next to a {}", "a {} next to a {} above a {}"  # as the miniature's captions tell two, and three in the CORNERS
WAYS = {  # name: (prompt of two, of three, boxes of two, of three); boxes: None without regions, places.AUTO, ATTENTION, or given
    "words": (*NATURAL, None, None),
    "boxes by the prompt": (NATURAL[0], "a {} next to a {} next to a {}", AUTO, AUTO),
    "boxes by attention": (*NATURAL, ATTENTION, ATTENTION),
    "boxes given": (*NATURAL, strips(2, 0)[::-1], CORNERS)}  # of two against the words: the first one on the right


def cut_out(pictures, boxes):
    """PIL squares of each picture, one a box, in turn: as large as fits the box and a twentieth more, around its middle."""
    squares = []
    for picture in pictures:
        for left, top, right, bottom in boxes:
            side = round((min(right - left, bottom - top) + 0.05) * picture.width)
            x, y = (min(max(round(middle * picture.width - side / 2), 0), picture.width - side) for middle in ((left + right) / 2, (top + bottom) / 2))
            squares.append(picture.crop((x, y, x + side, y + side)))
    return squares


def pasted(pictures, boxes):
    """A real picture of several: each as large as fits its box, on the first one's ground."""
    whole = Image.new("RGB", pictures[0].size, pictures[0].getpixel((0, 0)))
    for picture, (left, top, right, bottom) in zip(pictures, boxes):
        side = round(min(right - left, bottom - top) * whole.width)
        place = [round(middle * whole.width - side / 2) for middle in ((left + right) / 2, (top + bottom) / 2)]
        whole.paste(picture.resize((side, side), Image.Resampling.BOX), place)
    return whole


class Judge:
    """What CLIP takes squares for. subjects: of the benchmark; of_kinds, of_looks: the numbers of kinds, and of subjects."""

    def __init__(self, grader, subjects, examples, medium):
        self.grader, self.kinds = grader, list(dict.fromkeys(subject.noun for subject in subjects))
        self.kind_of = torch.tensor([self.kinds.index(subject.noun) for subject in subjects])
        self.texts = grader.of_texts([f"a {medium} of a {kind}" for kind in self.kinds])
        views = [in_company((own, other) for own in pictures for others in examples if others is not pictures for other in others[:2])[0]
                 for pictures in examples]  # at the size that is judged, beside whatever else
        features = [grader.of_pictures(pictures) for pictures in views]
        self.middle = torch.stack([own.mean(0) for own in features]).mean(0)
        self.examples = torch.stack([self.centred(own).mean(0) for own in features])

    def centred(self, features):
        """Without what all subjects have in common, which is most of what small pictures show."""
        return torch.nn.functional.normalize(features - self.middle, dim=1)

    def both(self, pictures, sets, boxes):
        """{"kinds", "looks": bool [N]}: whether all subjects of its set (numbers [N, n]) are in each picture, each in its box, or, where boxes are None,
        in any order in a row, in a column or, of three, in the corners."""
        count = sets.shape[1]
        places = [boxes] if boxes else [strips(count, 0), strips(count, 1), *([CORNERS] if count == 3 else [])]
        orders = [tuple(range(count))] if boxes else list(permutations(range(count)))
        found = {"kinds": torch.zeros(len(pictures), dtype=torch.bool), "looks": torch.zeros(len(pictures), dtype=torch.bool)}
        for place in places:
            features = self.grader.of_pictures(cut_out(pictures, place))
            sides = ("kinds", features @ self.texts.T, self.kind_of[sets]), ("looks", self.centred(features) @ self.examples.T, sets)
            for what, cosines, wanted in sides:
                named = cosines.argmax(1).view(-1, count)
                for order in orders:
                    found[what] |= (named == wanted[:, list(order)]).all(1)
        return found


def make_sets(subjects, count, size, seed):
    """int64 [count, size]: subjects of different kinds, by seed."""
    rng, sets = np.random.default_rng([seed, size]), []
    while len(sets) < count:
        chosen = rng.choice(len(subjects), size, replace=False).tolist()
        if len({subjects[i].noun for i in chosen}) == size:
            sets.append(chosen)
    return torch.tensor(sets)


def drawn(parts, way, names, counts, config, label):
    """PIL pictures of sets of things by their names. label: of the noises, which are the same for every way."""
    size = len(names[0])
    template, boxes = WAYS[way][size - 2], WAYS[way][size]
    prompts, plans = [expand(template.format(*own), counts) for own in names], {}
    for prompt, own in zip(prompts, names):
        given = AUTO if boxes == AUTO else tuple(zip(own, CORNERS if boxes == ATTENTION else boxes or ()))
        found = plans_of([prompt], replace(config, regions=given), counts) if boxes else {}
        plans |= {text: [region._replace(box=None) for region in regions] if boxes == ATTENTION else regions for text, regions in found.items()}
    with progress(total=len(prompts), unit="picture", desc=f"{label}, {way}") as bar:
        return [Image.fromarray(p) for p in generate(parts, prompts, [f"{size}/{i}" for i in range(len(prompts))], config, plans, bar)]


def compositions(examples, sets, boxes, rng):
    """(real pictures of each set, pictures in which one of them is another subject)"""
    right, wrong = [], []
    for own in sets.tolist():
        other = list(own)
        other[rng.integers(len(own))] = rng.choice([i for i in range(len(examples)) if i not in own])
        for chosen, made in ((own, right), (other, wrong)):
            made.append(pasted([examples[i][rng.integers(len(examples[i]))] for i in chosen], boxes))
    return right, wrong


def parse_args():
    parser = argparse.ArgumentParser(description="Two and three subjects learned apart in one picture, over known words.", formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, default=MINI / "dreambench", help="a benchmark's folder, as p3_dreambench.sh reads it")
    parser.add_argument("--words", type=Path, default=Path("runs/dreambench/words"), help="its subjects' learned words")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="the model that learned them")
    parser.add_argument("--count", type=int, default=100, help="sets of two, and of three")
    parser.add_argument("--report", type=Path, default=ROOT / "report", help="folder for results/p3_together.json and figures/p3_together.png")
    add_judge_arguments(parser)
    add_arguments(parser)
    args = parser.parse_args()
    check_flags(args, ("count",), lambda value: 1 <= value <= 10_000, "between 1 and 10000")
    return args


def main():
    args = parse_args()
    config, device, row, _ = settings_of(args)
    subjects = read_benchmark(args.data)[1]
    words, *_ = gather([args.words], [subject.token for subject in subjects])
    examples = [list(read_pictures(subject.folder)[0].values()) for subject in subjects]
    for name in ("results", "figures"):
        writable_folder(args.report / name)
    with lock(args.report, "-p3_together"):
        judge = Judge(judge_of(row, args, device=device), subjects, examples, row.medium)
        plain, taught = (load(args.checkpoint, device, config) for _ in range(2))
        add_words(taught, words)
        painters = {"learned": (taught, [s.token for s in subjects], {word: len(rows) for word, rows in words.items()}),
                    "known": (plain, [s.noun for s in subjects], {})}
        results, rows = {}, []
        for size, name in ((2, "two"), (3, "three")):
            sets = make_sets(subjects, args.count, size, args.seed)
            right, wrong = compositions(examples, sets, strips(2, 0) if size == 2 else CORNERS, np.random.default_rng([args.seed, size]))
            results[name] = {"real": share(judge.both(right, sets, None)["looks"]),
                             "one another subject": share(judge.both(wrong, sets, None)["looks"]), "ways": {}}
            rows.append((f"{name}: real pictures", right[:8]))
            for way in WAYS:
                results[name]["ways"][way] = {"prompt": WAYS[way][size - 2]}
                for whose, (parts, called, counts) in painters.items():
                    pictures = drawn(parts, way, [[called[i] for i in own] for own in sets.tolist()], counts, config, whose)
                    boxes = WAYS[way][size]
                    found = judge.both(pictures, sets, None if boxes in (AUTO, ATTENTION) else boxes)["looks" if whose == "learned" else "kinds"]
                    results[name]["ways"][way][whose] = share(found)
                    rows.append((f"{name}: {way}, {whose} words, all in {found.float().mean():.0%}", pictures[:8]))
                    print(rows[-1][0], flush=True)
        write_json(args.report / "results" / "p3_together.json", results | {"seed": args.seed, "pictures": args.count})
        save_image(sheet([shown for _, shown in rows], titles=[title for title, _ in rows], side=96), args.report / "figures" / "p3_together.png")
    print(f"wrote results/p3_together.json and figures/p3_together.png to {args.report}")


if __name__ == "__main__":
    run(main)
