"""Which settings draw best: accuracy and Fréchet distance over evaluations, of guidance weights, intervals, projection, steps and autoguidance.

    python -m p1_cfg_ddpm.pareto                                       # writes report/results/p1_pareto.json; p1_figures.sh draws it
    python -m p1_cfg_ddpm.pareto --guide runs/guide/model.safetensors  # with a weaker network's autoguidance (Karras et al. 2024) beside the others

Half an hour of one core; each row is written when it is measured, and the same command again goes on. In three rounds, so that what is chosen on some seeds
is told by others: every point on the first seed; those that come near to the accuracy that is wanted, the nearest to real images first, on the other seeds,
by which one is chosen, if any reaches it; the default and the best of them on fresh seeds, which chose nothing. Nor did the second judge, on any.
"""

import argparse
from dataclasses import asdict, replace
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np

from .benchmark import measure, show
from .device import DTYPES, describe, machine, name_of, pick_device, pick_dtype
from .files import ROOT, UserError, check_flags, fingerprint, lock, read_json, run, writable_file, write_json
from .inference import CHECKPOINT, DEFAULT, load_generator, steps_of
from .model import DOMAINS
from .provenance import REPORTED, HelpFormatter, command_line, report_file, script_line
from .quality import Judges

RESULTS = ROOT / "report" / "results" / "p1_pareto.json"
WANTED = {"mnistm": 0.998, "svhn": 0.995}  # share that the classifiers read rightly, as a mean over seeds
WORST = 0.98  # of each digit of each domain, the seeds together
MEASURES = ("accuracy", "second_accuracy", "frechet", "precision", "coverage")
SLACK = 0.004  # below WANTED on one seed, 500 images, a point may still reach it on all
GRID = [(6, 2.0, (0.0, 1.0)), *((6, w, interval) for w in (3.0, 4.0, 6.0) for interval in ((0.0, 1.0), (0.1, 0.8), (0.3, 1.0))),
        *((8, w, interval) for w in (4.0, 6.0) for interval in ((0.0, 1.0), (0.1, 0.8))), (12, 4.0, (0.1, 0.8)), (12, 6.0, (0.1, 0.8)),
        (5, 4.0, (0.0, 1.0)), (10, 4.0, (0.0, 1.0))]  # (steps, weight, interval)
PARALLELS = [(6, w, (1.0, share)) for w, share in ((4.0, 0.0), (4.0, 0.25), (4.0, 0.5), (5.0, 0.25))]  # (steps, weight, share by domain)
AUTOGUIDED = [(6, w, (0.0, 1.0)) for w in (1.0, 2.0)]


def evaluations(config, diffusion):
    """Of a network, for one image: two at a guided step, one at another."""
    low, high = config.guidance_interval
    return sum(2 if config.guidance_weight and low <= t / diffusion.config.num_timesteps <= high else 1 for t in steps_of(config, diffusion).t)


def point_of(row):
    """What a row's settings are without its seed: a key."""
    return row["guide"], *(tuple(value) if isinstance(value := row[name], list) else value for name in asdict(DEFAULT) if name != "seed")


def summary(rows):
    """The means over seeds of one point's rows, the lowest accuracy of any digit with the seeds together, and whether all that is wanted is reached."""
    told = {name: rows[0][name] for name in (*asdict(DEFAULT), "guide", "evaluations") if name != "seed"} | {"seeds": [row["seed"] for row in rows]}
    for domain in DOMAINS:
        told[domain] = {name: float(np.mean([row[domain][name] for row in rows])) for name in MEASURES}
        digits = [row[domain]["accuracy_per_digit"] for row in rows]
        told[domain]["worst_digit"] = min(float(np.mean([row[digit] for row in digits])) for digit in digits[0])
    told["frechet"] = sqrt(told["mnistm"]["frechet"] * told["svhn"]["frechet"])
    told["reached"] = all(told[d]["accuracy"] >= WANTED[d] and told[d]["worst_digit"] >= WORST for d in DOMAINS)
    return told


def summaries(rows, seeds):
    """`summary` of every point that all these seeds have, those nearest to real images first."""
    points = {}
    for row in rows:
        if row["seed"] in seeds:
            points.setdefault(point_of(row), []).append(row)
    return sorted((summary(own) for own in points.values() if {row["seed"] for row in own} == set(seeds)), key=lambda told: told["frechet"])


def panels(results):
    """For each domain what the first round found: accuracy over Fréchet distance, and distance over evaluations, by interval."""
    rows = [row for row in results["rows"] if row["seed"] == results["seeds"][0]]
    kinds = {}
    for row in rows:
        kind = "autoguidance" if row["guide"] else "guided at {:g} to {:g}".format(*row["guidance_interval"])
        kinds.setdefault(kind if set(row["guidance_parallel"]) == {1} else "projected", []).append(row)

    def panel(axis, domain, x, y, title):
        def value(row, name):
            return row[name] if name in row else row[domain][name] * (100 if name == "accuracy" else 1)

        for kind, own in kinds.items():
            axis.plot([value(row, x) for row in own], [value(row, y) for row in own], "o", label=kind, alpha=0.8)
        default = [row for row in rows if point_of(row) == point_of(results["default"])]
        axis.plot(*([value(row, name) for row in default] for name in (x, y)), "k*", markersize=10, label="default")
        named = {"frechet": "Fréchet distance over real images'", "accuracy": "accuracy, %", "evaluations": "evaluations an image"}
        axis.set(xlabel=named[x], ylabel=named[y], title=title)
        if y == "accuracy":
            axis.axhline(100 * results["wanted"][domain], color="gray", linewidth=1, label="wanted")
    names, pairs = {"mnistm": "MNIST-M", "svhn": "SVHN"}, (("frechet", "accuracy"), ("evaluations", "frechet"))
    return [partial(panel, domain=domain, x=x, y=y, title=names[domain]) for x, y in pairs for domain in DOMAINS]


def parse_args():
    parser = argparse.ArgumentParser(description="Measures which settings draw best.", formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a model.safetensors of p1_cfg_ddpm.train")
    parser.add_argument("--guide", type=Path, default=None, help="a weaker one; autoguidance by it is measured too (default: left out)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="the first has every point, all of them choose")
    parser.add_argument("--fresh", type=int, nargs="+", default=[5, 6, 7, 8, 9], help="seeds that tell how good the chosen one is")
    parser.add_argument("--finalists", type=int, default=3, help="points that all seeds measure, beside the default")
    parser.add_argument("--images-per-digit", type=int, default=50, help="per domain: 50 are the grader's files")
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=None, help=f"the JSON file to write {REPORTED}")
    args = parser.parse_args()
    args.command = command_line("python -m p1_cfg_ddpm.pareto", parser, args, leave_out=("device", "output"))
    check_flags(args, ("finalists", "batch_size"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("images_per_digit",), lambda value: value >= 2, "at least 2")
    args.output = report_file(args.output, RESULTS.name, args.checkpoint, CHECKPOINT)
    if set(args.seeds) & set(args.fresh):
        raise UserError("--fresh must be other seeds than --seeds, since those choose")
    return args


def main():
    args = parse_args()
    with lock(writable_file(args.output).parent, "-p1_pareto"):  # each row is added to those that are there: a second run would lose some
        compare(args)


def compare(args):
    """Measures what is missing, and writes it."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    print(f"measuring {args.checkpoint} on {describe(device, dtype)}", flush=True)
    model, diffusion = load_generator(args.checkpoint, device, dtype)
    guide = load_generator(args.guide, device, dtype)[0] if args.guide else None
    if model.config.times or (guide is not None and guide.config.times):
        raise UserError("a student has no settings to choose; give networks of p1_cfg_ddpm.train")
    judges, made_of = Judges(device), {name: fingerprint(path) for name, path in (("model", args.checkpoint), ("guide", args.guide)) if path}
    start = {"made_of": made_of, "dtype": name_of(dtype), "images_per_digit": args.images_per_digit}
    results = read_json(args.output) if args.output.is_file() else {}
    if {name: results.get(name) for name in start} != start:  # otherwise its rows are as they would be measured again, and count
        results = {**start, "machine": machine(device), "rows": []}
    results |= {"command": args.command, "seeds": args.seeds, "fresh_seeds": args.fresh, "finalists": args.finalists, "wanted": WANTED}
    results["default"], rows = asdict(DEFAULT) | {"guide": False}, results["rows"]

    def ensure(config, guided_by, seeds):
        for seed in seeds:
            own = replace(config, seed=seed)
            if any(row["seed"] == seed and point_of(row) == point_of(asdict(own) | {"guide": guided_by}) for row in rows):
                continue
            row = measure(model, diffusion, own, args.images_per_digit, args.batch_size, judges, guide if guided_by else None)
            rows.append(row | {"guide": guided_by, "evaluations": evaluations(own, diffusion)})
            show(row)
            write_json(args.output, results)

    def config_of(told):
        return replace(DEFAULT, **{name: tuple(value) if isinstance(value := told[name], list) else value for name in asdict(DEFAULT) if name != "seed"})

    plain = replace(DEFAULT, guidance_parallel=(1.0,) * len(DOMAINS))
    for guided_by, grid in ((False, GRID), (True, AUTOGUIDED if guide is not None else [])):
        for steps, w, interval in grid:
            ensure(replace(plain, num_steps=steps, guidance_weight=w, guidance_interval=interval), guided_by, args.seeds[:1])
    for steps, w, shares in PARALLELS:
        ensure(replace(DEFAULT, num_steps=steps, guidance_weight=w, guidance_parallel=shares), False, args.seeds[:1])
    ensure(DEFAULT, False, args.seeds)
    near = [told for told in summaries(rows, args.seeds[:1]) if all(told[d]["accuracy"] >= WANTED[d] - SLACK for d in DOMAINS)]
    for told in near[:args.finalists]:
        ensure(config_of(told), told["guide"], args.seeds)
    finalists = summaries(rows, args.seeds)
    chosen = next((told for told in finalists if told["reached"]), None)
    best = chosen or max(finalists, key=lambda told: sum(min(0.0, told[d]["accuracy"] - WANTED[d]) for d in DOMAINS))
    for told in (results["default"], best):
        ensure(config_of(told), told["guide"], args.fresh)
    results |= {"all_seeds": finalists, "chosen": chosen, "fresh": summaries(rows, args.fresh)}
    write_json(args.output, results)
    own = () if args.output == RESULTS else ("--pareto", args.output, "--checkpoint", args.checkpoint)
    settings = ", ".join(f"{name} {best[name]}" for name in asdict(DEFAULT) if name != "seed") + (", autoguided" if best["guide"] else "")
    print(f"{'chosen' if chosen else 'none reaches what is wanted; nearest'}: {settings}\nwrote {args.output}\n"
          f"next: {script_line('p1_figures.sh', *own)}")


if __name__ == "__main__":
    run(main)
