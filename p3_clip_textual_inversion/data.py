"""The course's folders: example pictures of a concept, with captions, and how they are varied; labelled pictures for zero-shot classification."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .files import UserError, check_file, existing_folder, first_line, parse_json, read_json
from .pictures import note_left_out, read_pictures

CAPTIONS = "metadata.jsonl"


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
