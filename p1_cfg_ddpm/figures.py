"""The report's figures of P1.

    python -m p1_cfg_ddpm.figures        # writes report/figures/p1_*.png

Two grids (rows: the digits 0-9, columns: ten noise inputs, the files {digit}_001 .. _010 of inference), two reverse processes of the first 0
of those grids (the file 0_001.png), at six moments (reverse) and at all (process), and from the benchmark's results two charts: guidance weight, and
sampler and steps; from p1_cfg_ddpm.pareto's, one of what was tried.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .benchmark import RESULTS
from .device import describe
from .files import ROOT, UserError, fingerprint, lock, note, run, writable_folder
from .inference import CHECKPOINT, DrawConfig, Job, add_arguments, add_tries, all_jobs, draw_again, generate, load_with_settings, names_of, states
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS
from .pareto import RESULTS as PARETO
from .pareto import panels as pareto_panels
from .pictures import chart, save_image, sheet, to_uint8
from .provenance import HelpFormatter
from .samplers import ImageNoise

NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN", "ddpm": "DDPM", "ddim": "DDIM", "dpmpp_2m": "DPM-Solver++",
         "trailing": "even in t", "logsnr": "even in log-SNR", "bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
MOMENTS = 6  # of the reverse process, that the course asks for
SIDE, LARGE = 2 * IMAGE_SIZE, 4 * IMAGE_SIZE


def grid(images):
    """uint8 [100, 28, 28, 3], row by row -> a picture with the digit before each row and the noise input above each column."""
    return sheet([images[i:i + 10] for i in range(0, 100, 10)], left=range(NUM_DIGITS), above=range(1, 11), side=SIDE, enlarge=True)


@torch.inference_mode()
def reverse_process(model, diffusion, job, config):
    """The way of one image from noise to digit, as two pictures: six moments of it, and all; x_t above, the x0 that the network sees in it below."""
    every, kept = list(states(model, diffusion, [job], config)), 1
    if config.tries > 1 and (kept := draw_again(every[-1].x.clone(), model, diffusion, [job], config)[1].item()) > 1:
        every = list(states(model, diffusion, [job], config, attempt=kept))
    noise = ImageNoise(config.seed, names_of([job], kept), (3, IMAGE_SIZE, IMAGE_SIZE))()
    xt, x0 = [noise, *(state.x for state in every)], [*(state.x0 for state in every), every[-1].x]
    label = [*(f"t = {state.t}" for state in every), "finished"]
    pictures = []
    for chosen in (np.linspace(0, len(every), MOMENTS).round().astype(int), range(len(xt))):
        rows = [[to_uint8(images[step])[0] for step in chosen] for images in (xt, x0)]
        pictures.append(sheet(rows, left=("x_t", "x0"), above=[label[step] for step in chosen], side=LARGE, enlarge=True))
    return pictures


def guidance_panels(rows):
    """What the guidance weight does, a panel a measure, a line a domain. rows: the benchmark's."""
    images = f"{rows[0]['images'] // len(DOMAINS)} images each"

    def panel(axis, name, title, factor=1):
        for domain in DOMAINS:
            axis.plot([row["guidance_weight"] for row in rows], [factor * row[domain][name] for row in rows], "o-", label=NAMES[domain])
        axis.axvline(DrawConfig().guidance_weight, color="gray", linestyle=":", linewidth=1, label="the default")
        if factor == 1:
            axis.axhline(1, color="gray", linewidth=1, label="real images")
        axis.set(title=f"{title}\n{images}", xlabel="guidance weight w", ylim=(0, 1.08 * axis.get_ylim()[1]))
    return [partial(panel, name="accuracy", title="accuracy, %", factor=100), partial(panel, name="frechet", title="Fréchet distance"),
            partial(panel, name="precision", title="precision"), partial(panel, name="coverage", title="coverage")]


def sampler_panel(results):
    """Seconds for 1,000 images of each sampler and number of steps, the slowest first, each with its accuracy. results: the benchmark's."""
    rows = [(f"{NAMES.get(row['sampler'], row['sampler'])}, {row['num_steps']} steps {NAMES.get(row['spacing'], row['spacing'])}", row)
            for row in results["ladder"] + ([results["classic"]] if "classic" in results else [])]
    if "student" in results:
        own = {name: float(np.mean([row[name] for row in results["student"]])) for name in ("images_per_second", "mean_accuracy")}
        rows.append((f"the student, {results['student'][0]['num_steps']} step", own))
    rows = sorted(((name, 1000 / row["images_per_second"], row["mean_accuracy"]) for name, row in rows), key=lambda row: row[1])

    def panel(axis):
        seconds = [row[1] for row in rows]
        axis.hlines(range(len(rows)), 0.5 * min(seconds), seconds, color="lightgray")
        axis.plot(seconds, range(len(rows)), "o")
        for i, (_, x, accuracy) in enumerate(rows):
            axis.annotate(f"{x:,.{int(x < 10)}f} s, {accuracy:.1%}", (x, i), textcoords="offset points", xytext=(6, 0), va="center")
        axis.set(xscale="log", xlim=(0.5 * min(seconds), 60 * max(seconds)), title="seconds for 1,000 images\nand mean accuracy",
                 xlabel=f"seconds, {results['machine']['device']}, {results['machine']['threads']} threads, {NAMES.get(results['dtype'], results['dtype'])}")
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    return panel


def charts(results, folder):
    """The two charts of the benchmark's results. Returns their paths."""
    panel = sampler_panel(results)
    return [chart(guidance_panels(results["guidance"]), folder / "p1_guidance.png"),
            chart([panel], folder / "p1_samplers.png", size=(5.2, 1.2 + 0.24 * (len(results["ladder"]) + 2)))]


def pareto_chart(results, folder):
    return [chart(pareto_panels(results), folder / "p1_pareto.png")]


def main():
    parser = argparse.ArgumentParser(description="Draws the report's figures of P1.", formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "report" / "figures", help="folder for p1_*.png")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what scripts/p1_benchmark.sh wrote; the charts are left out without it")
    parser.add_argument("--pareto", type=Path, default=PARETO, help="what p1_cfg_ddpm.pareto wrote; its chart is left out without it")
    add_arguments(parser)
    add_tries(parser)
    args = parser.parse_args()
    model, diffusion, config, batch_size, checkpoint = load_with_settings(args)
    parameter = next(model.parameters())
    print(f"drawing with {checkpoint} on {describe(parameter.device, parameter.dtype)}", flush=True)
    with lock(writable_folder(args.output), "-p1_figures"):
        written = []
        for path, draw, command in ((args.results, charts, "scripts/p1_benchmark.sh"), (args.pareto, pareto_chart, "p1_cfg_ddpm.pareto")):
            if path.is_file():
                try:
                    results = json.loads(path.read_text(encoding="utf-8"))
                    measured = results["made_of"]["model"] if "made_of" in results else fingerprint(CHECKPOINT)  # which older results are of
                    if not model.config.times and measured != fingerprint(checkpoint):
                        note(f"{path} is of another network than {checkpoint}: its charts are left out; {command} --checkpoint {checkpoint} measures it")
                        continue
                    written += draw(results, args.output)
                except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                    raise UserError(f"{path} is not what {command} writes ({type(error).__name__}: {error}); run it again") from None
        for domain in DOMAINS:
            images = np.stack([image for _, image in generate(model, diffusion, all_jobs(10, [domain], range(NUM_DIGITS)), config, batch_size)])
            for name, picture in zip(("grid", "reverse", "process"), (grid(images), *reverse_process(model, diffusion, Job(domain, 0, 1), config))):
                written.append(args.output / f"p1_{name}_{domain}.png")
                save_image(picture, written[-1])
        for path in written:
            print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
