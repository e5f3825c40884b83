"""Measures what samplers, steps and guidance cost and bring, on one machine in one run.

    python -m p1_cfg_ddpm.benchmark            # writes report/results/p1_benchmark.json

The ladder: seconds for the grader's images (the network loaded, files not written), accuracy by the bundled classifiers, and in the frozen embedding
Frechet distance, precision and coverage as ratios to as many real images (quality.py), for each sampler and number of steps; with the classic 500-step
guided DDPM as reference, on fewer images. The sweep: the same scores for a range of guidance weights. The student: the bundled one (distill.py), beside the
defaults. Formats: the network's images per second.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from .device import DTYPES, describe, is_slow, machine, name_of, pick_device, pick_dtype
from .evaluate import grade
from .files import ROOT, UserError, check_flags, fingerprint, run, writable_file, write_json
from .inference import CHECKPOINT, STUDENT, STUDENT_CHECKPOINT, DrawConfig, all_jobs, generate, load_generator
from .model import DOMAINS
from .pictures import to_model
from .provenance import REPORTED, HelpFormatter, command_line, report_file, script_line
from .quality import Judges

RESULTS = ROOT / "report" / "results" / "p1_benchmark.json"
LADDER = [("ddpm", 50, "trailing"), ("ddim", 50, "trailing"), ("ddim", 20, "trailing"), ("dpmpp_2m", 20, "trailing"), ("dpmpp_2m", 10, "trailing"),
          ("dpmpp_2m", 6, "trailing"), ("ddim", 10, "logsnr"), ("dpmpp_2m", 10, "logsnr"), ("dpmpp_2m", 8, "logsnr"), ("dpmpp_2m", 6, "logsnr"),
          ("dpmpp_2m", 5, "logsnr"), ("dpmpp_2m", 4, "logsnr")]  # (sampler, steps, spacing)
CLASSIC = DrawConfig(sampler="ddpm", num_steps=500, spacing="trailing")
WEIGHTS = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0]


def measure(model, diffusion, config, images_per_digit, batch_size, judges, guide=None):
    """Draws and grades images_per_digit x 20 images. Returns the row: settings, seconds, images per second and scores; Frechet distance, precision and
    coverage as ratios to as many real images, in the embedding (None for fewer than two images of a digit)."""
    jobs = all_jobs(images_per_digit)
    started = time.perf_counter()
    images = np.stack([image for _, image in generate(model, diffusion, jobs, config, batch_size, shown=False, guide=guide)])
    seconds = time.perf_counter() - started
    found = {}
    for domain in DOMAINS:
        keep = np.array([job.domain == domain for job in jobs])
        found[domain] = (images[keep], np.array([job.digit for job in jobs])[keep], None)
    scores, _ = grade(found, judges=judges)
    row = asdict(config) | {"images": len(jobs), "seconds": seconds, "images_per_second": len(jobs) / seconds, "mean_accuracy": scores["mean_accuracy"]}
    for domain in DOMAINS:
        embedding = scores[domain]["embedding"]
        row[domain] = {name: scores[domain][name] for name in ("accuracy", "second_accuracy", "accuracy_per_digit", "pixel_diversity")}
        row[domain] |= {"worst_digit": min(scores[domain]["accuracy_per_digit"].values())}
        row[domain] |= {name: embedding and embedding[name]["ratio"] for name in ("frechet", "precision", "coverage")}
    return row


def show(row):
    low, high = row["guidance_interval"]
    print(f"{row['sampler']:9} {row['num_steps']:4} {row['spacing']:8} steps  w {row['guidance_weight']:<4g} in {low:g}-{high:g}  "
          f"{row['images']:5} images {row['seconds']:7.1f} s {row['images_per_second']:7.1f} img/s  accuracy "
          f"{row['mnistm']['accuracy']:.1%} {row['svhn']['accuracy']:.1%}", end="")
    if row["mnistm"]["frechet"] is not None:
        print("".join(f"  {name} {row['mnistm'][name]:.2f} {row['svhn'][name]:.2f}" for name in ("frechet", "precision", "coverage")), end="")
    print(flush=True)


def formats(checkpoint, device, batch_size=100, repeats=3):
    """Images per second of one forward pass (median of `repeats`), in fp32 and each number format that the device computes faster."""
    rates = {}
    for name, dtype in DTYPES.items():
        if is_slow(name, device):
            continue
        model, _ = load_generator(checkpoint, device, dtype)
        x = to_model(np.zeros((batch_size, 28, 28, 3), np.uint8), device).to(dtype)
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        seconds = []
        with torch.inference_mode():
            for _ in range(repeats + 1):  # the first is a warm-up
                started = time.perf_counter()
                model(x, zeros, zeros, zeros).float().sum().item()  # .item() waits for the device
                seconds.append(time.perf_counter() - started)
        rates[name] = batch_size / float(np.median(seconds[1:]))
        print(f"{name}: {rates[name]:.0f} images per second through the network", flush=True)
    return rates


def main():
    parser = argparse.ArgumentParser(description="Measures samplers, steps and guidance.", formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a model.safetensors of p1_cfg_ddpm.train")
    parser.add_argument("--output", type=Path, default=None, help=f"the JSON file to write {REPORTED}")
    parser.add_argument("--images-per-digit", type=int, default=50, help="per domain, for the default settings: 50 are the grader's files")
    parser.add_argument("--seeds", type=int, default=5, help="with the default settings, so many seeds are drawn and graded")
    parser.add_argument("--sweep-images-per-digit", type=int, default=20, help="for the ladder and the guidance sweep; fewer is quicker and less exact")
    parser.add_argument("--classic-images-per-digit", type=int, default=3, help="for the 500-step reference; 0 leaves it out")
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_flags(args, ("images_per_digit", "sweep_images_per_digit"), lambda value: value >= 2, "at least 2")
    check_flags(args, ("seeds", "batch_size"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("classic_images_per_digit",), lambda value: value >= 0, "at least 0")
    args.output = writable_file(report_file(args.output, RESULTS.name, args.checkpoint, CHECKPOINT))
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    print(f"measuring {args.checkpoint} on {describe(device, dtype)}", flush=True)
    model, diffusion = load_generator(args.checkpoint, device, dtype)
    if model.config.times:
        raise UserError(f"{args.checkpoint} is a student, which has no samplers to compare; the bundled one is measured beside any other network")
    command = command_line("python -m p1_cfg_ddpm.benchmark", parser, args, leave_out=("device", "output"))
    results = {"command": command, "machine": machine(device), "made_of": {"model": fingerprint(args.checkpoint)},
               "dtype": name_of(dtype), "formats": formats(args.checkpoint, device)}
    default, judges = DrawConfig(), Judges(device)

    def rows(configs, images_per_digit, network=(model, diffusion)):
        for config in configs:
            row = measure(*network, config, images_per_digit, args.batch_size, judges)
            show(row)
            yield row

    # the headline is the mean over seeds: a single seed's worst digit moves by two or three images
    results["seeds"] = list(rows([replace(default, seed=seed) for seed in range(args.seeds)], args.images_per_digit))
    student = load_generator(STUDENT_CHECKPOINT, device, dtype)
    own = replace(STUDENT, num_steps=len(student[0].config.times))
    results["student"] = list(rows([replace(own, seed=seed) for seed in range(args.seeds)], args.images_per_digit, student))
    # Frechet distances grow as the number of images falls: compare only rows with as many images
    rungs = [replace(default, sampler=sampler, num_steps=steps, spacing=spacing) for sampler, steps, spacing in LADDER]
    results["ladder"] = list(rows(rungs, args.sweep_images_per_digit))
    results["guidance"] = list(rows([replace(default, guidance_weight=w) for w in WEIGHTS], args.sweep_images_per_digit))
    if args.classic_images_per_digit:
        results["classic"] = next(rows([CLASSIC], args.classic_images_per_digit))
    write_json(args.output, results)
    own = () if args.output == RESULTS else ("--results", args.output, "--checkpoint", args.checkpoint)
    print(f"wrote {args.output}\nnext: {script_line('p1_figures.sh', *own)}")


if __name__ == "__main__":
    run(main)
