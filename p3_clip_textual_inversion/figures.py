"""Draws the report's figures of textual inversion from the runs of train.

    python -m p3_clip_textual_inversion.figures --runs runs/p3                # p3_words.png, p3_learning.png, p3_steps.png
    python -m p3_clip_textual_inversion.figures --several runs/p3_several     # p3_several.png, of what p3_several.sh drew and measured

p3_words: example pictures beside drawn ones, per prompt. p3_learning: loss, length and nearest ordinary words of each vector along the training.
p3_steps: the same prompt and noise at several training steps.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .concepts import read_concepts
from .data import example_pictures
from .defaults import MINIATURE, input_of, report_of
from .device import progress
from .embedding import add_words, expand, file_of, nearest_words, note_models, read_embedding
from .files import ROOT, UserError, first_line, lock, note, read_json, run, writable_folder
from .formats.words import gather
from .inference import add_arguments, generate, load, settings_of
from .model import MINI_SD
from .pictures import chart, read_picture, save_image, sheet
from .provenance import HelpFormatter
from .tensors import read_tensors


def read_run(folder):
    """(history, {step: rows}) of one concept's run."""
    try:
        history = read_json(folder / "history.json")
        for point in history:
            point["step"], point["loss"], point["norm"]
        snapshots = {int(step): rows for step, rows in read_tensors(folder / "snapshots.safetensors", "run").items()}
    except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a finished run of scripts/p3_train.sh: {first_line(error)}") from None
    return history, dict(sorted(snapshots.items()))


def learning_panels(concept, history, snapshots, parts):
    """Three: the loss, the vectors' mean length, and the nearest words of the first vector at a few steps."""
    def curve(axis, key, title):
        axis.plot([point["step"] for point in history], [point[key] for point in history])
        axis.set(xlabel="step", ylim=(0, 1.2 * max(point[key] for point in history)))
        axis.set_title(title, parse_math=False)

    def words(axis):
        shown = list(snapshots)[:: max(len(snapshots) // 6, 1)]
        lines = [f"{step:5}  " + ", ".join(f"{word} {cosine:.2f}" for word, cosine in nearest_words(parts, snapshots[step][:1])[0]) for step in shown]
        axis.axis("off")
        axis.set_title(f"{concept.token}: the nearest words, and their cosine", parse_math=False)
        axis.text(0, 0.95, "\n".join([" step", *lines]), family="monospace", fontsize=8, va="top", parse_math=False)
    return [partial(curve, key="loss", title=f"{concept.token}: loss"), partial(curve, key="norm", title=f"{concept.token}: length of the vectors"), words]


def draw_several(runs, report):
    """p3_several.png: each prompt by every method, the first eight pictures of a folder that p3_several.sh drew, with what its JSON says of all of them."""
    results, rows = read_json(report / "results" / "p3_several.json"), []
    try:
        for k, prompt in enumerate(results["prompts"]):
            for method, folder in results["folders"].items():
                paths = [runs / "pictures" / folder / str(k) / f"{i}.png" for i in range(min(results["pictures"], 8))]
                rows.append((f"{prompt}: {method}, all in {results['methods'][method][prompt]['both']:.0%}", [read_picture(path) for path in paths]))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{report / 'results' / 'p3_several.json'} is not what scripts/p3_several.sh writes: {first_line(error)}") from None
    writable_folder(report / "figures")
    save_image(sheet([shown for _, shown in rows], titles=[title for title, _ in rows], side=96), report / "figures" / "p3_several.png")
    print(f"wrote figures/p3_several.png to {report}")


def main():
    parser = argparse.ArgumentParser(description="Draws the figures of textual inversion.", formatter_class=HelpFormatter)
    parser.add_argument("--runs", type=Path, default=None, help="folder that train wrote")
    parser.add_argument("--several", type=Path, default=None, metavar="RUNS", help="the --runs of p3_several.sh: only p3_several.png is drawn, into the "
                        "report beside its results")
    parser.add_argument("--report", type=Path, default=None, help="with --several: the folder of its results (default: RUNS/report where that is, otherwise "
                        "the project's report)")
    parser.add_argument("--input", type=Path, default=None, help="the concepts (default: the model's, see defaults.py)")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--output", type=Path, default=None, help="folder for the figures (default: the project's report for the miniature's own concepts, "
                        "otherwise report/figures in --runs)")
    add_arguments(parser)
    args = parser.parse_args()
    if args.several:
        own = args.several / "report"
        draw_several(args.several, args.report or (own if own.is_dir() else ROOT / "report"))
        return
    if args.runs is None:
        parser.error("the following arguments are required: --runs, or --several")
    config, device, defaults, model = settings_of(args)
    args.input = input_of(args.input, defaults.input)
    args.output = args.output or report_of(None, args.input, MINIATURE.input, args.checkpoint, MINI_SD, args.runs) / "figures"
    concepts = read_concepts(args.input)
    vectors, _, origin = gather([args.runs], [concept.token for concept in concepts])
    note_models(origin, model)
    runs = {concept.number: read_run(args.runs / concept.number) for concept in concepts}
    for concept in concepts:
        path = file_of(args.runs, concept.token)
        told = read_embedding(path)[2] if path.is_file() else {}
        beside = next((name for name in ("lora", "custom_diffusion") if told.get(name, "0") not in ("0", "False")), None)
        if beside:
            note(f"{concept.token} learned together with weights (--{beside.replace('_', '-')}), which these figures leave out; p3_infer.sh draws with them")
    examples = {concept.number: example_pictures(concept.folder) for concept in concepts}
    with lock(writable_folder(args.output), "-p3_figures"):
        draw_figures(args, config, device, concepts, vectors, runs, examples)


def draw_figures(args, config, device, concepts, vectors, runs, examples):
    """vectors: {word: rows}; runs, examples: {concept's number: what `read_run` gives; its pictures}."""
    parts = load(args.checkpoint, device, config)
    panels = [panel for concept in concepts for panel in learning_panels(concept, *runs[concept.number], parts)]
    chart(panels, args.output / "p3_learning.png", columns=3, size=(4.4, 2.8))
    learned = add_words(parts, vectors)
    counts = {word: len(rows) for word, rows in vectors.items()}
    first = dict(zip(counts, np.cumsum([0, *counts.values()])))  # of each word's rows
    words, steps = [], []
    for concept in progress(concepts, desc="drawing", unit="concept"):
        words.append((f"examples of {concept.token}", examples[concept.number]))
        for prompt in concept.prompts:
            names = [f"{concept.token}/{prompt}/{i}" for i in range(5)]  # those of inference
            words.append((prompt, [Image.fromarray(p) for p in generate(parts, [expand(prompt, counts)] * 5, names, config)]))
        at = slice(first[concept.token], first[concept.token] + counts[concept.token])
        final = learned.rows.data[at].clone()
        shown = list(runs[concept.number][1])[::2]
        row = []
        for step in shown:
            learned.rows.data[at] = runs[concept.number][1][step].to(device)
            row += [Image.fromarray(p) for p in generate(parts, [expand(concept.prompts[0], counts)], [f"{concept.token}/{concept.prompts[0]}/0"], config)]
        learned.rows.data[at] = final
        steps.append((f"{concept.prompts[0]}: after {', '.join(map(str, shown))} steps", row))
    save_image(sheet([row[:5] for _, row in words], titles=[title for title, _ in words], side=128), args.output / "p3_words.png")
    save_image(sheet([row for _, row in steps], titles=[title for title, _ in steps], side=128), args.output / "p3_steps.png")
    print(f"wrote p3_words.png, p3_learning.png and p3_steps.png to {args.output}")


if __name__ == "__main__":
    run(main)
