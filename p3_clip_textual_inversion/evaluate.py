"""Grades pictures of learned words by CLIP, as the course does, or as its later challenge of several concepts in a picture does.

    python -m p3_clip_textual_inversion.evaluate OUT INPUT_JSON      # or a prompts.json, which has concept_image/ beside it

The judge follows the pictures: thumbnails are the miniature's and judged by the miniature of CLIP, all others by the course's grader, CLIP ViT-B/32 by OpenAI.
Per picture: image score = the mean over the concept's example pictures of 100 cosine(picture, example); text score = 100 cosine(picture,
prompt_4_clip_eval). Per prompt: both are averaged over the five pictures with the largest image + 2.5 text, and pass where both reach the baseline.
In the challenge the examples are those of all of an entry's concepts together, and of its pictures, whose number and names are free, the one with the largest
image + 2.2 text counts; both scores are averaged over the entries.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .clip import Grader
from .concepts import read_entries
from .data import labelled_pictures
from .defaults import ROWS, SD_V1, WEIGHTS, row_of
from .device import DTYPES, describe, pick_device, pick_dtype
from .files import UserError, check_flags, note, run, write_json
from .pictures import left_out, note_left_out, picture_files, read_picture, read_pictures, save_image, sheet
from .provenance import HelpFormatter, check_made, digest, grade_folder, set_aside, told


class Rule(NamedTuple):
    """By image + text_weight * text the best pictures are found; how many of them count."""
    text_weight: float
    best: int


COURSE, CHALLENGE = Rule(2.5, 5), Rule(2.2, 1)
COURSE_IMAGES = 25
SHOWN = 5


def clip_scores(features, references, direction):
    """(image scores, text scores), [N] each: of features [N, dim], example features [M, dim] and a caption's [dim], all of length 1."""
    return 100 * (features @ references.T).mean(1), 100 * features @ direction


def as_graders_read(folder):
    """The pictures of a folder as the course's graders open them, `convert("RGB")` alone: what lies on its side stays so, and under transparency is what the
    file hides there. A note tells where that differs from what is seen."""
    pictures, others = [], []
    for name, upright in read_pictures(folder)[0].items():
        with Image.open(Path(folder) / name) as file:
            pictures.append(file.convert("RGB"))
        if pictures[-1].size != upright.size or pictures[-1].tobytes() != upright.tobytes():
            others.append(name)
    if others:
        note(f"{folder}: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} {'is' if len(others) == 1 else 'are'} graded as the course's graders "
             "read, which turn no photograph upright and lay no transparency on white")
    return pictures


def best_of(image, text, rule=COURSE):
    """The indices of the best pictures, best first, and their mean scores (image, text)."""
    best = (image + rule.text_weight * text).argsort(descending=True, stable=True)[:rule.best]
    return best, image[best].mean().item(), text[best].mean().item()


def passes(image, text, baseline):
    """Whether both scores reach the baseline; None without one."""
    return None if baseline is None else image >= baseline[0] and text >= baseline[1]


def add_judge_arguments(parser):
    """The flags of the CLIP that judges, which evaluate, compare and several share."""
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


def row_that_drew(made):
    """The `Defaults` of the model that drew pictures of this project, by its name in what made them; None for other pictures."""
    model = str(made and made["made_of"].get("model"))
    return next((row for row in ROWS if model.startswith(f"{row.key}-")), None)


def pictures_of(entry, args):
    """The paths of each prompt's pictures, a list of lists: exactly as many as the course's grader asks for, or all that an entry of the challenge has."""
    if entry.challenge:
        folder = args.output / entry.number
        paths, others = labelled_pictures(folder)
        note_left_out(folder, others)
        if not paths or len(paths) != (args.num_images or len(paths)):
            raise UserError(f"{folder} has {len(paths)} pictures; expected {args.num_images or 'some'}")
        return [paths]
    count, found = args.num_images or COURSE_IMAGES, []
    for k in range(len(entry.prompts)):
        paths = [args.output / entry.picture(k, i) for i in range(count)]
        missing = next((path for path in paths if not path.is_file()), None)
        if missing:
            raise UserError(f"{missing} is missing; expected {count} pictures in each folder")
        others = left_out(paths[0].parent, paths, ())
        if others:
            raise UserError(f"{paths[0].parent} holds {count + len(others)} files, as the grader counts; expected exactly {count}, without "
                            f"{', '.join(others[:3])}")
        found.append(paths)
    return found


def parse_args():
    parser = argparse.ArgumentParser(description="Grades pictures of learned words by CLIP.", formatter_class=HelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder that inference wrote")
    parser.add_argument("input", type=Path, metavar="INPUT_JSON", help="the concepts; their example pictures are in folders beside it")
    parser.add_argument("--report", type=Path, default=None, help="folder for grade.json and best.png (default: OUT_grade beside OUT)")
    add_judge_arguments(parser)
    parser.add_argument("--num-images", type=int, default=None, help=f"pictures per prompt that must be there (default: {COURSE_IMAGES}; in the challenge any "
                        "number)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of CLIP's image tower; auto: bf16 or fp16 where it is fast")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_flags(args, ("num_images",), lambda value: value is None or 1 <= value <= 10**6, "between 1 and 1000000")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    report = set_aside(args.report, args.output)
    entries = read_entries(args.input)
    concepts = {concept.number: concept for entry in entries for concept in entry.concepts}
    for concept in concepts.values():
        if not picture_files(concept.folder, f"folder of example pictures of {concept.token}"):
            raise UserError(f"{concept.folder} has no picture; expected example pictures of {concept.token}")
    jobs = [(entry, k, paths) for entry in entries for k, paths in enumerate(pictures_of(entry, args))]
    all_paths = [path for _, _, paths in jobs for path in paths]
    made = check_made(args.output, all_paths, {path.relative_to(args.output).as_posix(): {"prompt": entry.prompts[k], "token": entry.token}
                                               for entry, k, paths in jobs for path in paths})
    row = row_that_drew(made) or row_of(min(read_picture(all_paths[0]).size))
    dtype, report = pick_dtype(args.dtype, device), grade_folder(report)
    print(f"grading {args.output} on {describe(device, dtype)}", flush=True)
    grader = judge_of(row, args, dtype, device)
    references, rows, lines, results = {}, [], [f"{args.output}, {told(made)}"], []
    for number, concept in concepts.items():  # one after the other: photographs may be large
        examples = as_graders_read(concept.folder)
        references[number] = grader.of_pictures(examples)
        rows.append((f"examples of {concept.token}", [picture.resize((128, 128)) for picture in examples[:SHOWN]]))
    for entry, k, paths in jobs:
        result, shown = grade(entry, k, paths, torch.cat([references[concept.number] for concept in entry.concepts]), grader)
        results.append(result)
        scores = f"image {result['image_score']:6.2f}  text {result['text_score']:6.2f}"
        baseline, passed = result["baseline"], result["passed"]
        verdict = "no baseline" if passed is None else f"baseline {baseline[0]:.2f}, {baseline[1]:.2f}  {'pass' if passed else 'FAIL'}"
        lines.append(f"{entry.number}  {scores}  {result['best'][0]}  {entry.prompts[k]}" if entry.challenge else
                     f"{entry.number}/{k}  {scores}  {verdict}  {entry.prompts[k]}")
        rows.append((f"{entry.prompts[k]}   {scores}", shown))
    judged = [row["passed"] for row in results if row["passed"] is not None]
    told_in_all = f"{sum(judged)} of {len(judged)} prompts pass"
    grades = {"prompts": results, "passed": int(np.sum(judged)), "judged": len(judged), "model": Path(args.model or row.judge).name, "made": made,
              "pictures": digest(all_paths)}
    if entries[0].challenge:
        grades |= {name: float(np.mean([result[name] for result in results])) for name in ("image_score", "text_score")}
        told_in_all = f"mean of {len(results)} entries: image {grades['image_score']:.2f}, text {grades['text_score']:.2f}"
    write_json(report / "grade.json", grades)
    save_image(sheet([pictures for _, pictures in rows], titles=[title for title, _ in rows], side=128), report / "best.png")
    print("\n".join(lines))
    print(f"{told_in_all}\nwrote grade.json and best.png to {report}")


def grade(entry, k, paths, references, grader):
    """(what the grade of a prompt's pictures says, as in grade.json; the best of them). references: features [N, dim] of all its concepts' examples."""
    rule = CHALLENGE if entry.challenge else COURSE
    image, text = clip_scores(grader.of_files(paths), references, grader.of_texts([entry.eval_prompts[k]])[0])
    best, image_score, text_score = best_of(image, text, rule)
    baseline = entry.baseline[k] if entry.baseline else None
    shown = [read_picture(paths[i]) for i in best_of(image, text, rule._replace(best=SHOWN))[0]]
    return {"concept": entry.number, "prompt": entry.prompts[k], "image_score": image_score, "text_score": text_score, "baseline": baseline,
            "passed": passes(image_score, text_score, baseline), "best": [paths[i].name for i in best],
            "all_image_mean": image.mean().item(), "all_text_mean": text.mean().item()}, shown


if __name__ == "__main__":
    run(main)
