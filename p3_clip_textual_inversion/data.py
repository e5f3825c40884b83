"""The course's layouts: input.json and the folders of example pictures beside it; labelled pictures for zero-shot classification."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .files import UserError, check_file, existing_folder, first_line, parse_json, read_json
from .pictures import note_left_out, read_pictures

CAPTIONS = "metadata.jsonl"


@dataclass
class Concept:
    """One entry of input.json. number: its key, and the name of its folder of pictures; baseline: [(image score, text score)] or None."""
    number: str
    src_image: str
    token: str
    prompts: list
    eval_prompts: list
    baseline: list | None


def read_concepts(path):
    """The concepts of an input.json, in its order, every entry checked."""
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path} must be an object of concepts, {{"0": {{"token_name": "<new1>", "prompt": ["..."], ...}}, ...}}')
    concepts = []
    for number, entry in content.items():
        where = f"{path}, concept {number!r}"
        if not number.isprintable() or not number or Path(number).name != number or number in (".", ".."):
            raise UserError(f"{where}: the name must do as a folder's")
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be an object with token_name and prompt")
        if isinstance(entry.get("token_name"), list):
            raise UserError(f"{where} has several token_name, as the prompts.json of the challenge of several concepts in a picture has; expected an "
                            "input.json: one word and a list of prompts for each concept (scripts/p3_multi.sh draws two of its concepts in a picture)")
        for key in ("token_name", "src_image"):
            if not isinstance(entry.get(key, "" if key == "src_image" else None), str):
                raise UserError(f"{where}: {key} must be a text")
        prompts, token = entry.get("prompt"), entry["token_name"]
        evals = entry.get("prompt_4_clip_eval", prompts)
        for key, value in (("prompt", prompts), ("prompt_4_clip_eval", evals)):
            if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
                raise UserError(f"{where}: {key} must be a list of texts")
        if len(evals) != len(prompts):
            raise UserError(f"{where} has {len(prompts)} prompts, but {len(evals)} in prompt_4_clip_eval")
        if token.split() != [token]:
            raise UserError(f"{where}: the token {token!r} must be one word without spaces, such as <new1>")
        for prompt in prompts:
            if token not in prompt:
                raise UserError(f"{where}: the token {token!r} is not in the prompt {prompt!r}")
        baseline = entry.get("baseline")
        if baseline is not None and not (isinstance(baseline, list) and len(baseline) == len(prompts) and all(
                isinstance(pair, list) and len(pair) == 2 and all(map(is_score, pair)) for pair in baseline)):
            raise UserError(f"{where}: baseline must be a pair [image score, text score] for each of the {len(prompts)} prompts")
        concepts.append(Concept(number, entry.get("src_image", ""), token, prompts, evals, baseline))
    return concepts


def kind_of(concept, told="auto"):
    """Whether a concept is an "object" or a "style": as told or, with "auto", a style where every prompt is in its style."""
    return told if told != "auto" else "style" if all(f"style of {concept.token}" in prompt for prompt in concept.prompts) else "object"


def refuse_examples(output, path, concepts):
    """A `UserError` where a run would write among the example pictures of an input.json: into the folder of one of its concepts."""
    output, folders = Path(output).resolve(), [Path(path).resolve().parent / concept.number for concept in concepts]
    if any(output in (folder, folder.parent) for folder in folders):
        raise UserError(f"{output} is the folder of the example pictures of {path}; choose another to write into")


def is_score(value):
    """A number that can be printed: JSON also has NaN, Infinity and whole numbers of any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def example_pictures(folder):
    """The pictures of a concept, as a list."""
    return list(read_pictures(folder)[0].values())


def read_captions(folder, names, token):
    """The captions of the pictures `names`, in their order, or None where the folder has none.

    They stand in metadata.jsonl, as Hugging Face's image folders keep them, a line {"file_name": "00.png", "text": "a cat in the style of <new2>"} for each
    picture; in metadata.csv, with these columns; or in a text beside each picture, 00.txt. A caption that names what else is to be seen leaves to the
    learned word only what it should learn."""
    folder = Path(folder)
    path = next((folder / name for name in (CAPTIONS, "metadata.csv") if os.path.exists(folder / name)), None)
    texts = {name: file for name in names if os.path.isfile(file := folder / f"{Path(name).stem}.txt")}
    if path is None and not texts:
        return None
    try:
        if path is not None:
            check_file(path)  # a named pipe would be waited for
        if path is None:
            path = folder / f"{Path(next(name for name in names if name not in texts)).stem}.txt" if len(texts) < len(names) else folder
            captions = {name: file.read_text(encoding="utf-8-sig").strip() for name, file in texts.items()}
        elif path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                captions = {row["file_name"]: row["text"] for row in csv.DictReader(file)}
        else:
            lines = [parse_json(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            captions = {line["file_name"]: line["text"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f'cannot read the captions of {path}: {first_line(error)}; expected lines {{"file_name": "00.png", "text": "a caption with '
                        f'{token}"}}, or the columns file_name and text') from None
    for name in names:
        caption = captions.get(name)
        if not isinstance(caption, str) or token not in caption:
            raise UserError(f"{path} has {'no caption of ' + name if caption is None else f'for {name} the caption {caption!r}'}; expected one with {token}")
    return [captions[name] for name in names]


def varied(picture, side, count, rng, margin=0.15):
    """`count` squares float32 [count, 3, side, side] in -1..1 of a picture: the middle first, then crops up to `margin` closer; every other one flipped."""
    squares = []
    for i in range(count):
        closer = 1 + margin * (rng.random() if i > 1 else 0)
        short = round(side * closer)
        width, height = (max(short, round(length * short / min(picture.size))) for length in picture.size)
        resized = picture.resize((width, height), Image.Resampling.LANCZOS)
        left, top = ((rng.integers(0, length - side + 1) if i > 1 else (length - side) // 2) for length in (width, height))
        square = resized.crop((left, top, left + side, top + side))
        squares.append(np.asarray(ImageOps.mirror(square) if i % 2 else square))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1


def side_by_side(left, right):
    """Squares [N, 3, H, W] and [M, 3, H, W] -> [max(N, M), 3, H, W]: both at half size beside each other, their upper and lower rows drawn out to fill."""
    count, side = max(len(left), len(right)), left.shape[-1]
    above = (side - side // 2) // 2
    halves = []
    for squares in (left, right):
        small = F.interpolate(squares, size=side // 2, mode="area")
        small = F.pad(small, (0, 0, above, side - side // 2 - above), mode="replicate")
        halves.append(small[torch.arange(count) % len(small)])
    return torch.cat(halves, dim=-1)


def labelled_pictures(folder):
    """(paths of pictures of any type that Pillow opens, in order of their names; names of what else lies there). Hidden files are nobody's business."""
    entries = sorted(path for path in existing_folder(folder, "folder of pictures").iterdir() if not path.name.startswith("."))
    types = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [path for path in entries if path.suffix.lower() in types and path.is_file()]
    return pictures, [path.name for path in sorted({*entries}.difference(pictures))]


def read_data(folder):
    """(paths of val/{class_id}_{number}.png, or another type of picture, in order, their class ids, {class id: label}), all checked.

    What is no picture is left out, with a note that names it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder of labelled pictures: {folder}; bash scripts/download_data.sh fetches the course's to hw2_data/clip_zeroshot")
    labels = read_json(folder / "id2label.json")
    if not isinstance(labels, dict) or not labels or not all(isinstance(label, str) for label in labels.values()):
        raise UserError(f"{folder / 'id2label.json'} must be an object of labels, {{\"class id\": \"label\"}}")
    paths, others = labelled_pictures(folder / "val")
    note_left_out(folder / "val", others)
    if not paths:
        raise UserError(f"{folder / 'val'} has no pictures; expected {{class id}}_{{number}}.png, or .jpg, .webp, ...")
    classes = [path.stem.split("_")[0] for path in paths]
    for path, number in zip(paths, classes):
        if number not in labels:
            raise UserError(f"{path} begins with {number!r}, which is no class id of {folder / 'id2label.json'}")
    return paths, classes, labels
