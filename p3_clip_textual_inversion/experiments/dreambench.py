"""The field's benchmarks of subjects: learns each one's word, draws its prompts, measures as DreamBench (Ruiz et al. 2023) and CustomConcept101 do.

    python -m p3_clip_textual_inversion.experiments.dreambench                                             # the miniature's own benchmark of the same shape
    python -m p3_clip_textual_inversion.experiments.dreambench dreambooth runs/dreambench hw2_data/weights/sd-v1-4.ckpt     # a clone of google/dreambooth

DINO and CLIP-I: the mean cosine between each drawn and each real picture of a subject, by DINO ViT-S/16 and CLIP; CLIP-T: the cosine between a drawn picture
and its prompt with the class's name in the word's place. Each is averaged over a subject's pictures, then over the subjects; a picture of a pair is compared
with both. Beside them stand real pictures with one another, the class's name drawn without learning, and the published numbers. The same command again goes
on where it stopped.
"""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..concepts import CHALLENGE_IMAGES, picture_path
from ..defaults import MINIATURE
from ..device import free_memory, progress
from ..embedding import file_of
from ..estimate import measure, minutes
from ..evaluate import add_judge_arguments, judge_of
from ..files import MINI, UserError, check_flags, lock, run, writable_folder, write_json
from ..formats.identity import weights_fingerprint
from ..guard import command as command_of
from ..inference import add_arguments, generate, load, settings_of, work_of
from ..measures import DRAWS, percentiles
from ..model import MINI_SD
from ..pictures import picture_files, read_picture, save_image, sheet
from ..provenance import HelpFormatter, Made, batches_with, claim
from ..train import SAMPLE_STEPS, learning_of
from .dino import read_dino, stand_in
from .subjects import PUBLISHED, TEXT_SCALE, read_benchmark

LEARNING = 2.2  # a step of learning costs so many times a pass of its latents through the network: forward, and back to the word. Measured on the miniature
METRICS = {"dino": "DINO", "stand_in": "stand-in", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}


def filled(prompt, names):
    """A prompt with names in its places, {} or {0} and {1}."""
    for field, name in zip(("{}",) if len(names) == 1 else ("{0}", "{1}"), names):
        prompt = prompt.replace(field, name)
    return prompt


class Task:
    """What is drawn of one subject, or of a pair. subjects: one or two; nouns: their classes' names; prompts: at most `count` of its own, the first ones."""

    def __init__(self, subjects, nouns, prompts, count, folder):
        self.subjects, self.nouns, self.folder = subjects, nouns, folder
        self.name, self.prompts = "+".join(subject.name for subject in subjects), prompts[:count]
        self.written = [filled(prompt, [subject.token for subject in subjects]) for prompt in self.prompts]
        self.plain = [filled(prompt, nouns) for prompt in self.prompts]

    def entries(self):
        """As the course's files have it: of a subject an entry of input.json, of a pair one of prompts.json for each prompt, with the words that it has."""
        if len(self.subjects) == 1:
            return {self.name: {"src_image": self.nouns[0], "token_name": self.subjects[0].token, "prompt": self.written, "prompt_4_clip_eval": self.plain}}
        there = [[subject for subject in self.subjects if subject.token in text] for text in self.written]
        return {f"{self.name}+{k}": {"src_image": [s.name for s in there[k]], "token_name": [s.token for s in there[k]], "prompt": self.written[k],
                                     "prompt_4_clip_eval": self.plain[k]} for k in range(len(self.prompts))}

    def picture(self, k, i):
        """Where inference puts picture i of prompt k."""
        paired = len(self.subjects) > 1
        return self.folder / picture_path(f"{self.name}+{k}" if paired else self.name, k, i, challenge=paired)

    def pictures(self, count):
        """[(path, its prompt with classes' names)] of the pictures with learned words."""
        return [(self.picture(k, i), text) for k, text in enumerate(self.plain) for i in range(count)]


def plain_path(folder, text, i):
    """Of the picture of a prompt without learned words: subjects of one class share them."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80]
    return folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:6]}" / f"{i}.png"


# ------------------------------------------------------------------ learning and drawing

def write_inputs(folder, tasks, pairs):
    """(input.json, prompts.json) with links to the subjects' pictures beside them, for train and inference."""
    for subject in dict.fromkeys(subject for task in (*tasks, *pairs) for subject in task.subjects):
        for place in (folder, folder / CHALLENGE_IMAGES):
            link, target = writable_folder(place) / subject.name, subject.folder.resolve()
            if link.is_symlink():
                link.unlink()
            if os.path.lexists(link):
                raise UserError(f"{link} is in the way of a link to {target}; choose another OUT")
            link.symlink_to(target)
    for name, chosen in (("input", tasks), ("prompts", pairs)):
        write_json(folder / f"{name}.json", {key: entry for task in chosen for key, entry in task.entries().items()})
    return folder / "input.json", folder / "prompts.json"


def call(module, *arguments):
    """Runs a command of the folder around this room, which tells what it does."""
    if subprocess.run([*command_of(f"p3_clip_textual_inversion.{module}"), *map(str, arguments)], check=False).returncode:
        raise UserError(f"{module} failed, as it says above; the same command again goes on where it stopped")


def draw_plain(args, config, device, model, texts):
    """The pictures of prompts without learned words that are not there yet, in the batches that they would always be in."""
    folder = writable_folder(args.output / "class_names")
    # the name that pictures have which were drawn before there was this room
    made = Made("p3_clip_textual_inversion.dreambench", config.told(), {"model": model, "weights": weights_fingerprint(args.checkpoint)})
    own = {plain_path(Path(), text, i).as_posix(): {"prompt": text, "number": i} for text in texts for i in range(args.num_images)}
    there = claim(folder, made, own, config.batch_size, {"checkpoint": args.checkpoint}, args.overwrite)
    names = [name for batch in batches_with(own.keys() - there, list(own), config.batch_size) for name in batch]
    if not names:
        return
    parts = load(args.checkpoint, device, config)
    with progress(total=len(names), unit="picture", desc="drawing classes' names") as bar:
        prompts, noises = [own[name]["prompt"] for name in names], [f"{own[name]['prompt']}/{own[name]['number']}" for name in names]
        for name, picture in zip(names, generate(parts, prompts, noises, config, progress=bar)):
            if name not in there:
                writable_folder((folder / name).parent)
                save_image(picture, folder / name, made.with_own(own[name]).as_json())


def announce_all(args, config, device, learned, tasks, pairs, texts):
    """Tells how much is to be done, and about how long it takes, from one step of the sampler. learned: what --learn means, of `learning_of`."""
    subjects = dict.fromkeys(subject for task in (*tasks, *pairs) for subject in task.subjects)
    to_learn = [subject for subject in subjects if not file_of(args.output / "words", subject.token).exists()]
    paths = [path for task in (*tasks, *pairs) for path, _ in task.pictures(args.num_images)]
    paths += [plain_path(args.output / "class_names", text, i) for text in texts for i in range(args.num_images)]
    to_draw = sum(not path.exists() for path in paths)
    told = f"{len(subjects)} subjects, {len(to_learn)} to learn; {len(paths):,} pictures, {to_draw:,} to draw"
    if not to_learn and not to_draw:
        print(f"{told}: all is there, and is measured", flush=True)
        return
    parts = load(args.checkpoint, device, config)
    batch = min(config.batch_size, args.num_images * len(texts))
    prompts = [texts[i % len(texts)] for i in range(batch)]
    work = work_of(parts, prompts, prompts, config)
    times = [measure(one, device) for _, one in work]
    if None in times:
        print(f"{told}; a batch does not fit into memory: no time is estimated", flush=True)
    else:
        step, decoding = (seconds for seconds, _ in times)
        drawing = to_draw / batch * (config.num_steps * step + decoding)
        taken = learned.steps * learned.batch_size * learned.accumulate / 2 * LEARNING  # in pictures of a guided step
        if learned.lora or learned.custom_diffusion:
            taken += learned.prior * SAMPLE_STEPS
        learning = len(to_learn) * taken * step / batch
        print(f"{told}: about {minutes(learning + drawing)} minutes in all ({minutes(learning)} to learn, {learned.steps} steps each)", flush=True)
    del parts, work
    free_memory()


# ------------------------------------------------------------------ measuring

def cosines(features, references):
    """[N]: each drawn picture's mean cosine with the real ones. features: [N, dim], references: [M, dim], of length 1."""
    return (features @ references.T).mean(1)


def among(references):
    """The mean cosine between different real pictures; None for one alone."""
    others = ~torch.eye(len(references), dtype=torch.bool)
    return (references @ references.T)[others].mean().item() if len(references) > 1 else None


def telling(references):
    """How well features tell subjects apart: the share of real pictures whose nearest other one is of the same subject. references: {subject: [M, dim]}"""
    features, owner = torch.cat(list(references.values())), torch.cat([torch.full((len(f),), i) for i, f in enumerate(references.values())])
    nearest = (features @ features.T).fill_diagonal_(-2).argmax(1)
    return (owner[nearest] == owner).float().mean().item()


def scores_of(tasks, files, judges, references):
    """{task: {metric: mean}}. files(task): [(path, caption)]; judges: {"clip_i": Grader, and perhaps "dino": Eye}; references: {metric: {subject: features}}"""
    jobs = [(task, path, text) for task in tasks for path, text in files(task)]
    paths = list(dict.fromkeys(path for _, path, _ in jobs))
    row_of = {path: i for i, path in enumerate(paths)}
    texts = list(dict.fromkeys(text for *_, text in jobs))
    directions = dict(zip(texts, judges["clip_i"].of_texts(texts)))
    results = {task.name: {} for task in tasks}
    for metric, judge in judges.items():
        features = judge.of_files(paths)
        for task in tasks:
            own = features[[row_of[path] for path, _ in files(task)]]
            results[task.name][metric] = torch.stack([cosines(own, references[metric][subject.name]).mean() for subject in task.subjects]).mean().item()
            if metric == "clip_i":
                captions = torch.stack([directions[text] for _, text in files(task)])
                results[task.name]["clip_t"] = (own * captions).sum(1).mean().item()
    return results


def summary_of(scores):
    """{metric: {"mean": ..., "interval": 95 % by a bootstrap over subjects}} of {task: {metric: score}}."""
    summary = {}
    for metric in METRICS:
        values = np.array([row[metric] for row in scores.values() if row.get(metric) is not None])
        if len(values):
            draws = values[np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))].mean(1)
            summary[metric] = {"mean": float(values.mean()), "interval": percentiles(draws) if len(values) > 1 else None, "of": len(values)}
    return summary


def table(title, rows, metrics):
    """Lines: a title, the metrics' names, a row for each way. rows: [(name, {metric: number})]"""
    lines = [title, " " * 52 + "".join(f"{METRICS[metric]:>10}" for metric in metrics)]
    for name, row in rows:
        lines.append(f"  {name:50}" + "".join(f"{row[metric]:10.3f}" if row.get(metric) is not None else f"{'-':>10}" for metric in metrics))
    return lines


def measure_all(args, name, tasks, pairs, grader, eye):
    """(results as JSON, lines of the table) of what is drawn."""
    judges = {"clip_i": grader} | ({eye.key: eye} if eye else {})
    subjects = dict.fromkeys(subject for task in (*tasks, *pairs) for subject in task.subjects)
    references = {metric: {s.name: judge.of_files(picture_files(s.folder)) for s in subjects} for metric, judge in judges.items()}
    real = {task.name: {metric: among(features[task.name]) for metric, features in references.items()} for task in tasks}
    count, plain = args.num_images, args.output / "class_names"
    learned = f"learned words{f' ({args.learn})' if args.learn else ''}"
    ways = {"class names, nothing learned": lambda task: [(plain_path(plain, text, i), text) for text in task.plain for i in range(count)],
            learned: lambda task: task.pictures(count)}
    results = {"subjects": {"real pictures": real}, "pairs": {}}
    for way, files in ways.items():
        results["subjects"][way] = scores_of(tasks, files, judges, references)
        if pairs:
            results["pairs"][f"{way}, in regions" if way == learned and args.regions == "auto" else way] = scores_of(pairs, files, judges, references)
    summary = {part: {way: summary_of(scores) for way, scores in rows.items()} for part, rows in results.items()}
    metrics = [metric for metric in METRICS if metric == "clip_t" or metric in judges]
    lines = []
    for part, benchmark in (("subjects", name), ("pairs", "CustomConcept101, pairs")):
        if not summary[part]:
            continue
        lines += table(f"{len(results[part]['class names, nothing learned'])} {part}", [(way, {m: v["mean"] for m, v in row.items()})
                                                                                         for way, row in summary[part].items()], metrics)
        source, published = PUBLISHED[benchmark]
        heading = f"published for {benchmark}" + (": photographs, other judges, not comparable" if args.miniature else "")
        lines += table(heading, [(way, dict(zip(("dino", "clip_i", "clip_t"), numbers))) for way, *numbers in published], ("dino", "clip_i", "clip_t"))
        lines.append(f"  ({source}; CustomConcept101's textual alignment is {TEXT_SCALE} CLIP-T)")
    tells = {metric: telling(features) for metric, features in references.items()}
    lines.append("real pictures whose nearest other one is of the same subject: " + ", ".join(f"{METRICS[m]} {share:.0%}" for m, share in tells.items()))
    published = {key: {"source": source, "rows": [{"method": way, "dino": d, "clip_i": i, "clip_t": t} for way, d, i, t in rows]}
                 for key, (source, rows) in PUBLISHED.items() if key in (name, "CustomConcept101, pairs")}
    return {"benchmark": "the miniature's, in DreamBench's layout" if args.miniature else name, "pictures_per_prompt": count,
            "prompts": max(len(task.prompts) for task in tasks), "summary": summary, "tells_subjects_apart": tells, "each": results, "published": published,
            "judges": {"clip": Path(args.model or "the model's own").name, "subjects": eye.name if eye else None}}, lines


def figure(args, tasks, pairs):
    """Of each subject and pair: real pictures, then the class's name and the learned word, for the same prompts."""
    rows, titles = [], []
    for task in (*tasks, *pairs)[:40]:
        real = [read_picture(path) for subject in task.subjects for path in picture_files(subject.folder)[:4 // len(task.subjects)]]
        shown = range(min(len(task.prompts), 5))
        plain = [read_picture(plain_path(args.output / "class_names", task.plain[k], 0)) for k in shown]
        learned = [read_picture(task.picture(k, 0)) for k in shown]
        blank = [Image.new("RGB", (8, 8), "white")]
        rows.append([*real, *blank * (4 - len(real)), *plain, *learned])
        titles.append(f"{task.name}: real pictures; {', '.join(task.nouns)}; the learned word{'s' * (len(task.nouns) > 1)}")
    return sheet(rows, titles=titles, side=96)


def parse_args():
    parser = argparse.ArgumentParser(description="Learns, draws and measures a benchmark of subjects.", formatter_class=HelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=MINI / "dreambench", metavar="DATA",
                        help="a folder with DreamBench's prompts_and_classes.txt or CustomConcept101's dataset.json, or the repository that has it")
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/dreambench"), metavar="OUT", help="folder for words, pictures and results")
    parser.add_argument("checkpoint", nargs="?", default=str(MINI_SD), metavar="CKPT",
                        help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    parser.add_argument("--subjects", nargs="+", default=None, metavar="NAME", help="these subjects only, or a number: so many (default: all)")
    parser.add_argument("--prompts", type=int, default=10**6, help="so many prompts of each, of all kinds (default: all)")
    parser.add_argument("--num-images", type=int, default=4, help="pictures per prompt; DreamBench has 4")
    parser.add_argument("--no-pairs", action="store_true", help="leave out the pairs, where the benchmark has some")
    parser.add_argument("--learn", default="", metavar="FLAGS", help='for p3_train, such as "--lora" or "--steps 500" (in quotes)')
    parser.add_argument("--draw", default="", metavar="FLAGS", help="for p3_infer, in quotes, when it draws learned words")
    parser.add_argument("--regions", choices=["auto", "none"], default="auto", help="of pairs, as of p3_infer: each subject in its place, or words alone")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what OUT holds, also of other settings or words, which is refused otherwise")
    parser.add_argument("--dino", default=None, metavar="FILE", help=f"DINO ViT-S/16, of timm or Facebook; none: without (default: from the hub; for "
                        f"{MINIATURE.name} its CLIP's image tower stands in)")
    parser.add_argument("--report", type=Path, default=None, help="folder for results/p3_dreambench.json and figures/p3_dreambench.png (default: OUT/report)")
    add_judge_arguments(parser)
    add_arguments(parser)
    args = parser.parse_args()
    check_flags(args, ("num_images", "prompts"), lambda value: 1 <= value <= 10**6, "between 1 and 1000000")
    return args


def chosen(subjects, names):
    """The subjects that --subjects names, or the first so many."""
    if not names:
        return subjects
    if len(names) == 1 and names[0].isdigit():
        return subjects[:max(int(names[0]), 1)]
    known = {subject.name: subject for subject in subjects}
    for name in names:
        if name not in known:
            raise UserError(f"--subjects {name} is none of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def main():
    args, started = parse_args(), time.perf_counter()
    args.report = args.report or args.output / "report"
    name, every, pairs = read_benchmark(args.data)
    subjects = chosen(every, args.subjects)
    pairs = [pair for pair in pairs if set(pair.subjects) <= set(subjects) and not args.no_pairs]
    tasks = [Task((s,), (s.noun,), s.prompts, args.prompts, args.output / "pictures") for s in subjects]
    pairs = [Task(p.subjects, p.nouns, p.prompts, args.prompts, args.output / f"pairs{'_regions' if args.regions == 'auto' else ''}") for p in pairs]
    config, device, row, model = settings_of(args)
    args.miniature = row is MINIATURE
    learned = learning_of(args.learn, row)
    if learned.custom_diffusion:
        raise UserError("--learn --custom-diffusion learns projections for each subject, of which a picture can have one; p3_several.sh merges them")
    grader = judge_of(row, args, device=device)
    eye = None if args.dino == "none" else stand_in(grader) if args.miniature and args.dino is None else read_dino(args.dino, device)
    print(f"subjects are told by {eye.name if eye else 'CLIP alone'}", flush=True)
    texts = list(dict.fromkeys(text for task in (*tasks, *pairs) for text in task.plain))
    writable_folder(args.output)
    for part in ("results", "figures"):
        writable_folder(args.report / part)
    with lock(args.output, "-p3_dreambench"):
        announce_all(args, config, device, learned, tasks, pairs, texts)
        inputs, pair_inputs = write_inputs(args.output / "examples", tasks, pairs)
        draw_plain(args, config, device, model, texts)
        free_memory()
        side = ("--side", args.side) if args.side else ()
        common = (*side, "--device", args.device, "--dtype", args.dtype)
        call("train", inputs, "--checkpoint", args.checkpoint, "--output", args.output / "words", "--kind", "object", "--sample-every", 0, *common,
             *shlex.split(args.learn))
        drawing = ("--sampler", config.sampler, "--steps", config.num_steps, "--guidance-weight", config.guidance_weight, "--batch-size", config.batch_size,
                   "--num-images", args.num_images, "--seed", args.seed, "--embeddings", args.output / "words", *common, *["--overwrite"] * args.overwrite,
                   *shlex.split(args.draw))
        call("inference", inputs, args.output / "pictures", args.checkpoint, *drawing)
        if pairs:
            call("inference", pair_inputs, args.output / pairs[0].folder.name, args.checkpoint, *drawing, "--regions", args.regions)
        results, lines = measure_all(args, name, tasks, pairs, grader, eye)
    settings = {"sampler": config.sampler, "num_steps": config.num_steps, "guidance_weight": config.guidance_weight, "seed": args.seed,
                "learn": args.learn, "draw": args.draw, "regions": args.regions, "model": model}
    write_json(args.report / "results" / "p3_dreambench.json", results | {"settings": settings})
    save_image(figure(args, tasks, pairs), args.report / "figures" / "p3_dreambench.png")
    print("\n".join(lines))
    print(f"wrote results/p3_dreambench.json and figures/p3_dreambench.png to {args.report} in {minutes(time.perf_counter() - started)} minutes")


if __name__ == "__main__":
    run(main)
