"""The digits in the course's layout, `digits/{mnistm,svhn}/{data/*.png, train.csv, val.csv}`, checked and decoded once."""

import csv
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .files import MINI, ROOT, UserError, atomic_path, check_file, first_line, where_from
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS
from .pictures import decode, read_picture

COURSE_DATA = ROOT / "hw2_data" / "digits"
MINI_DATA = MINI / "digits"
MOST_BYTES = 4_000_000_000  # of decoded digits, of which both domains of the course have 0.3 GB


@dataclass
class Digits:
    """images: uint8 [N, 28, 28, 3]; digit, domain: int64 [N] (domain indexes `DOMAINS`)."""

    images: np.ndarray
    digit: np.ndarray
    domain: np.ndarray

    def __len__(self):
        return len(self.images)


def default_data():
    """The course's digits where they have been downloaded, otherwise the bundled stand-in."""
    return COURSE_DATA if COURSE_DATA.is_dir() else MINI_DATA


def load_digits(folder, split, domains=DOMAINS):
    """Reads one split ("train" or "val") of the named domains. Decoded images are kept in `folder/.cache` (unless that cannot be
    written), keyed by the CSV's content and the images' sizes and times.

    `folder` may also be one .npz file with the decoded arrays: {domain}_{split} uint8 [N, 28, 28, 3] and {domain}_{split}_label."""
    folder = Path(folder)
    if folder.is_file():
        return load_archive(folder, split, domains)
    parts = [load_domain(folder / name, split, index, folder / ".cache") for index, name in enumerate(DOMAINS) if name in domains]
    return Digits(*(np.concatenate([getattr(part, field) for part in parts]) for field in ("images", "digit", "domain")))


def load_archive(path, split, domains):
    """The `Digits` of one split from a .npz of decoded images."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
                raise ValueError("it holds more than any digits: a small file may claim any size")
        with np.load(path, allow_pickle=False) as content:
            arrays = [(content[f"{name}_{split}"], content[f"{name}_{split}_label"], index) for index, name in enumerate(DOMAINS) if name in domains]
    except KeyError as error:
        raise UserError(f"{path} has no array {str(error.args[0]).split()[0]!r}; expected {{domain}}_{{split}} and {{domain}}_{{split}}_label") from None
    except Exception as error:  # a damaged archive makes its readers raise anything
        raise UserError(f"{path} cannot be read as a .npz of digits: {first_line(error)}") from None
    for images, label, index in arrays:
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3) and label.shape == images.shape[:1]
        if not fits or not len(label) or not np.isin(label, range(NUM_DIGITS)).all():
            raise UserError(f"{path}: {DOMAINS[index]}_{split} must be uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3] with N labels from 0 to 9")
    return Digits(np.concatenate([images for images, _, _ in arrays]), np.concatenate([label for _, label, _ in arrays]).astype(np.int64),
                  np.concatenate([np.full(len(label), index, dtype=np.int64) for _, label, index in arrays]))


def load_domain(folder, split, domain, cache):
    """The `Digits` of one domain's folder. domain: its index; cache: the folder of decoded images."""
    names, labels = read_csv(folder / f"{split}.csv")
    paths = [folder / "data" / name for name in names]
    digest = hashlib.sha256()
    for name, path, label in zip(names, paths, labels):
        try:
            stat = path.stat()
        except OSError:
            raise UserError(f"{folder / f'{split}.csv'} names {path.name}, but {path} does not exist") from None
        digest.update(f"{name}:{label}:{stat.st_size}:{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    cached = cache / f"{folder.name}_{split}_{digest.hexdigest()[:16]}.npy"
    try:
        check_file(cached)
        images = np.load(cached, allow_pickle=False)
    except Exception:  # there is none yet, or it is damaged, which makes its reader raise anything
        images = None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(paths), IMAGE_SIZE, IMAGE_SIZE, 3):  # not there, or damaged
        images = np.stack(decode(paths, read_image, f"{folder.name} {split}"))
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_path(cached) as temporary:
                np.save(temporary, images)
        except (OSError, UserError):
            pass  # a read-only data folder only means decoding again next time
    return Digits(images, np.array(labels, dtype=np.int64), np.full(len(labels), domain, dtype=np.int64))


def read_csv(path):
    """Returns (image names, labels 0..9) of a CSV with the columns image_name,label."""
    try:
        check_file(path)  # a named pipe would be waited for
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}. Expected digits/{{mnistm,svhn}}/{{data/*.png,train.csv,val.csv}}"
                        + where_from(path)) from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    if not rows or [column.strip() for column in rows[0]] != ["image_name", "label"]:
        raise UserError(f"{path} line 1: expected the columns image_name,label")
    names, labels = [], []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != 2 or not row[0].isprintable() or row[1].strip() not in [str(d) for d in range(NUM_DIGITS)]:
            raise UserError(f"{path} line {number}: expected an image name and a label from 0 to 9, not {','.join(row)[:80]!r}")
        names.append(row[0].strip())
        labels.append(int(row[1]))
    if not names:
        raise UserError(f"{path} lists no images")
    return names, labels


def read_image(path, resize=True):
    """uint8 [28, 28, 3]; other sizes (SVHN is also handed out at 32x32) are resized or, without `resize`, refused."""
    image = read_picture(path)
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        if not resize:
            raise UserError(f"{path} is {image.width}x{image.height}, expected {IMAGE_SIZE}x{IMAGE_SIZE}")
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)
