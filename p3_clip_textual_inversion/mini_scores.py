"""What the miniature's models are worth: retrieval by CLIP, reconstruction by the VAE, and whether CLIP recognises what Stable Diffusion draws.

    python -m p3_clip_textual_inversion.mini_scores --drawings runs/emoji.npz      # report/results/p3_mini.json, report/figures/p3_mini.png

Needs the file of make_mini drawings. Without a Stable Diffusion, its scores are left out.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .clip import Grader, image_features, load_clip, text_classifier
from .compare import rest_of
from .concepts import read_concepts
from .data import example_pictures, read_data
from .device import DTYPES, pick_device, pick_dtype
from .evaluate import clip_scores
from .files import MINI, ROOT, check_flags, run, writable_folder, write_json
from .make_mini import SUBJECT
from .pictures import save_image, to_uint8
from .world import CLIP_STYLES, COLOURS, KEPT_OUT, SIDE, SILHOUETTES, STYLES, SUBJECTS, UNSEEN_STYLE, Drawings, Scene, compose, drawing_of, random_scene, words

COUNT = 1000


@torch.inference_mode()
def retrieval(clip, tokenizer, drawings, device):
    """Recall@1 of names among all trained ones, on new renderings in trained styles."""
    rng, generator = np.random.default_rng(10**6), torch.Generator().manual_seed(10**6)  # no training step's seed
    names = drawings.trained
    chosen = rng.permutation(len(names))[:COUNT]
    scenes = [random_scene(rng, drawings, names[i], CLIP_STYLES, tell_style=0, tell_colour=0) for i in chosen]
    pictures = compose(drawings, scenes, generator)
    features = image_features(clip, pictures.split(100), device, torch.float32)
    directions = text_classifier(clip, tokenizer, [words(name) for name in names], ["a drawing of a {}"], device)
    found = (features @ directions.T).argmax(1).cpu().numpy()
    return {"recall_at_1": float((found == chosen).mean()), "pictures": len(chosen), "names": len(names)}


@torch.inference_mode()
def reconstruction(vae, drawings, device):
    """Mean PSNR in dB on drawings that the VAE never saw: a whole style, and the subjects kept out."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    unseen = [(name, UNSEEN_STYLE) for name in rng.permutation([n for n, styles in drawings.table.items() if UNSEEN_STYLE in styles])[:200]]
    unseen += [(name, style) for name in KEPT_OUT for style in drawings.table[name]]
    scenes = [random_scene(rng, drawings, str(name), (style,)) for name, style in unseen]
    pictures = compose(drawings, scenes, generator)
    again = torch.cat([vae.decode(vae.encode(part.to(device)).latent_dist.mean).sample.cpu() for part in pictures.split(32)])
    error = np.square(to_uint8(pictures).astype(float) - to_uint8(again)).mean(axis=(1, 2, 3))
    return {"psnr": float((10 * np.log10(255**2 / error)).mean()), "pictures": len(pictures)}


@torch.inference_mode()
def recognition(pipeline, clip, tokenizer, names, device, dtype, per_class, steps, guidance_weight):
    """The share of pictures "a drawing of a {name}" that CLIP takes for that name among all; the pictures, uint8 [classes, per_class, H, W, 3]."""
    directions = text_classifier(clip, tokenizer, names, ["a drawing of a {}"], device)
    jobs = [(i, k) for i in range(len(names)) for k in range(per_class)]
    pictures, started = [], time.perf_counter()
    for start in tqdm(range(0, len(jobs), 8), desc="drawing", unit="8 pictures"):
        batch = jobs[start:start + 8]
        generators = [torch.Generator().manual_seed(1000 * k + i) for i, k in batch]
        prompts = ["a drawing of " + drawing_of(names[i]) for i, _ in batch]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pictures.append(pipeline(prompts, num_inference_steps=steps, guidance_scale=1 + guidance_weight, generator=generators, height=SIDE, width=SIDE,
                                     output_type="pt").images.float() * 2 - 1)
    seconds = (time.perf_counter() - started) / len(jobs)
    pictures = torch.cat(pictures)
    found = (image_features(clip, pictures.split(100), device, torch.float32) @ directions.T).argmax(1).cpu()
    truth = torch.tensor([i for i, _ in jobs])
    result = {"top1": (found == truth).float().mean().item(), "pictures": len(jobs), "steps": steps, "guidance_weight": guidance_weight,
              "seconds_per_picture": seconds}
    return result, to_uint8(pictures).reshape(len(names), per_class, SIDE, SIDE, 3)


def scores_of_scenes(drawings, scenes, generator, grader, references, caption):
    """(image scores, text scores) of pictures composed afresh from real drawings."""
    pictures = [Image.fromarray(picture) for picture in to_uint8(compose(drawings, scenes, generator))]
    return clip_scores(grader.of_pictures(pictures), references, caption)


@torch.inference_mode()
def real_pictures(drawings, grader):
    """Per prompt of input.json the scores (as in compare.py) that real drawings get, of the concept and, for a style, of its subject in the trained styles:
    what a perfect word would reach, and whether the score tells the concept at all."""
    rows, rng, generator = {}, np.random.default_rng(2), torch.Generator().manual_seed(2)
    for concept in read_concepts(MINI / "textual_inversion" / "input.json"):
        references = grader.of_pictures(example_pictures(concept.folder))
        for prompt in concept.prompts:
            rest = rest_of(prompt, concept.token)
            named = [name for name in SUBJECTS if re.search(rf"\b{words(name)}\b", rest)]
            colours = [colour for colour in COLOURS if f"on a {colour} background" in rest] or list(COLOURS)
            ways = {"real": (SILHOUETTES,), "other styles": STYLES}
            if concept.src_image != words(SILHOUETTES):
                named, ways = [SUBJECT[0], *named], {"real": SUBJECT[1:]}
            for way, styles in ways.items():
                scenes = [Scene(tuple(drawings.table[name][styles[i % len(styles)]] for name in named), str(rng.choice(colours)), "") for i in range(40)]
                image, rest_score = scores_of_scenes(drawings, scenes, generator, grader, references, grader.of_texts([rest])[0])
                rows.setdefault(prompt, {})[way] = {"image": image.mean().item(), "image_deviation": image.std().item(), "rest": rest_score.mean().item()}
    return rows


@torch.inference_mode()
def style_subjects(drawings, grader):
    """[(subject, gain, share)], best first: the subjects in which CLIP's scores can show a style of silhouettes. On real drawings, so that no drawing model
    has a say: gain is by how much `stencil`, the nearest style that the miniature of Stable Diffusion knows, raises the image score above colour, share what
    it leaves of the score of "a drawing of a SUBJECT". Left out is where less than nine tenths are left, or real silhouettes score no better than colour."""
    rng, generator, rows = np.random.default_rng(5), torch.Generator().manual_seed(5), []
    references = grader.of_pictures(example_pictures(MINI / "textual_inversion" / "1"))
    for name in tqdm([name for name in SUBJECTS if SILHOUETTES in drawings.table[name]], desc="styles of subjects", unit="subject"):
        caption = grader.of_texts([f"a drawing of {drawing_of(name)} in the style of"])[0]
        image, text = {}, {}
        for way, styles, rendering in (("real", (SILHOUETTES,), None), ("coloured", STYLES, None), ("stencil", STYLES, "stencil")):
            there = [style for style in styles if style in drawings.table[name]]
            scenes = [Scene((drawings.table[name][there[i % len(there)]],), str(rng.choice(list(COLOURS))), "", rendering) for i in range(40)]
            scores = scores_of_scenes(drawings, scenes, generator, grader, references, caption)
            image[way], text[way] = (score.mean().item() for score in scores)
        if text["stencil"] >= 0.9 * text["coloured"] and image["real"] > image["coloured"]:
            rows.append((name, image["stencil"] - image["coloured"], text["stencil"] / text["coloured"]))
    return sorted(rows, key=lambda row: -row[1])


def contact_sheet(pictures, names, columns=10):
    """Titles over pictures: every name's first picture."""
    cell = SIDE + 18
    sheet = Image.new("RGB", (columns * (SIDE + 6), -(-len(names) // columns) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for i, name in enumerate(names):
        left, top = i % columns * (SIDE + 6), i // columns * cell
        draw.text((left + SIDE // 2, top + 8), name, "black", font, anchor="mm")
        sheet.paste(Image.fromarray(pictures[i, 0]), (left, top + 16))
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Scores the miniature's models of P3.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True, metavar="NPZ", help="file that make_mini drawings wrote")
    parser.add_argument("--clip", type=Path, default=MINI / "clip", help="folder of CLIP")
    parser.add_argument("--sd", type=Path, default=MINI / "stable_diffusion", help="folder of Stable Diffusion")
    parser.add_argument("--output", type=Path, default=ROOT / "report", help="folder for results/p3_mini.json and figures/p3_mini.png")
    parser.add_argument("--per-class", type=int, default=4, help="pictures per class by Stable Diffusion")
    parser.add_argument("--steps", type=int, default=25, help="its sampling steps")
    parser.add_argument("--guidance-weight", type=float, default=3.0, help="w of its guidance; diffusers' scale is 1+w")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="its number format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_flags(args, ("per_class", "steps"), lambda value: value >= 1, "at least 1")
    device, drawings = pick_device(args.device), Drawings(args.drawings)
    for name in ("results", "figures"):
        writable_folder(args.output / name)
    clip, _, tokenizer = load_clip(str(args.clip), None, device)
    grader = Grader(args.clip, None, device)
    scores = {"clip": retrieval(clip, tokenizer, drawings, device), "prompts": real_pictures(drawings, grader)}
    subjects = style_subjects(drawings, grader)
    print("subjects that show a style: " + ", ".join(f"{name} {gain:+.1f} ({share:.0%})" for name, gain, share in subjects))
    if args.sd.is_dir():
        pipeline = StableDiffusionPipeline.from_pretrained(args.sd, local_files_only=True, safety_checker=None).to(device, torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        scores["vae"] = reconstruction(pipeline.vae, drawings, device)
        names = list(read_data(MINI / "clip_zeroshot")[2].values())
        scores["stable_diffusion"], pictures = recognition(pipeline, clip, tokenizer, names, device, pick_dtype(args.dtype, device), args.per_class,
                                                           args.steps, args.guidance_weight)
        save_image(contact_sheet(pictures, names), args.output / "figures" / "p3_mini.png")
    for name, row in scores.items():
        for key, value in row.items():
            print(f"{name}: {key} " + (f"{value:.4g}" if not isinstance(value, dict) else ", ".join(
                f"{way}: image {score['image']:.1f}, rest {score['rest']:.1f}" for way, score in value.items())))
    write_json(args.output / "results" / "p3_mini.json", scores | {"style_subjects": {name: {"gain": gain, "share": share} for name, gain, share in subjects}})
    print(f"wrote results/p3_mini.json{' and figures/p3_mini.png' if args.sd.is_dir() else ''} to {args.output}")


if __name__ == "__main__":
    run(main)
