"""Pictures: one careful reader for every mode and type that Pillow opens, their way into a model and back, files that know their settings, labelled sheets."""

import json
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

from .files import UserError, atomic_path, check_file, existing_folder, first_line, note

MOST_PIXELS = 89_478_485  # Pillow's own line; a file of some kB may claim any size
OUTSIDE_PROGRAMS = ("EPS", "WMF", "MPEG")  # what Pillow would give to another program (Ghostscript), or cannot draw
SETTINGS = "settings"  # the PNG's text that holds what made it, as JSON
PARTS = "parts"  # how a sheet or chart is divided, for pages that lay it out again: [{"box": [x, y, width, height], "title", "rows", "columns"}, ...]
DPI = 120
NO_PICTURES = (".txt", ".csv", ".jsonl", ".json")  # captions and tables beside pictures


def read_picture(path):
    """The picture of a file, RGB and upright by its EXIF orientation; transparency is laid on white, of an animation the first frame is taken, with a note.

    A `UserError` names what cannot be read: no regular file, damaged or cut off, or larger than `MOST_PIXELS`."""
    try:
        check_file(path)
        Image.init()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow only warns of is refused below, or does not matter
            with Image.open(path, formats=[kind for kind in Image.ID if kind not in OUTSIDE_PROGRAMS]) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"it claims {image.width}x{image.height} pixels, more than are read")
                if image.format in ("GIF", "WEBP", "PNG", "TIFF") and frames(image) > 1:
                    note(f"{path} has {frames(image)} frames; the first is taken")
                    image.seek(0)
                image.load()
                return to_rgb(upright(image))
    except UserError:
        raise
    except Exception as error:  # a decoder of a damaged file raises anything
        raise UserError(f"cannot read the picture {path}: {first_line(error).replace(f' {str(path)!r}', '')}") from None


def frames(image):
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a later frame that is damaged does not spoil the first
        return 1


def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except (struct.error, ValueError, TypeError, KeyError, SyntaxError, OverflowError, ZeroDivisionError, OSError):
        return image  # damaged EXIF data says nothing


def to_rgb(image):
    """A loaded picture of any mode as RGB, 8 bits a channel."""
    if image.mode.startswith("I") or image.mode == "F":
        return deep_to_rgb(image)
    if image.mode == "LAB":
        from PIL import ImageCms

        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def deep_to_rgb(image):
    """Grey of more than 8 bits: 16 bits as 0..65535, 32 bits as that or 0..255, real numbers as 0..1 or 0..255. `convert` would cut them off at 255."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite")
    top = {"F": 1 if high <= 1 else 255, "I": 255 if high <= 255 else 65535}.get(image.mode, 65535)
    if low < 0 or high > top:
        raise ValueError(f"its grey values go from {low:g} to {high:g}, expected 0 to {top}")
    grey = np.rint(values / top * 255).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def picture_files(folder, what="folder of pictures"):
    """The files of a folder that may be pictures, in the order of their names: not hidden, no folders, no captions. Pipes and devices are not opened."""
    folder = existing_folder(folder, what)
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and os.path.isfile(path) and path.suffix.lower() not in NO_PICTURES)


def left_out(folder, used, besides=NO_PICTURES):
    """What a folder holds besides the files `used`, by name: not hidden ones, nor (besides) captions. For a note that nothing is left out without a word."""
    used = {Path(path).name for path in used}
    return sorted(path.name for path in Path(folder).iterdir()
                  if not path.name.startswith(".") and path.name not in used and path.suffix.lower() not in besides)


def note_left_out(folder, names, reason="no readable picture"):
    if any(Path(name).suffix.lower() in (".heic", ".heif") for name in names):
        reason += "; HEIC is not read: export JPEG"
    if names:
        note(f"left out of {folder}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''} ({reason})")


def read_pictures(folder, what="folder of pictures", make=lambda picture: picture):
    """({name: picture} in the order of their names; names of what was no picture, which a note tells). make: what is kept of each."""
    pictures = {}
    for path in picture_files(folder, what):
        with suppress(UserError):  # it is named below
            pictures[path.name] = make(read_picture(path))
    skipped = left_out(folder, pictures)
    if not pictures:
        heic = "; HEIC is not read: export JPEG" if any(name.lower().endswith((".heic", ".heif")) for name in skipped) else ""
        raise UserError(f"{folder} has no readable picture" + (f" (not {', '.join(skipped[:3])}{heic})" if skipped else ""))
    note_left_out(folder, skipped)
    return pictures, skipped


def decode(paths, read, title):
    """[read(path) for each path], by several threads, with a bar where there are many; Ctrl-C does not wait for the rest."""
    pool = ThreadPoolExecutor()
    try:
        return list(tqdm(pool.map(read, paths), total=len(paths), desc=f"decoding {title}", unit="img", leave=False, disable=len(paths) < 1000))
    finally:
        pool.shutdown(cancel_futures=True)


def to_model(images, device=None):
    """uint8 [B, H, W, 3] (numpy or tensor) -> float32 [B, 3, H, W] in [-1, 1], channels-last in memory; on `device`, or where they are."""
    return torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """float [B, 3, H, W] in [-1, 1] -> uint8 numpy [B, H, W, 3]."""
    return ((images.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_image(image, path, settings=None):
    """Writes a picture (PIL, or uint8 [H, W, 3]). settings: what made it, JSON-able, kept in a PNG's text; the parts of a sheet are kept there too."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    parts = image.info.get(PARTS)
    texts = ({} if settings is None else {SETTINGS: settings}) | ({PARTS: parts} if isinstance(parts, list) else {})
    options = {}
    if texts:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in texts.items():
            options["pnginfo"].add_text(key, json.dumps(value, sort_keys=True))
    with atomic_path(path) as temporary:
        image.save(temporary, **options)


def sheet(rows, left=(), above=(), titles=(), side=None, gap=4, enlarge=False):
    """A picture of pictures: a row for each list of images (PIL, or uint8 [H, W, 3]), beside `left`'s labels, below `above`'s, each under its of `titles`.

    side: each is brought to this side; otherwise they keep their sizes. enlarge: by whole pixels, as tiny pictures want to be seen."""
    rows = [[image if isinstance(image, Image.Image) else Image.fromarray(image) for image in row] for row in rows]
    if side:
        rows = [[image.convert("RGB").resize((side, side), Image.Resampling.NEAREST if enlarge else Image.Resampling.BICUBIC) for image in row] for row in rows]
    width, height = (max((size for row in rows for size in (image.size[axis] for image in row)), default=1) for axis in (0, 1))
    font = ImageFont.load_default(12)
    margin = max((int(font.getlength(str(label))) + 10 for label in left), default=gap)
    head, title = 20 if above else gap, 20 if titles else 0
    across, down = max(map(len, rows), default=0) * (width + gap), len(rows) * (height + gap + title)
    longest = max((int(font.getlength(str(text))) + gap for text in titles), default=0)
    picture = Image.new("RGB", (margin + max(across, longest), head + down), "white")
    labels = {"columns": [str(label) for label in above], "rows": [str(label) for label in left]}
    picture.info[PARTS] = [{"box": [margin, head, across, down], **labels}]
    if titles:  # each row is a part of its own
        picture.info[PARTS] = [{"box": [margin, head + i * (height + gap + title) + title, len(row) * (width + gap), height + gap], "title": str(titles[i]),
                                **labels, "rows": labels["rows"][i:i + 1]} for i, row in enumerate(rows)]
    draw = ImageDraw.Draw(picture)
    for column, label in enumerate(above):
        draw.text((margin + column * (width + gap) + width // 2, 10), str(label), "black", font, anchor="mm")
    for i, row in enumerate(rows):
        top = head + i * (height + gap + title)
        if titles:
            draw.text((margin, top + 10), str(titles[i]), "black", font, anchor="lm")
        if left:
            draw.text((margin - 6, top + title + height // 2), str(left[i]), "black", font, anchor="rm")
        for column, image in enumerate(row):
            picture.paste(image, (margin + column * (width + gap), top + title))
    return picture


def chart(panels, path, columns=2, size=(4.4, 3.2)):
    """Writes a PNG of charts, equally large, `columns` beside each other. panels: functions that draw on matplotlib's axes; size: of each, in inches.

    A legend stands below its panel, where it hides nothing. Letters are large enough for a panel to be shown alone on a telephone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, (width, height) = min(columns, len(panels)), size
    count = -(-len(panels) // columns)
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(width * columns, height * count), layout="constrained")
        parts = []
        for i, (part, draw) in enumerate(zip(figure.subfigures(count, columns, wspace=0, hspace=0, squeeze=False).flat, panels)):
            axis = part.subplots()
            draw(axis)
            handles, labels = axis.get_legend_handles_labels()
            if handles:
                part.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, columnspacing=1, handletextpad=0.5)
            corner = (i % columns * width, i // columns * height)
            parts.append({"box": [round(DPI * value) for value in (*corner, width, height)], "label": axis.get_title()})
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, metadata={PARTS: json.dumps(parts)})
        plt.close(figure)
    return path
