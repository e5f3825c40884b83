"""Several learned concepts in one picture: the same prompts and noises with every method, scored by whether CLIP finds both.

    python -m p3_clip_textual_inversion.multi                                                              # on the miniature
    python -m p3_clip_textual_inversion.multi hw2_data/textual_inversion/input.json --checkpoint sd-v1-4.ckpt --output runs/p3_multi_sd

Trains what is missing: words learned apart and together, and Custom Diffusion together and apart, merged. Then draws with each, and with words learned
apart and Custom Diffusion under the guidance of compose.py.
"""

import argparse
import subprocess
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from .compose import SEPARATOR, regional, toward_style
from .custom_diffusion import merge, read_weights, set_weights, weights_of
from .data import example_pictures, kind_of, read_concepts, read_data
from .defaults import ROWS, HelpFormatter, add_argument, fill_in, input_of
from .device import progress
from .diffusion import Guided
from .embedding import add_words, expand, read_embeddings
from .evaluate import add_judge_arguments, judge_of
from .files import ROOT, UserError, check_flags, run, writable_folder, write_json
from .finders import make_finders
from .guard import command as command_of
from .inference import add_arguments, draw, load, settings_of
from .measures import drift, wilson
from .pictures import read_picture, save_image, sheet
from .stable_diffusion import MINI_SD

METHODS = {  # name: (run whose words it uses, where its projections come from, what guidance_of takes as options)
    "words learned apart": ("apart", None, None),
    "words learned together": ("together", None, None),
    "Custom Diffusion, together": ("custom", "run", None),
    "Custom Diffusion, apart, merged": ("custom_apart", "merged", None),
    "apart, composed noise estimates": ("apart", None, {"whole": 0.3, "masks": None}),
    "apart, regional or style guidance": ("apart", None, {}),
    "Custom Diffusion, together, regional or style guidance": ("custom", "run", {}),
}


def prepare(method, args, concepts, device, config):
    """(model with the method's words and projections, {word: number of vectors})"""
    source, weights, _ = METHODS[method]
    folder = args.output / source
    parts = load(args.checkpoint, device, config)
    vectors = read_embeddings(folder, [concept.token for concept in concepts])
    base = weights_of(parts.unet) if weights else None
    learned_words = {concept.token: vectors[concept.token] for concept in concepts}
    counts = {word: len(rows) for word, rows in learned_words.items()}
    add_words(parts, learned_words)
    if weights == "run":
        set_weights(parts.unet, read_weights(folder / "+".join(c.number for c in concepts) / "projections.safetensors", parts.unet))
    elif weights == "merged":
        tuned = [read_weights(folder / concept.number / "projections.safetensors", parts.unet) for concept in concepts]
        templates = args.row.templates
        with torch.inference_mode():
            targets = []
            for concept in concepts:  # the hidden states of its words in its captions, which is what its projections learned
                captions = [expand(t.format(concept.token), counts) for t in templates[kind_of(concept)]]
                ids, hidden = parts.tokens(captions), parts.encode_text(captions).cpu()
                targets.append(hidden[parts.text_encoder.get_input_embeddings().is_new(ids).cpu()])
            captions = [t.format(word) for t in templates["object"] for word in args.row.ordinary]
            ids, hidden = parts.tokens(captions), parts.encode_text(captions).cpu()
        set_weights(parts.unet, merge(base, tuned, targets, hidden[ids != parts.tokenizer.pad_token_id]))
    return parts, counts


def guidance_of(parts, text, concepts, counts, options, args):
    """What `draw` takes as `guided` for a prompt (words written out). options: of `regional`; None for plain guidance, {} for all that compose.py has."""
    if options is None:
        return Guided
    there = [(concept, written) for concept in concepts if (written := expand(concept.token, counts)) in text]
    subject = next(concept for concept, _ in there if kind_of(concept) == "object")
    for _, style in (pair for pair in there if kind_of(pair[0]) == "style"):
        plain = f"a {args.row.medium} of a {subject.src_image}"
        return toward_style(parts, plain, f"{plain} in the style of {style}") if options == {} else Guided
    return regional(parts, text, **options)


def train_missing(args, concepts):
    """Every run of the model's row of the table; what is trained already stays."""
    given = [f"--{flag}={value}" for flag, value in (("side", args.side), ("batch-size", args.train_batch_size), ("dtype", args.dtype)) if value is not None]
    given += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    for name, (steps, flags) in args.row.several.runs.items():
        command = [*command_of(f"{__package__}.train"), args.input, "--checkpoint", args.checkpoint, "--output", args.output / name,
                   "--sample-every", 0, "--steps", (args.train_steps or steps) * (len(concepts) if "--joint" in flags else 1), "--seed", args.seed,
                   "--device", args.device, *flags, *given]
        print(f"== learning: {name}", flush=True)
        if subprocess.run(list(map(str, command)), check=False).returncode:
            raise UserError(f"the training {name} failed")


def make_prompts(args, concepts, finders):
    """[(prompt, keys of the finders that must find)]: two subjects, a subject and an ordinary thing, a subject in a style."""
    subjects = [c for c in concepts if kind_of(c) == "object"]
    styles = [c for c in concepts if kind_of(c) == "style"]
    prompts = [(f"a {a.token}{SEPARATOR}a {b.token}", (a.number, b.number)) for a, b in pairwise(subjects)]
    prompts += [(f"a {subject.token}{SEPARATOR}a {args.ordinary}", (subject.number, "ordinary")) for subject in subjects[:1]]
    for subject, style in zip(subjects[:1], styles[:1]):
        keys = (f"{subject.number} in {style.number}", f"{style.number} on {subject.number}")
        keys = keys if keys[0] in finders else (subject.number, style.number)
        prompts.append((f"a {args.row.medium} of a {subject.token} in the style of {style.token}", keys))
    return prompts


def parse_args():
    parser = argparse.ArgumentParser(description="Compares ways to draw several learned concepts in one picture.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("input", type=Path, nargs="?", default=None, metavar="INPUT_JSON", help="the concepts (default: the model's, see defaults.py)")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--output", type=Path, default=Path("runs/p3_multi"), help="folder for the trainings")
    parser.add_argument("--report", type=Path, default=ROOT / "report", help="folder for results/p3_multi.json and figures/p3_multi.png")
    add_argument(parser, "several", "--ordinary", "ordinary thing that stands beside the first subject")
    add_argument(parser, "several", "--ordinary-pictures", "pictures of ordinary things, to set the score's thresholds by", type=Path)
    parser.add_argument("--train-steps", type=int, default=None, help="steps per concept of each training (default: the model's, "
                        + ", ".join(f"{row.name} {sorted({steps for steps, _ in row.several.runs.values()})}" for row in ROWS) + ")")
    parser.add_argument("--train-batch-size", type=int, default=None, help="latents per step of each training (default: the model's)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in the trainings: less memory, more time")
    parser.add_argument("--num-images", type=int, default=50, help="pictures per prompt and method")
    add_judge_arguments(parser)
    add_arguments(parser)
    args = parser.parse_args()
    check_flags(args, ("num_images", "train_steps", "train_batch_size"), lambda value: value is None or 1 <= value <= 10**6, "between 1 and 1000000")
    return args


def main():
    args = parse_args()
    config, device, args.row, _ = settings_of(args)
    fill_in(args, args.row.several)
    args.input = input_of(args.input, args.row.several.input)
    concepts = read_concepts(args.input)
    if all(kind_of(concept) == "style" for concept in concepts):
        raise UserError(f"{args.input} has no subject, only styles; several concepts in one picture need one")
    paths, classes, labels = read_data(args.ordinary_pictures)
    if len(set(classes)) < 2:
        raise UserError(f"{args.ordinary_pictures} needs pictures of at least two classes: one half sets the score, the other tries it")
    for concept in concepts:
        if len(example_pictures(concept.folder)) < 3:
            raise UserError(f"{concept.folder} needs at least 3 pictures: two are kept to set and to try the score")
    for name in ("results", "figures"):
        writable_folder(args.report / name)
    writable_folder(args.output)
    others = [read_picture(paths[classes.index(number)]) for number in dict.fromkeys(classes)]  # one of each class
    grader = judge_of(args.row, args, device=device)
    finders, validation = make_finders(grader, concepts, args.input.parent, args.row, others, args.ordinary, list(labels.values()))
    prompts = make_prompts(args, concepts, finders)
    for key, row in validation.items():
        print(f"score of {key}: found in {row['found_where_present']:.0%} of {row['present']} real pictures with it, "
              f"in {row['found_where_absent']:.0%} of {row['absent']} without")
    train_missing(args, concepts)
    rows, results, drifts = [], {}, {}
    ordinary = [args.row.templates["object"][-1].format(word) for word in args.row.ordinary]
    originals = list(draw(load(args.checkpoint, device, config), ordinary, ordinary, config))
    with progress(total=len(METHODS) * len(prompts) * args.num_images, unit="picture", desc="drawing") as bar:
        for method, (_, _, guidance) in METHODS.items():
            parts, counts = prepare(method, args, concepts, device, config)
            results[method], drifts[method] = {}, drift(list(draw(parts, ordinary, ordinary, config)), originals, grader)
            for prompt, keys in prompts:
                text = expand(prompt, counts)
                guided = guidance_of(parts, text, concepts, counts, guidance, args)
                names = [f"{prompt}/{i}" for i in range(args.num_images)]  # the same noises for every method
                pictures = [Image.fromarray(p) for p in draw(parts, [text] * args.num_images, names, config, guided, bar)]
                found = torch.stack([finders[key](pictures) for key in keys])
                both = int(found.all(0).sum())
                results[method][prompt] = {"both": both / args.num_images, "interval": wilson(both, args.num_images),
                                           **{f"finds {key}": found[i].float().mean().item() for i, key in enumerate(keys)}}
                rows.append((f"{prompt}: {method}, both in {both} of {args.num_images}", pictures[:8]))
    write_json(args.report / "results" / "p3_multi.json", {"methods": results, "drift": drifts, "validation": validation, "pictures": args.num_images,
                                                           "guidance_weight": config.guidance_weight, "steps": config.num_steps})
    rows = [row for k in range(len(prompts)) for row in rows[k::len(prompts)]]  # by prompt
    side = 64 if config.side is None else 96
    save_image(sheet([shown for _, shown in rows], titles=[title for title, _ in rows], side=side), args.report / "figures" / "p3_multi.png")
    for prompt, _ in prompts:
        print(prompt)
        for method in METHODS:
            row = results[method][prompt]
            print(f"  {method:54} both {row['both']:4.0%} ({row['interval'][0]:.0%} to {row['interval'][1]:.0%})  "
                  + ", ".join(f"{key} {value:.0%}" for key, value in row.items() if key.startswith("finds")))
    print("ordinary prompts, against the untouched model")
    for method, row in drifts.items():
        print(f"  {method:54} {row['grey_levels']:5.1f} grey levels, CLIP's cosine {row['clip_cosine']:.0f}")
    print(f"wrote results/p3_multi.json and figures/p3_multi.png to {args.report}")


if __name__ == "__main__":
    run(main)
