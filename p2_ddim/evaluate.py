"""Grades generated faces against reference images: MSE of 0..255 pixels per image, which must be below 20.

    python -m p2_ddim.evaluate OUT GT
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import UserError, existing_folder, note, run, write_json
from .pictures import left_out, note_left_out, read_picture, save_image
from .provenance import HelpFormatter, check_made, digest, grade_folder, set_aside, told

LIMIT = 20.0  # the course's: an image passes below this
GAIN = 8  # of the differences that are shown


def read_pixels(path):
    """uint8 [H, W, 3]"""
    return np.asarray(read_picture(path))


def read_pairs(output, truth):
    """({name: (result, reference)}, uint8 [H, W, 3] each, {name: why there is no such pair}) of every reference image. A `UserError` where there is none."""
    for folder in (output, truth):
        existing_folder(folder, "folder")
    names = sorted(path.name for path in truth.glob("[!.]*.png"))
    if not names:
        raise UserError(f"{truth} has no .png files; expected the reference images 00.png, 01.png, ...")
    pairs, spoiled = {}, {}
    for name in names:
        reference = read_pixels(truth / name)
        try:
            if not os.path.isfile(output / name):
                raise UserError(f"{output / name} is missing; {truth} has {name}")
            result = read_pixels(output / name)
            if result.shape != reference.shape:
                ours, theirs = (f"{image.shape[1]}x{image.shape[0]}" for image in (result, reference))
                raise UserError(f"{output / name} is {ours}, but {truth / name} is {theirs}")
            pairs[name] = result, reference
        except UserError as error:
            spoiled[name] = str(error)
    if not pairs:
        raise UserError(next(iter(spoiled.values())))
    for folder in (output, truth):
        note_left_out(folder, left_out(folder, names), "GT has no .png of that name" if folder == output else "no .png")
    return pairs, spoiled


def mse(a, b):
    """Mean squared difference of two uint8 images, in squared grey levels."""
    return float(np.square(a.astype(float) - b.astype(float)).mean())


def psnr(error):
    """Peak signal to noise ratio in dB of an MSE in squared grey levels; infinite for 0."""
    return 10 * math.log10(255**2 / error) if error else math.inf


def difference(a, b):
    """The absolute difference of two uint8 images, `GAIN` times as strong, as an image."""
    return (np.abs(a.astype(int) - b) * GAIN).clip(0, 255).astype(np.uint8)


def comparison(pairs, scores):
    """A picture with a column per image: result, reference, and their difference, magnified."""
    side = max(max(image.shape[:2]) for image, _ in pairs.values())
    picture = Image.new("RGB", (70 + len(pairs) * (side + 4), 3 * (side + 4) + 22), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for row, title in enumerate(("result", "reference", f"{GAIN} x diff.")):
        draw.text((4, 22 + row * (side + 4) + side // 2), title, "black", font, anchor="lm")
    for column, (name, (result, reference)) in enumerate(pairs.items()):
        left = 70 + column * (side + 4)
        draw.text((left + side // 2, 10), f"{scores[name]['mse']:.3f}", "black", font, anchor="mm")
        for row, image in enumerate((result, reference, difference(result, reference))):
            picture.paste(Image.fromarray(image), (left, 22 + row * (side + 4)))
    return picture


def main():
    parser = argparse.ArgumentParser(description="Grades generated faces against references.", formatter_class=HelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("truth", type=Path, metavar="GT", help="folder of the reference images")
    parser.add_argument("--report", type=Path, default=None, help="folder for grade.json and comparison.png (default: OUT_grade beside OUT)")
    args = parser.parse_args()
    if args.report and args.report.resolve() == args.truth.resolve():
        raise UserError(f"--report {args.report} is the folder of the references; choose another")
    report = set_aside(args.report, args.output)
    pairs, spoiled = read_pairs(args.output, args.truth)
    paths = [args.output / name for name in pairs]
    made, report = check_made(args.output, paths, partly=True), grade_folder(report)
    if len({result.tobytes() for result, _ in pairs.values()}) < len(pairs):
        note(f"{args.output} has the same picture more than once")
    scores, lines = {}, []
    for name, (result, reference) in pairs.items():
        error = mse(result, reference)
        scores[name] = {"mse": error, "psnr": None if error == 0 else psnr(error), "passed": error < LIMIT}
        lines.append(f"{name}  MSE {error:8.4f}  PSNR {psnr(error):6.2f} dB  {'pass' if error < LIMIT else 'FAIL'}")
    mean, passed = float(np.mean([s["mse"] for s in scores.values()])), sum(s["passed"] for s in scores.values())
    for name, reason in spoiled.items():
        scores[name] = {"mse": None, "psnr": None, "passed": False, "reason": reason}
        lines.append(f"{name}  FAIL: {reason}")
    write_json(report / "grade.json", {"images": scores, "mean_mse": mean, "passed": passed, "made": made, "pictures": digest(paths)})
    save_image(comparison(pairs, scores), report / "comparison.png")
    print("\n".join([f"{args.output}, {told(made)}", *lines, f"mean  MSE {mean:8.4f}  {passed} of {len(scores)} pass (below {LIMIT:g})"]))
    if args.output.resolve() == args.truth.resolve():
        note(f"{args.output} is both OUT and GT: the references were compared with themselves")
    print(f"wrote grade.json and comparison.png to {report}")


if __name__ == "__main__":
    run(main)
