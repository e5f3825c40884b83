"""Grades pictures of learned words by CLIP, as the course does.

    python -m p3_clip_textual_inversion.evaluate OUT INPUT_JSON

The judge follows the pictures: thumbnails are the miniature's and judged by the miniature of CLIP, all others by the course's grader, CLIP ViT-B/32 by OpenAI.
Per picture: image score = the mean over the concept's example pictures of 100 cosine(picture, example); text score = 100 cosine(picture,
prompt_4_clip_eval). Per prompt: both are averaged over the five pictures with the largest image + 2.5 text, and pass where both reach the baseline.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from .clip import Grader
from .data import example_pictures, read_concepts
from .defaults import ROWS, SD_V1, WEIGHTS, HelpFormatter, row_of
from .device import DTYPES, describe, pick_device, pick_dtype
from .files import UserError, check_flags, run, writable_folder, write_json
from .inference import picture_path
from .pictures import left_out, read_picture, save_image, sheet
from .provenance import check_made, digest, told

TEXT_WEIGHT, BEST = 2.5, 5
COURSE_IMAGES = 25


def clip_scores(features, references, direction):
    """(image scores, text scores), [N] each: of features [N, dim], example features [M, dim] and a caption's [dim], all of length 1."""
    return 100 * (features @ references.T).mean(1), 100 * features @ direction


def best_of(image, text, count=BEST):
    """The indices of the `count` best pictures, and their mean scores (image, text)."""
    best = (image + TEXT_WEIGHT * text).argsort(descending=True)[:count]
    return best, image[best].mean().item(), text[best].mean().item()


def passes(image, text, baseline):
    """Whether both scores reach the baseline; None without one."""
    return None if baseline is None else image >= baseline[0] and text >= baseline[1]


def add_judge_arguments(parser):
    """The flags of the CLIP that judges, which evaluate, compare and multi share."""
    told = ", ".join(f"{Path(row.judge).name} for {row.name}" for row in ROWS)
    parser.add_argument("--model", default=None, help=f"the CLIP that judges: a file of OpenAI's such as ViT-B-32.pt, a folder "
                        f"of open_clip's or Hugging Face's, or a model of open_clip (default: {told})")
    parser.add_argument("--pretrained", default=None, help="its weights, for a named model: a tag, such as openai, or a file")


def judge_of(row, args, dtype=torch.float32, device="cpu"):
    """The `Grader` of a model's pictures: the one that flags name, or the row's own."""
    name, weights = args.model or row.judge, args.pretrained
    if not args.model:
        downloaded = WEIGHTS / "ViT-B-32.pt"
        weights = weights or (str(downloaded) if row is SD_V1 and downloaded.is_file() else row.judge_weights)
    try:
        grader = Grader(name, weights, device, dtype)
    except UserError as error:
        if args.model or row is not SD_V1:
            raise
        raise UserError(f"what judges these pictures, CLIP ViT-B/32 by OpenAI, is not here: bash scripts/download_weights.sh ViT-B-32 fetches it, with "
                        f"internet; or name another judge by --model ({error})") from None
    size = grader.clip.visual.image_size
    note = "" if row is not SD_V1 or max(np.atleast_1d(size)) >= 224 else "; note: it reads thumbnails, and its scores say next to nothing of photographs"
    print(f"judge: {Path(name).name} {weights or ''}".rstrip() + note, flush=True)
    return grader


def main():
    parser = argparse.ArgumentParser(description="Grades pictures of learned words by CLIP.", formatter_class=HelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder that inference wrote")
    parser.add_argument("input", type=Path, metavar="INPUT_JSON", help="the concepts; their example pictures are in folders beside it")
    parser.add_argument("--report", type=Path, default=None, help="folder for grade.json and best.png (default: OUT_grade beside OUT)")
    add_judge_arguments(parser)
    parser.add_argument("--num-images", type=int, default=COURSE_IMAGES, help="pictures per prompt that must be there")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of CLIP's image tower; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_flags(args, ("num_images",), lambda value: 1 <= value <= 10**6, "between 1 and 1000000")
    device = pick_device(args.device)
    concepts = read_concepts(args.input)
    examples = {concept.number: example_pictures(args.input.parent / concept.number) for concept in concepts}
    for concept in concepts:
        for k in range(len(concept.prompts)):
            missing = [path for i in range(args.num_images) if not (path := picture_path(args.output, concept.number, k, i)).is_file()]
            if missing:
                raise UserError(f"{missing[0]} is missing; expected {args.num_images} pictures in each folder")
            folder = picture_path(args.output, concept.number, k, 0).parent
            others = left_out(folder, [picture_path(args.output, concept.number, k, i) for i in range(args.num_images)], ())
            if others:
                raise UserError(f"{folder} holds {args.num_images + len(others)} files, as the grader counts; expected exactly {args.num_images}, without "
                                f"{', '.join(others[:3])}")
    all_paths = [picture_path(args.output, c.number, k, i) for c in concepts for k in range(len(c.prompts)) for i in range(args.num_images)]
    made = check_made(args.output, all_paths, {path.relative_to(args.output).as_posix(): {"prompt": c.prompts[k], "token": c.token} for c in concepts
                                               for k in range(len(c.prompts)) for path in (picture_path(args.output, c.number, k, i)
                                                                                           for i in range(args.num_images))})
    row = row_of(min(read_picture(picture_path(args.output, concepts[0].number, 0, 0)).size))
    report = writable_folder(args.report or args.output.resolve().with_name(f"{args.output.resolve().name}_grade"))
    dtype = pick_dtype(args.dtype, device)
    print(f"grading {args.output} by {args.model or row.judge} on {describe(device, dtype)}", flush=True)
    grader = judge_of(row, args, dtype, device)
    results, rows, lines = [], [], [f"{args.output}, {told(made)}"]
    for concept in concepts:
        references = grader.of_pictures(examples[concept.number])  # once per concept
        directions = grader.of_texts(concept.eval_prompts)
        rows.append((f"examples of {concept.token}", examples[concept.number]))
        for k, prompt in enumerate(concept.prompts):
            paths = [picture_path(args.output, concept.number, k, i) for i in range(args.num_images)]
            image, text = clip_scores(grader.of_files(paths), references, directions[k])
            best, image_score, text_score = best_of(image, text)
            baseline = concept.baseline[k] if concept.baseline else None
            passed = passes(image_score, text_score, baseline)
            results.append({"concept": concept.number, "prompt": prompt, "image_score": image_score, "text_score": text_score, "baseline": baseline,
                            "passed": passed, "best": [paths[i].name for i in best],
                            "all_image_mean": image.mean().item(), "all_text_mean": text.mean().item()})
            verdict = "no baseline" if passed is None else f"baseline {baseline[0]:.2f}, {baseline[1]:.2f}  {'pass' if passed else 'FAIL'}"
            lines.append(f"{concept.number}/{k}  image {image_score:6.2f}  text {text_score:6.2f}  {verdict}  {prompt}")
            rows.append((f"{prompt}   image {image_score:.1f}, text {text_score:.1f}", [read_picture(paths[i]) for i in best]))
    judged = [row["passed"] for row in results if row["passed"] is not None]
    write_json(report / "grade.json", {"prompts": results, "passed": int(np.sum(judged)), "judged": len(judged), "model": Path(args.model or row.judge).name,
                                       "made": made, "pictures": digest(all_paths)})
    save_image(sheet([pictures[:BEST] for _, pictures in rows], titles=[title for title, _ in rows], side=128), report / "best.png")
    print("\n".join(lines))
    print(f"{sum(judged)} of {len(judged)} prompts pass\nwrote grade.json and best.png to {report}")


if __name__ == "__main__":
    run(main)
