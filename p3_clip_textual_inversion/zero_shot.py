"""CLIP zero-shot classification (Radford et al. 2021): a class is the caption that fits a picture best.

    python -m p3_clip_textual_inversion.zero_shot                                                        # the miniature
    python -m p3_clip_textual_inversion.zero_shot --data hw2_data/clip_zeroshot --model ViT-L-14-quickgelu --pretrained openai
"""

import argparse
import csv
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .clip import image_features, load_clip, load_pictures, text_classifier
from .data import read_data
from .device import DTYPES, pick_device, pick_dtype
from .files import UserError, atomic_path, check_flags, run, writable_folder, write_json
from .world import MINI

PHOTO_TEMPLATES = ("a photo of a {}", "a bad photo of a {}", "a close-up photo of a {}", "a photo of the large {}", "a photo of the small {}",
                   "a drawing of a {}", "a {} in a video game")
DRAWING_TEMPLATES = ("a {}", "a drawing of a {}", *(f"a drawing of a {{}} on a {colour} background" for colour in ("white", "blue", "green", "pink", "yellow")))


def score(probabilities, truth, names):
    """Top-1 and top-5 accuracy, accuracy per class, and the pairs (truth, prediction) most often confused. probabilities: [N, classes]; truth: [N]."""
    order = probabilities.argsort(dim=1, descending=True)
    hit = order == truth[:, None]
    predicted = order[:, 0]
    confused = Counter((names[t], names[p]) for t, p in zip(truth.tolist(), predicted.tolist()) if t != p)
    return {"top1": hit[:, 0].float().mean().item(), "top5": hit[:, :5].any(1).float().mean().item(), "images": len(truth), "classes": len(names),
            "per_class": {name: hit[truth == i, 0].float().mean().item() for i, name in enumerate(names) if (truth == i).any()},
            "confused": [{"truth": t, "predicted": p, "count": count} for (t, p), count in confused.most_common(10)]}


def draw_examples(paths, truth, probabilities, names, path, count=5):
    """A picture of `count` successes and as many failures, spread over the classes, each with bars of its five likeliest classes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    top = probabilities.topk(min(5, len(names)), dim=1)
    right = (top.indices[:, 0] == truth).numpy()
    figure, axes = plt.subplots(4, count, figsize=(3.1 * count, 9), layout="constrained", height_ratios=[1.4, 1, 1.4, 1])
    for row, (group, title) in enumerate(((np.flatnonzero(right), "right"), (np.flatnonzero(~right), "wrong"))):
        chosen = group[np.linspace(0, len(group) - 1, min(count, len(group))).round().astype(int)] if len(group) else []
        for column in range(count):
            picture, bars = axes[2 * row, column], axes[2 * row + 1, column]
            picture.axis("off")
            if column >= len(chosen):
                bars.axis("off")
                continue
            i = chosen[column]
            with Image.open(paths[i]) as image:
                picture.imshow(image.convert("RGB"))
            picture.set_title(f"{title}: {names[truth[i]]}", fontsize=11, parse_math=False)
            colours = ["tab:green" if index == truth[i] else "tab:gray" for index in top.indices[i]]
            bars.barh([names[index] for index in top.indices[i]][::-1], top.values[i].tolist()[::-1], color=colours[::-1])
            bars.set_xlim(0, 1)
            bars.tick_params(labelsize=9)
            for label in bars.get_yticklabels():
                label.set_parse_math(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def write_predictions(path, paths, truth, probabilities, names):
    """A CSV with a row per picture: file, label, its rank, and the five likeliest labels with their probabilities."""
    top = probabilities.topk(min(5, len(names)), dim=1)
    ranks = (probabilities > probabilities.gather(1, truth[:, None])).sum(1) + 1
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "rank", *(f"{what}_{i + 1}" for i in range(top.values.shape[1]) for what in ("predicted", "probability"))])
        for i, file_path in enumerate(paths):
            guesses = [part for index, p in zip(top.indices[i].tolist(), top.values[i].tolist()) for part in (names[index], f"{p:.4f}")]
            writer.writerow([file_path.name, names[truth[i]], ranks[i].item(), *guesses])


def main():
    parser = argparse.ArgumentParser(description="CLIP zero-shot classification.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=MINI / "clip_zeroshot", help="folder with val/{class id}_{number}.png and id2label.json")
    parser.add_argument("--output", type=Path, default=Path("out/p3_clip"), help="folder for results.json, predictions.csv and examples.png")
    parser.add_argument("--model", default=str(MINI / "clip"), help="a model of open_clip, such as ViT-L-14-quickgelu, or a folder with open_clip_config.json")
    parser.add_argument("--pretrained", default=None, help="weights for a named model: a tag, such as openai, or a file")
    parser.add_argument("--template", action="append", default=None, metavar="TEXT", help="caption with {} for the label; several are averaged "
                        "(default: 'a drawing of a {}' for the miniature, otherwise 'a photo of a {}')")
    parser.add_argument("--ensemble", action="store_true", help="average seven captions per label")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time; the result does not depend on it")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the image tower; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    mini = Path(args.model).resolve() == (MINI / "clip").resolve()
    templates = args.template or [f"a {'drawing' if mini else 'photo'} of a {{}}"]
    if args.ensemble and args.template:
        raise UserError("--ensemble brings its own captions; give it or --template, not both")
    if args.ensemble:
        templates = DRAWING_TEMPLATES if mini else PHOTO_TEMPLATES
    check_flags(args, ("batch_size",), lambda value: value >= 1, "at least 1")
    for template in templates:
        if template.count("{}") != 1 or template.replace("{}", "").count("{") + template.replace("{}", "").count("}"):
            raise UserError(f"--template {template!r} must have {{}} once, in the label's place")
    paths, classes, labels = read_data(args.data)
    writable_folder(args.output)
    clip, transform, tokenizer = load_clip(args.model, args.pretrained, device)
    numbers, names = list(labels), list(labels.values())
    truth = torch.tensor([numbers.index(number) for number in classes])
    started = time.perf_counter()
    directions = text_classifier(clip, tokenizer, names, templates, device)
    features = image_features(clip, load_pictures(paths, transform, args.batch_size), device, dtype, len(paths))
    seconds = time.perf_counter() - started
    probabilities = (clip.logit_scale.exp() * features @ directions.T).softmax(dim=1).cpu()
    results = score(probabilities, truth, names)
    results |= {"model": Path(args.model).name, "pretrained": args.pretrained, "templates": list(templates), "seconds": seconds}
    write_json(args.output / "results.json", results)
    write_predictions(args.output / "predictions.csv", paths, truth, probabilities, names)
    draw_examples(paths, truth, probabilities, names, args.output / "examples.png")
    print(f"top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} of {len(paths)} pictures in {len(names)} classes; "
          f"{len(paths) / seconds:.0f} pictures a second")
    worst = sorted(results["per_class"].items(), key=lambda item: item[1])[:5]
    print("worst classes: " + ", ".join(f"{name} {accuracy:.0%}" for name, accuracy in worst))
    print("most confused: " + ", ".join(f"{c['truth']} for {c['predicted']} ({c['count']})" for c in results["confused"][:5]))
    print(f"wrote results.json, predictions.csv and examples.png to {args.output}")


if __name__ == "__main__":
    run(main)
