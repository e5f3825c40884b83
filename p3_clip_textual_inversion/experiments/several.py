"""Several learned concepts in one picture: the same prompts and noises with every method, scored by whether CLIP finds all of them.

    bash scripts/p3_several.sh                                                               # on the miniature
    bash scripts/p3_several.sh hw2_data/textual_inversion/input.json --checkpoint sd-v1-4.ckpt --runs runs/p3_several_sd

A method needs a training, in RUNS/apart, together, custom, custom_apart or lora_apart: where one is missing, the line that makes it is told, and its methods
are left out. Pictures lie in RUNS/pictures/{method}/{prompt}; what is there already, made alike, is only measured.
"""

import argparse
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..concepts import kind_of, read_concepts
from ..custom_diffusion import merge, read_projections, set_projections, weights_of
from ..data import example_pictures, read_data
from ..defaults import MINIATURE, add_argument, fill_in, input_of, report_of
from ..device import describe, progress
from ..embedding import add_words, expand, note_models
from ..evaluate import add_judge_arguments, judge_of
from ..files import UserError, check_flags, fingerprint, lock, note, run, writable_folder, write_json
from ..formats.identity import weights_fingerprint
from ..formats.words import gather
from ..inference import add_arguments, generate, load, settings_of
from ..lora import add_loras, find_loras, ordinary_captions
from ..measures import drift, wilson
from ..model import MINI_SD
from ..pictures import read_picture, save_image
from ..places import AUTO
from ..provenance import HelpFormatter, Made, batches_with, claim, script_line
from ..regions import plans_of
from ..tensors import tensor_fingerprint
from .finders import half_crops, make_finders

NEXT = " next to "
METHODS = {  # name: (run whose words it uses, where its other weights come from, regions)
    "words learned apart": ("apart", None, ()),
    "words learned apart, regions": ("apart", None, AUTO),
    "words learned together": ("together", None, ()),
    "words learned together, regions": ("together", None, AUTO),
    "Custom Diffusion, together": ("custom", "run", ()),
    "Custom Diffusion, together, regions": ("custom", "run", AUTO),
    "Custom Diffusion, apart, merged": ("custom_apart", "merged", ()),
    "Custom Diffusion, apart, merged, regions": ("custom_apart", "merged", AUTO),
    "LoRA, apart, summed": ("lora_apart", "summed", ()),
    "LoRA, apart, summed, regions": ("lora_apart", "summed", AUTO),
}


def slug(name):
    return name.lower().replace(",", "").replace(" ", "-")


def prepare(method, args, concepts, model, device, config):
    """(model with the method's words and other weights, {word: rows}, fingerprints of what was learned)"""
    source, weights, regions = METHODS[method]
    folder = args.runs / source
    parts = load(args.checkpoint, device, config)
    words, _, origin = gather([folder], [concept.token for concept in concepts])
    words = {concept.token: words[concept.token] for concept in concepts}
    if not regions:  # once: with regions the same words are drawn again
        note_models({word: origin[word] for word in words}, model)
    counts = {word: len(rows) for word, rows in words.items()}
    add_words(parts, words)
    files = []
    if weights == "run":
        files = [folder / "+".join(c.number for c in concepts) / "projections.safetensors"]
        set_projections(parts.unet, read_projections(files[0], parts.unet))
    elif weights == "merged":
        files = [folder / concept.number / "projections.safetensors" for concept in concepts]
        set_projections(parts.unet, merged(parts, concepts, counts, [read_projections(file, parts.unet) for file in files], args.row))
    elif weights == "summed":  # they stay in the model for every prompt, also where a prompt has not their word
        loras = find_loras((), origin)
        add_loras(parts, loras, 1.0).use(loras)
        files = list(loras.values())
    made_of = {"words": {word: tensor_fingerprint(rows) for word, rows in words.items()}, "projections": [fingerprint(file) for file in files]}
    return parts, counts, made_of


@torch.inference_mode()
def merged(parts, concepts, counts, tuned, row):
    """Projections tuned apart, merged by custom_diffusion.merge."""
    targets = []
    for concept in concepts:  # the hidden states of its words in its captions, which is what its projections learned
        captions = [expand(t.format(concept.token), counts) for t in row.templates[kind_of(concept)]]
        ids, hidden = parts.tokens(captions), parts.encode_text(captions).cpu()
        targets.append(hidden[parts.text_encoder.get_input_embeddings().is_new(ids).cpu()])
    captions, kept = ordinary_captions(parts.tokenizer, row.templates["object"]), []  # of the whole vocabulary: few would hold few directions
    for some in (captions[i:i + 64] for i in range(0, len(captions), 64)):
        ids, hidden = parts.tokens(some), parts.encode_text(some).cpu()
        kept.append(hidden[ids != parts.tokenizer.pad_token_id])
    return merge(weights_of(parts.unet), tuned, targets, torch.cat(kept))


def make_prompts(args, concepts, finders):
    """[(prompt, keys of the finders that must find)]: two subjects, a subject and an ordinary thing, three subjects, a subject in a style."""
    subjects = [c for c in concepts if kind_of(c) == "object"]
    styles = [c for c in concepts if kind_of(c) == "style"]
    groups = [*pairwise(subjects), *([subjects[:3]] if len(subjects) > 2 else [])]
    prompts = [(NEXT.join(f"a {c.token}" for c in group), tuple(c.number for c in group)) for group in groups]
    prompts += [(f"a {subject.token}{NEXT}a {args.ordinary}", (subject.number, "ordinary")) for subject in subjects[:1]]
    for subject, style in zip(subjects[:1], styles[:1]):
        keys = (f"{subject.number} in {style.number}", f"{style.number} on {subject.number}")
        keys = keys if keys[0] in finders else (subject.number, style.number)
        prompts.append((f"a {args.row.medium} of a {subject.token} in the style of {style.token}", keys))
    return prompts


def draw_method(method, args, concepts, prompts, model, device, config, bar):
    """Draws what is missing of a method's pictures. Returns [their paths] of the ordinary ones, then of each prompt."""
    parts, counts, made_of = prepare(method, args, concepts, model, device, config)
    folder = writable_folder(args.runs / "pictures" / slug(method))
    own = {f"ordinary/{i}.png": {"prompt": prompt, "noise": prompt} for i, prompt in enumerate(args.ordinary_prompts)}  # first: in the untouched one's batches
    own |= {f"{k}/{i}.png": {"prompt": prompt, "noise": f"{prompt}/{i}"} for k, (prompt, _) in enumerate(prompts) for i in range(args.num_images)}
    for name in {Path(name).parent for name in own}:
        writable_folder(folder / name)
    # the name that pictures have which were drawn before there was this room
    made = Made("p3_clip_textual_inversion.several", config.told(), {"model": model, "weights": weights_fingerprint(args.checkpoint), **made_of})
    missing = own.keys() - claim(folder, made, own, config.batch_size, {"device": describe(device, config.dtype)}, args.overwrite)
    names = [name for batch in batches_with(missing, list(own), config.batch_size) for name in batch]
    texts, noises = [expand(own[name]["prompt"], counts) for name in names], [own[name]["noise"] for name in names]  # noises alike for all methods
    bar.update(len(own) - len(names))
    for name, picture in zip(names, generate(parts, texts, noises, config, plans_of(texts, config, counts), bar)):
        if name in missing:
            save_image(picture, folder / name, made.with_own(own[name]).as_json())
    return [[folder / name for name in own if Path(name).parts[0] == part] for part in ("ordinary", *map(str, range(len(prompts))))]


def known_words(args, config, parts, grader):
    """What words can do that the model knows, {"words" or "words, regions": {...}, "times": how much longer the latter take}: "a A next to a B" of ordinary
    things, by seed. Both are there where CLIP, among all those names, takes one half for one of them and the other half for the other."""
    names = list(dict.fromkeys((args.ordinary, *args.row.ordinary)))  # of two alike CLIP would find one
    rng, results = np.random.default_rng(config.seed), {}
    pairs = [rng.choice(len(names), 2, replace=False).tolist() for _ in range(args.num_images)]
    prompts = [f"a {names[a]}{NEXT}a {names[b]}" for a, b in pairs]
    directions = grader.of_texts([f"a {args.row.medium} of a {name}" for name in names])
    for way, regions in (("words", ()), ("words, regions", AUTO)):
        started = time.perf_counter()
        plans = plans_of(prompts, replace(config, regions=regions), {})
        with progress(total=len(prompts), unit="picture", desc=f"known {way}") as bar:
            pictures = [Image.fromarray(p) for p in generate(parts, prompts, [f"known/{i}" for i in range(len(pairs))], config, plans, bar)]
        seconds = (time.perf_counter() - started) / len(pairs)
        halves = (grader.of_pictures([half for picture in pictures for half in half_crops(picture)]) @ directions.T).argmax(1).reshape(-1, 2)
        hits = sum(sorted(found) == sorted(pair) for found, pair in zip(halves.tolist(), pairs))
        results[way] = {"both": hits / len(pairs), "interval": wilson(hits, len(pairs)), "seconds_per_picture": seconds, "pictures": len(pairs)}
        print(f"known {way}: both in {hits} of {len(pairs)}, {seconds:.2f} s each", flush=True)
    return results | {"times": results["words, regions"]["seconds_per_picture"] / results["words"]["seconds_per_picture"]}


def check_runs(args):
    """The methods whose training is there; a note for each other training, with the line that makes it."""
    lines = {}
    for name, (steps, flags) in args.row.several.runs.items():
        if not (args.runs / name).is_dir():
            count = len(read_concepts(args.input)) if "--joint" in flags else 1
            lines[name] = script_line("p3_train.sh", args.input, "--checkpoint", args.checkpoint, "--output", args.runs / name, "--sample-every", 0,
                                      "--steps", steps * count, *flags)
    methods = [method for method, (source, *_) in METHODS.items() if source not in lines]
    if not methods:
        raise UserError(f"{args.runs} has none of the trainings that are compared; the first is made by: {lines['apart']}")
    for name, line in lines.items():
        note(f"{args.runs / name} is not there, and its methods are left out; it is made by: {line}")
    return methods


def parse_args():
    parser = argparse.ArgumentParser(description="Compares ways to draw several learned concepts in one picture.", formatter_class=HelpFormatter)
    parser.add_argument("input", type=Path, nargs="?", default=None, metavar="INPUT_JSON", help="the concepts (default: the model's, see defaults.py)")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--runs", type=Path, default=Path("runs/p3_several"),
                        help="folder of the trainings apart, together, custom, custom_apart, lora_apart, and for the pictures")
    parser.add_argument("--report", type=Path, default=None, help="folder for results/p3_several.json (default: the project's report for the miniature's own "
                        "concepts, otherwise RUNS/report)")
    add_argument(parser, "several", "--ordinary", "ordinary thing that stands beside the first subject")
    add_argument(parser, "several", "--ordinary-pictures", "pictures of ordinary things, to set the score's thresholds by", type=Path)
    parser.add_argument("--num-images", type=int, default=100, help="pictures per prompt and method")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what is there of other settings or words, which is refused otherwise")
    add_judge_arguments(parser)
    add_arguments(parser)
    args = parser.parse_args()
    check_flags(args, ("num_images",), lambda value: 1 <= value <= 10**6, "between 1 and 1000000")
    return args


def main():
    args = parse_args()
    config, device, args.row, model = settings_of(args)
    args.input = input_of(args.input, args.row.several.input)
    args.report = report_of(args.report, args.input, MINIATURE.several.input, args.checkpoint, MINI_SD, args.runs)
    fill_in(args, args.row.several)
    concepts = read_concepts(args.input)
    if all(kind_of(concept) == "style" for concept in concepts):
        raise UserError(f"{args.input} has no subject, only styles; several concepts in one picture need one")
    paths, classes, labels = read_data(args.ordinary_pictures)
    if len(set(classes)) < 2:
        raise UserError(f"{args.ordinary_pictures} needs pictures of at least two classes: one half sets the score, the other tries it")
    for concept in concepts:
        if len(example_pictures(concept.folder)) < 3:
            raise UserError(f"{concept.folder} needs at least 3 pictures: two are kept to set and to try the score")
    writable_folder(args.report / "results")
    others = [read_picture(paths[classes.index(number)]) for number in dict.fromkeys(classes)]  # one of each class
    methods = check_runs(args)
    writable_folder(args.runs / "pictures")
    with lock(args.report, "-p3_several"):
        compare(args, config, device, model, concepts, methods, others, list(labels.values()))


def compare(args, config, device, model, concepts, methods, others, labels):
    """Draws, measures and writes it all. others: an ordinary picture of each class, of the names `labels`."""
    grader = judge_of(args.row, args, device=device)
    finders, validation = make_finders(grader, concepts, args.input.parent, args.row, others, args.ordinary, labels, config.side or args.row.side)
    prompts = make_prompts(args, concepts, finders)
    for key, row in validation.items():
        print(f"score of {key}: found in {row['found_where_present']:.0%} of {row['present']} real pictures with it, "
              f"in {row['found_where_absent']:.0%} of {row['absent']} without")
    args.ordinary_prompts = [args.row.templates["object"][-1].format(word) for word in args.row.several.moved]
    untouched = load(args.checkpoint, device, config)
    originals = list(generate(untouched, args.ordinary_prompts, args.ordinary_prompts, config))
    known = known_words(args, config, untouched, grader)
    del untouched
    results, drifts, shown = {}, {}, {}
    with progress(total=len(methods) * (len(prompts) * args.num_images + len(originals)), unit="picture", desc="drawing") as bar:
        for method in methods:
            regions = METHODS[method][2]
            ordinary, *drawn = draw_method(method, args, concepts, prompts, model, device, replace(config, regions=regions), bar)
            drifts[method] = drift([np.asarray(read_picture(path)) for path in ordinary], originals, grader)
            results[method], shown[method] = {}, slug(method)
            for (prompt, keys), files in zip(prompts, drawn):
                pictures = [read_picture(path) for path in files]
                found = torch.stack([finders[key](pictures) for key in keys])
                hits = int(found.all(0).sum())
                results[method][prompt] = {"both": hits / len(files), "interval": wilson(hits, len(files)),
                                           **{f"finds {key}": found[i].float().mean().item() for i, key in enumerate(keys)}}
    write_json(args.report / "results" / "p3_several.json", {
        "methods": results, "known": known, "drift": drifts, "validation": validation, "pictures": args.num_images, "guidance_weight": config.guidance_weight,
        "steps": config.num_steps, "seed": config.seed, "folders": shown, "prompts": [prompt for prompt, _ in prompts],
        "model": model, "judge": Path(args.model or args.row.judge).name})
    print_table(results, drifts)
    line = script_line("p3_figures.sh", "--several", args.runs, "--report", args.report)
    print(f"wrote results/p3_several.json to {args.report}\nnext: {line}  # draws p3_several.png")


def print_table(results, drifts):
    for prompt in next(iter(results.values())):
        print(prompt)
        for method, rows in results.items():
            row = rows[prompt]
            print(f"  {method:42} all {row['both']:4.0%} ({row['interval'][0]:.0%} to {row['interval'][1]:.0%})  "
                  + ", ".join(f"{key} {value:.0%}" for key, value in row.items() if key.startswith("finds")))
    print("ordinary prompts, against the untouched model")
    for method, row in drifts.items():
        print(f"  {method:42} {row['grey_levels']:5.1f} grey levels, CLIP's cosine {row['clip_cosine']:.0f}")


if __name__ == "__main__":
    run(main)
