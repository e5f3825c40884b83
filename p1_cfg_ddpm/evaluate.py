"""Grades a folder of generated digits: accuracy as the course does, and quality beyond it.

    python -m p1_cfg_ddpm.evaluate OUT

Accuracy: the share of files whose digit (the first character of the name) a classifier reads back, and a second judge, by which nothing was chosen.
Quality (quality.py): Frechet distance, precision and coverage, as ratios to what as many real images score. The nearest training images show
that nothing was memorised; that check runs where the training data is.
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .classifier import bundled_classifier, classify, course_classifier, load_classifier
from .data import COURSE_DATA, load_digits, read_image
from .device import describe, pick_device
from .files import UserError, note, run, write_json
from .model import DOMAINS, NUM_DIGITS
from .pictures import left_out, note_left_out, save_image
from .provenance import HelpFormatter, check_made, digest, grade_folder, set_aside, told
from .quality import PER_DIGIT, Judges

EXPECTED = 50  # images of each digit and domain, as the course's graders count
MOST_NOTES = 5


def read_folder(folder):
    """({domain: (images uint8 [N, 28, 28, 3], digits int [N], file names)} of OUT/{domain}/{digit}_*.png,
    {what of it cannot be graded, a file or a domain: why}). A `UserError` where nothing can."""
    found, spoiled = {}, {}
    for domain in DOMAINS:
        paths, images = sorted((folder / domain).glob("[!.]*.png")) if os.path.isdir(folder / domain) else [], {}
        for path in paths:
            try:
                if not re.match("[0-9]_", path.name):
                    raise UserError(f"{path}: the name must begin with the digit, as in 0_001.png")
                images[path.name] = read_image(path, resize=False)  # of another size: the graders expect 28x28, and resizing would hide the mistake
            except UserError as error:
                spoiled[f"{domain}/{path.name}"] = str(error)
        if images:
            note_left_out(folder / domain, left_out(folder / domain, paths), "no .png")
            found[domain] = (np.stack(list(images.values())), np.array([int(name[0]) for name in images]), list(images))
        elif not paths:
            there = "has no .png files" if os.path.isdir(folder / domain) else "does not exist"
            spoiled[domain] = f"{folder / domain} {there}; expected {folder}/{{mnistm,svhn}}/{{digit}}_{{001..050}}.png"
    if not found:
        raise UserError(next(iter(spoiled.values())))
    return found, spoiled


def share_of_expected(found, predictions):
    """Of the images that the course's graders expect, `EXPECTED` of each digit and domain, the share that is read right: what is missing is not."""
    shares = np.zeros((len(DOMAINS), NUM_DIGITS))
    for domain, (_, digit, _) in found.items():
        for d in range(NUM_DIGITS):
            right = int((predictions[domain][digit == d] == d).sum())
            shares[DOMAINS.index(domain), d] = right / max(int((digit == d).sum()), EXPECTED)
    return float(shares.mean())


def confusion_of(digit, read):
    """int [10][10]: rows are what was wanted, columns what was read."""
    confusion = np.zeros((NUM_DIGITS, NUM_DIGITS), dtype=int)
    np.add.at(confusion, (digit, read), 1)
    return confusion.tolist()


def grade(found, classifiers=None, device="cpu", judges=None):
    """Grades {domain: (images, digit, names)}. `classifiers`: {domain: path} whose accuracy counts in place of the bundled ones'.

    Returns (scores, {domain: predicted digits}). Quality is measured by the bundled judges only."""
    judges = judges or Judges(device)
    scores, predictions = {}, {}
    for domain, (images, digit, _) in found.items():
        scores[domain], read = judges.scores(domain, images, digit)
        other = (classifiers or {}).get(domain)
        if other:
            read = classify(load_classifier(other, device), images)[0].numpy()
            scores[domain] |= {"accuracy": float((read == digit).mean()),
                               "accuracy_per_digit": {str(d): float((read[digit == d] == d).mean()) for d in range(NUM_DIGITS) if (digit == d).any()}}
        scores[domain] |= {"confusion": confusion_of(digit, read), "classifier": str(other or "bundled"), "real": judges.facts[domain]}
        predictions[domain] = read
    scores["mean_accuracy"] = float(np.mean([scores[domain]["accuracy"] for domain in found]))
    return scores, predictions


def mistakes_picture(found, scores, predictions, most=20):
    """The confusion matrix of each domain, with the misread images below it: "wanted > read as"."""
    cell, font = 26, ImageFont.load_default(12)
    rows = max(-(-min(int((predictions[d] != found[d][1]).sum()), most) // 5) for d in found)
    width, top = (NUM_DIGITS + 1) * cell, 24
    picture = Image.new("RGB", (len(found) * (width + 30) + 10, top + (NUM_DIGITS + 2) * cell + rows * 76 + 10), "white")
    draw = ImageDraw.Draw(picture)
    for column, (domain, (images, digit, _)) in enumerate(found.items()):
        left = 10 + column * (width + 30)
        draw.text((left, 4), f"{domain}: {scores[domain]['accuracy']:.1%}, rows wanted, columns read", "black", font)
        confusion = np.array(scores[domain]["confusion"])
        for i in range(NUM_DIGITS):
            draw.text((left + (i + 1.35) * cell, top), str(i), "gray", font)
            draw.text((left + 8, top + (i + 1.2) * cell), str(i), "gray", font)
            for j in range(NUM_DIGITS):
                share = confusion[i, j] / max(confusion[i].sum(), 1)
                x, y = left + (j + 1) * cell, top + (i + 1) * cell
                color = (int(255 - 200 * share),) * 2 + (255,) if i == j else (255,) + (int(255 - 255 * min(4 * share, 1)),) * 2
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=color)
                if confusion[i, j]:
                    draw.text((x + 3, y + 5), str(confusion[i, j]), "black", font)
        wrong = np.flatnonzero(predictions[domain] != digit)[:most]
        for place, k in enumerate(wrong):
            x, y = left + (place % 5) * 57, top + (NUM_DIGITS + 2) * cell + (place // 5) * 76
            picture.paste(Image.fromarray(images[k]).resize((56, 56), Image.Resampling.NEAREST), (x, y))
            draw.text((x + 8, y + 58), f"{digit[k]} > {predictions[domain][k]}", "black", font)
    return picture


def nearest_training_images(found, data_folder):
    """For one image of each digit: the nearest training image in pixels (root mean square, 0..255). Returns (scores, picture).

    `ratio` compares the mean distance with that of real validation images to their nearest training image: a model that
    copied its training images would be far below 1."""
    scores, strips = {}, []
    for domain, (images, digit, _) in found.items():
        train, val = (load_digits(data_folder, split, (domain,)) for split in ("train", "val"))
        first = [int(np.flatnonzero(digit == d)[0]) for d in range(NUM_DIGITS) if (digit == d).any()]
        every, index = nearest_of(images, train.images)
        real, _ = nearest_of(val.images[:500], train.images)
        scores[domain] = {"mean_distance": float(every.mean()), "real_mean_distance": float(real.mean()), "ratio": float(every.mean() / real.mean()),
                          "smallest": float(every.min())}
        strips += [np.concatenate(list(images[first]), axis=1), np.concatenate(list(train.images[index[first]]), axis=1)]
    picture = Image.fromarray(np.concatenate(strips, axis=0))
    return scores, picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)


def nearest_of(images, others):
    """(root mean square distance, index) of the nearest of `others` for each of `images`, both uint8 [N, 28, 28, 3]."""
    a, b = (torch.from_numpy(x.reshape(len(x), -1)).float() for x in (images, others))
    squared = (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0) / a.shape[1]
    distance, index = squared.sqrt().min(dim=1)
    return distance.numpy(), index.numpy()


def print_table(scores):
    print(f"ratios to as many real images, at most {PER_DIGIT} of a digit, in the embedding: 1 is as good as real\n"
          f"{'domain':8} {'images':>6} {'accuracy':>9} {'worst digit':>12} {'second judge':>13} {'Frechet':>8} {'precision':>10} {'coverage':>9}  classifier")
    for domain in (domain for domain in DOMAINS if domain in scores):
        s = scores[domain]
        digit, worst = min(s["accuracy_per_digit"].items(), key=lambda item: item[1])
        ratios = [s["embedding"][name]["ratio"] if s["embedding"] else np.nan for name in ("frechet", "precision", "coverage")]  # too few images have none
        print(f"{domain:8} {s['images']:6} {s['accuracy']:9.2%} {f'{digit}: {worst:.0%}':>12} {s['second_accuracy']:13.2%} "
              f"{ratios[0]:8.2f} {ratios[1]:10.2f} {ratios[2]:9.2f}  {s['classifier']}")
    print(f"mean accuracy {scores['mean_accuracy']:.2%}")


def main():
    parser = argparse.ArgumentParser(description="Grades generated digits.", formatter_class=HelpFormatter)
    parser.add_argument("images", type=Path, metavar="OUT", help="folder with {mnistm,svhn}/{digit}_*.png")
    for domain in DOMAINS:
        parser.add_argument(f"--classifier-{domain}", type=Path, default=None,
                            help="the course's Classifier.pth or resnet34_svhn, or a .safetensors of p1_cfg_ddpm.classifier "
                            "(default: the course's, where scripts/download_weights.sh has put it; otherwise the bundled one)")
    parser.add_argument("--data", type=Path, default=COURSE_DATA, help="training images for the nearest-image check, a folder or a .npz; skipped where "
                        "there are none")
    parser.add_argument("--report", type=Path, default=None, help="folder for grade.json and the pictures (default: OUT_grade beside OUT)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    report = set_aside(args.report, args.images)
    found, spoiled = read_folder(args.images)
    paths = [args.images / domain / name for domain in found for name in found[domain][2]]
    made, report = check_made(args.images, paths, partly=True), grade_folder(report)
    classifiers = {domain: getattr(args, f"classifier_{domain}") or course_classifier(domain) for domain in found}
    device = pick_device(args.device)
    print(f"grading {args.images} by {', '.join(str(path or bundled_classifier(domain)) for domain, path in classifiers.items())} "
          f"on {describe(device, torch.float32)}", flush=True)
    for reason in [*spoiled.values()][:MOST_NOTES]:
        note(reason)
    if len(spoiled) > MOST_NOTES:
        note(f"and {len(spoiled) - MOST_NOTES} more cannot be graded: grade.json names them")
    scores, predictions = grade(found, classifiers, device)
    counts = {domain: np.bincount(found[domain][1], minlength=NUM_DIGITS) for domain in found}
    for domain in found:
        if set(counts[domain]) != {EXPECTED}:
            print(f"note: {domain} has {counts[domain].tolist()} images of the digits 0-9; the grader expects {EXPECTED} of each")
    complete = not spoiled and len(found) == len(DOMAINS) and all((counts[domain] >= EXPECTED).all() for domain in found)
    scores |= {"complete": complete, "accuracy_of_expected": share_of_expected(found, predictions), "spoiled": spoiled}
    scores["made"], scores["pictures"] = made, digest(paths)
    write_json(report / "grade.json", scores)  # now too: neither a closed pipe nor training data that cannot be read must cost the grades
    save_image(mistakes_picture(found, scores, predictions), report / "mistakes.png")
    print(f"{args.images}, {told(made)}")
    print_table(scores)
    if not complete:
        print(f"of the {EXPECTED * NUM_DIGITS * len(DOMAINS):,} images that the grader expects {scores['accuracy_of_expected']:.2%} are right: what is missing "
              "or cannot be read counts as wrong")
    compared = args.data.exists() and (args.data != COURSE_DATA or all(os.path.isdir(args.data / domain) for domain in found))
    if compared:
        scores["nearest_training_image"], picture = nearest_training_images(found, args.data)
        save_image(picture, report / "nearest.png")
        for domain, s in scores["nearest_training_image"].items():
            print(f"{domain}: nearest training image at {s['mean_distance']:.1f} grey levels on average, {s['ratio']:.2f} times a real image's distance")
    else:
        print(f"no training images of these domains in {args.data}: the nearest-training-image check was skipped")
    write_json(report / "grade.json", scores)
    print(f"wrote grade.json, mistakes.png{' and nearest.png' if compared else ''} to {report}")


if __name__ == "__main__":
    run(main)
