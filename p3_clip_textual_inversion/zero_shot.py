"""CLIP zero-shot classification (Radford et al. 2021): a class is the caption that fits a picture best.

    python -m p3_clip_textual_inversion.zero_shot                                                        # the miniature
    python -m p3_clip_textual_inversion.zero_shot --data hw2_data/clip_zeroshot --model ViT-B-32.pt      # OpenAI's own file
    python -m p3_clip_textual_inversion.zero_shot --data hw2_data/clip_zeroshot --model ViT-B-32 --model ViT-L-14 --pretrained openai --templates photo course

Captions come in named sets, the first of which is the answer; all are compared on the same features, which are kept for the next time.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import open_clip
import torch

from .classification.adapters import another_way, few_shot, transduce, transductive_limits
from .classification.cache import make_grader
from .classification.outcome import cosines_of, load_data, outcome_of, score, write_predictions
from .classification.plots import draw_calibration, draw_confusion, draw_examples, draw_retrieval, nearest_pictures
from .clip import check_clip, ensemble, has_weights, reads_thumbnails
from .device import DTYPES, describe, name_of, pick_device, pick_dtype
from .files import MINI, UserError, check_file, check_flags, first_line, lock, run, writable_folder, write_json
from .measures import paired, ranking, wilson
from .provenance import HelpFormatter

TEMPLATES = {  # sets of captions; those of a set are averaged
    "plain": ("{}",), "photo": ("a photo of a {}",), "course": ("A photo of {}.",),  # as solutions of the course ask
    "imagenet7": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "openai80": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "drawing": ("a drawing of a {}",),  # what the miniature has seen
    "drawing7": ("a {}", "a drawing of a {}", *(f"a drawing of a {{}} on a {colour} background" for colour in ("white", "blue", "green", "pink", "yellow"))),
}
SPLITS = 20  # of the pictures in halves: on one a caption is chosen, on the other tried


def read_templates(name):
    """The captions of a set: a name of `TEMPLATES`, or a file with a caption in each line, {} in the label's place."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        check_file(name)
        lines = tuple(line.strip() for line in Path(name).read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"--templates {name} is neither {', '.join(TEMPLATES)} nor a file of captions: {first_line(error)}") from None
    if not lines:
        raise UserError(f"--templates {name}: the file has no captions")
    for line in lines:
        check_template(line, f"{name}: ")
    return lines


def check_template(template, where=""):
    if not template.isprintable() or template.count("{}") != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
        raise UserError(f"{where}the caption {template[:80]!r} must have {{}} once, in the label's place, and no other braces")


def compare_templates(features, texts, sets, data):
    """(a row for each set, what single captions do): all on the same features. texts: {caption: normalised directions [texts, dim]}."""
    def right(captions):
        cosines = cosines_of(features, ensemble(torch.stack([texts[caption] for caption in captions], dim=1)), data.label)
        return ranking(cosines)[:, 0] == data.truth

    rights = {name: right(captions) for name, captions in sets.items()}
    first = next(iter(rights.values()))
    rows = [{"templates": name, "captions": len(sets[name]), "top1": int(r.sum()) / len(r), "interval": wilson(int(r.sum()), len(r)), **paired(r, first)}
            for name, r in rights.items()]
    single = torch.stack([right((caption,)) for caption in texts])
    shares, rng, other = single.double().mean(1), np.random.default_rng(0), []
    for _ in range(SPLITS):
        half, rest = np.array_split(rng.permutation(len(data.truth)), 2)
        chosen = single[:, half].double().mean(1).argmax()
        other.append(single[chosen, rest].double().mean().item() if len(rest) else shares[chosen].item())
    best, worst = shares.argmax().item(), shares.argmin().item()
    captions = list(texts)
    return rows, {"captions": len(captions), "best": {"template": captions[best], "top1": int(single[best].sum()) / len(data.truth)},
                  "worst": {"template": captions[worst], "top1": int(single[worst].sum()) / len(data.truth)},
                  "mean": int(single.sum()) / single.numel(), "deviation": shares.std(correction=0).item(), "chosen_on_other_half": float(np.mean(other))}


def classify(grader, data, sets, args, output):
    """One CLIP's results: written to `output` and returned, with which pictures it took rightly (bool [N]) and the features [N, dim]."""
    started = time.perf_counter()
    features = grader.of_files(data.paths, batch_size=args.batch_size, progress=True)
    seconds = time.perf_counter() - started
    captions = list(dict.fromkeys(caption for captions in sets.values() for caption in captions))
    directions = grader.of_texts([caption.format(text) for caption in captions for text in data.texts]).unflatten(0, (len(captions), len(data.texts)))
    texts = dict(zip(captions, directions))
    scale, bias = grader.logits
    name, first = next(iter(sets.items()))
    classes = ensemble(torch.stack([texts[caption] for caption in first], dim=1))
    logits = scale * cosines_of(features, classes, data.label) + (bias or 0.0)
    outcome = outcome_of(logits, data.truth, sigmoid=bias is not None)
    results = score(outcome, data.truth, data.names)
    results |= {"template_set": name, "templates": list(first), "seconds": seconds, "dtype": name_of(grader.dtype),
                "pictures_read": grader.files_read, "pictures_per_second": grader.files_read / seconds}
    results["template_sets"], results["single_templates"] = compare_templates(features, texts, sets, data)
    results["nearest_picture_of_its_class"] = retrieval(features, data.truth)
    if args.transductive:
        chances = transduce(features, logits).clamp(min=torch.finfo(torch.float64).tiny)  # some are too small for a number
        results["transductive"] = another_way("transductive", chances.log(), data, outcome, output)
        results["transductive"] |= transductive_limits(features, logits, data.truth)
    if args.shots:
        results["few_shot"] = few_shot(grader, features, logits, classes, data, outcome, args.shots, output)
    write_json(output / "results.json", results)
    write_predictions(output / "predictions.csv", data, outcome)
    draw_examples(data, features, outcome, output / "examples.png")
    draw_confusion(data, outcome, classes[data.label], output / "confusion.png")
    draw_calibration(outcome, output / "calibration.png")
    draw_retrieval(data, features, output / "retrieval.png")
    return results, outcome.right, features


def retrieval(features, truth):
    """The share of pictures whose nearest other picture is of their class."""
    return (truth[nearest_pictures(features, 1)[:, 0]] == truth).double().mean().item() if len(truth) > 1 else None


def report(results):
    """Prints what a person wants to know first."""
    low, high = results["intervals"]["top1"]
    print(f"top-1 {results['top1']:.2%} ({low:.1%} to {high:.1%}), top-5 {results['top5']:.2%}, mean per-class recall {results['mean_per_class_recall']:.2%} "
          f"of {results['images']} pictures in {results['classes']} classes")
    known = results["images"] - results["pictures_read"]
    print(f"{results['pictures_read']} pictures read, {results['pictures_per_second']:.0f} a second" if not known else
          f"{known} pictures were known already, {results['pictures_read']} were read now")
    print(f"calibration: error {results['ece']:.1%}, {results['ece_calibrated']:.1%} at a temperature of {results['temperature']:.2f}")
    for i, row in enumerate(results["template_sets"] if len(results["template_sets"]) > 1 else ()):
        low, high = row["difference_interval"]
        print(f"  captions {row['templates']:12} ({row['captions']:2}): top-1 {row['top1']:.2%}"
              + (f", {row['difference']:+.2%} ({low:+.1%} to {high:+.1%}), p {row['mcnemar_p']:.2g}" if i else ""))
    single = results["single_templates"]
    if single["captions"] > 1:
        best = single["best"]
        print(f"  single captions: {single['worst']['top1']:.2%} to {best['top1']:.2%} ({best['template']!r}), {single['mean']:.2%} on average; one chosen"
              f" on half of the pictures has {single['chosen_on_other_half']:.2%} on the others")
    if "transductive" in results:
        way = results["transductive"]
        low, high = way["difference_interval"]
        print(f"transductive: top-1 {way['top1']:.2%}, {way['difference']:+.2%} ({low:+.1%} to {high:+.1%}); where classes come but twice "
              f"{way['two_a_class']['difference']:+.2%}, where four of five classes are absent {way['a_fifth_of_the_classes']['difference']:+.2%}")
    for row in results.get("few_shot", ()):
        print(f"few-shot, {row['shots']} labelled picture{'s' if row['shots'] > 1 else ''}{'' if 'folder' in row else ' a class'}: top-1 {row['top1']:.2%}"
              + (f", {row['difference']:+.2%}" if "folder" in row else f" (zero-shot on the same pictures {row['zero_shot']:.2%})"))
    worst = sorted(results["per_class"].items(), key=lambda item: item[1])[:5]
    print("worst classes: " + ", ".join(f"{name} {recall:.0%}" for name, recall in worst))
    if results["confused"]:
        print("most confused: " + ", ".join(f"{c['truth']} for {c['predicted']} ({c['count']})" for c in results["confused"][:5]))


def main():
    parser = argparse.ArgumentParser(description="CLIP zero-shot classification.", formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, default=MINI / "clip_zeroshot", help="folder with val/{class id}_{number}.png (or .jpg, ...) and id2label.json")
    parser.add_argument("--output", type=Path, default=Path("out/p3_clip"), help="folder for results.json, predictions.csv and the pictures; of several "
                        "models, a folder for each in it, and models.json")
    parser.add_argument("--model", action="append", default=None, help="a file of OpenAI's such as ViT-B-32.pt, a folder of open_clip's or Hugging Face's, "
                        "or a model of open_clip, such as ViT-L-14; once for each model (default: the miniature)")
    parser.add_argument("--pretrained", action="append", default=None, help="weights for a named model: a tag, such as openai, or a file; once for all "
                        "named ones, or once for each model")
    parser.add_argument("--templates", nargs="+", default=None, metavar="SET", help=f"sets of captions, averaged in each: {', '.join(TEMPLATES)}, or a file "
                        "with a caption in each line, {} for the label; the first is the answer, the others are compared with it (default: drawing for the "
                        "miniature, otherwise photo)")
    parser.add_argument("--template", action="append", default=None, metavar="TEXT", help="a caption with {} for the label; several are averaged")
    parser.add_argument("--transductive", action="store_true", help="also classify all pictures together, by their own clusters (TransCLIP); only where "
                        "every class has several pictures")
    parser.add_argument("--shots", nargs="+", default=None, metavar="DIR", help="also classify with labelled pictures (Tip-Adapter): a folder of your own, "
                        "named {class id}_{number}.png; or numbers of pictures a class, drawn from the data, five times, and judged on the rest")
    parser.add_argument("--no-cache", action="store_true", help="read every picture and caption again, and keep nothing; otherwise what was read once is "
                        "found in $XDG_CACHE_HOME or ~/.cache, in the folder p3_clip, which may be deleted")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time; the result does not depend on it")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the image tower; auto: bf16 where it is native (of the "
                        "miniature's 500 pictures it changes the rank of one), otherwise fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, among=("bf16",))
    check_flags(args, ("batch_size",), lambda value: value >= 1, "at least 1")
    models = args.model or [str(MINI / "clip")]
    pretrained = args.pretrained or [None]
    if len(pretrained) not in (1, len(models)):
        raise UserError(f"{len(models)} models and {len(pretrained)} --pretrained: expected one for all, or one for each")
    if len(pretrained) == 1:
        own = [has_weights(model) for model in models]
        pretrained = [None if has and not all(own) else pretrained[0] for has in own]
    if args.template and args.templates:
        raise UserError("give --template or --templates, not both")
    if args.shots and not all(shot.isdigit() and int(shot) > 0 for shot in args.shots) and not (len(args.shots) == 1 and Path(args.shots[0]).is_dir()):
        raise UserError(f"--shots must be a folder of labelled pictures, or numbers from 1, not {' '.join(args.shots)}")
    for template in args.template or ():
        check_template(template, "--template: ")
    for model, weights in zip(models, pretrained):
        check_clip(model, weights)
    data = load_data(args.data)
    if args.output.resolve() == (args.data / "val").resolve():
        raise UserError(f"--output {args.output} is the folder of the pictures that are classified; choose another")
    with lock(writable_folder(args.output)):
        classify_all(args, data, models, pretrained, device, dtype)


def classify_all(args, data, models, pretrained, device, dtype):
    """By each of the models."""
    print(f"{len(data.paths)} pictures from {args.data} by {', '.join(models)} on {describe(device, dtype)}", flush=True)
    rows, rights = [], []
    for name, model, weights in zip(names_of(models, pretrained), models, pretrained):
        usual = ["drawing" if reads_thumbnails(model) else "photo"]
        sets = {"own": tuple(args.template)} if args.template else {s: read_templates(s) for s in args.templates or usual}
        output = args.output if len(models) == 1 else writable_folder(args.output / name)
        results, right, _ = classify(make_grader(model, weights, device, dtype, not args.no_cache), data, sets, args, output)
        if len(models) > 1:
            print(f"== {name} {weights or ''}")
        report(results)
        rows.append({"model": name, "pretrained": weights, **{key: results[key] for key in ("top1", "top5", "mean_per_class_recall", "intervals")}})
        rights.append(right)
    if len(models) > 1:
        print_models(rows, rights)
        write_json(args.output / "models.json", rows)
    each = "models.json and, in a folder for each model, " if len(models) > 1 else ""
    print(f"wrote {each}results.json, predictions.csv, examples.png, confusion.png, calibration.png and retrieval.png to {args.output}")


def names_of(models, pretrained):
    """A name for each model, that will do as a folder's, no two alike."""
    paths = [Path(model) for model in models]
    names = [path.resolve().name if path.is_dir() else path.stem if path.is_file() else str(path).replace("/", "-") for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{Path(weights).stem}" if weights else name for name, weights in zip(names, pretrained)]
    return [name if names.count(name) == 1 else f"{name}_{i + 1}" for i, name in enumerate(names)]


def print_models(rows, rights):
    """A table of models, and how each differs from the first on the same pictures, which is also put into its row."""
    for i, (row, right) in enumerate(zip(rows, rights)):
        row |= {"against_first": paired(right, rights[0])}
        against, (low, high) = row["against_first"], row["against_first"]["difference_interval"]
        print(f"{row['model']:24} top-1 {row['top1']:.2%} ({row['intervals']['top1'][0]:.1%} to {row['intervals']['top1'][1]:.1%})  top-5 {row['top5']:.2%}"
              + (f"  {against['difference']:+.2%} ({low:+.1%} to {high:+.1%}), p {against['mcnemar_p']:.2g}" if i else ""))


if __name__ == "__main__":
    run(main)
