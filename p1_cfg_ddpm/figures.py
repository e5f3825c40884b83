"""The report's figures of P1.

    python -m p1_cfg_ddpm.figures        # writes report/figures/p1_*.png

Two grids (rows: the digits 0-9, columns: ten noise inputs, the files {digit}_001 .. _010 of inference), two reverse processes of the first 0
of those grids (the file 0_001.png), and from the benchmark's results two charts: guidance weight, and sampler and steps.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .benchmark import RESULTS
from .device import describe
from .files import ROOT, UserError, atomic_path, run, writable_folder
from .inference import Job, add_arguments, all_jobs, generate, load_with_settings, states
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS
from .pictures import save_image, to_uint8
from .samplers import ImageNoise

ZOOM, MARGIN = 2, 22


def grid(images):
    """uint8 [100, 28, 28, 3], row by row -> a picture with the digit before each row and the noise input above each column."""
    side = IMAGE_SIZE * ZOOM + 2
    picture = Image.new("RGB", (MARGIN + side * 10, MARGIN + side * 10), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i in range(10):
        draw.text((8, MARGIN + i * side + side // 2), str(i), "black", font, anchor="mm")
        draw.text((MARGIN + i * side + side // 2, 10), str(i + 1), "black", font, anchor="mm")
        for j in range(10):
            tile = Image.fromarray(images[i * 10 + j]).resize((IMAGE_SIZE * ZOOM,) * 2, Image.Resampling.NEAREST)
            picture.paste(tile, (MARGIN + j * side, MARGIN + i * side))
    return picture


@torch.inference_mode()
def reverse_process(model, diffusion, job, sampling):
    """Six moments of one image's way from noise to digit: x_t above, the x0 that the network sees in it below."""
    every = list(states(model, diffusion, [job], sampling))
    noise = ImageNoise(sampling.seed, [job.name], (3, IMAGE_SIZE, IMAGE_SIZE))()
    xt, x0 = [noise, *(state.x for state in every)], [*(state.x0 for state in every), every[-1].x]
    label = [*(f"t = {state.t}" for state in every), "finished"]
    side = IMAGE_SIZE * 4
    picture = Image.new("RGB", (60 + (side + 4) * 6, 2 * side + 30), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for row, name in enumerate(("x_t", "x0")):
        draw.text((30, 26 + side // 2 + row * side), name, "black", font, anchor="mm")
    for column, step in enumerate(np.linspace(0, len(every), 6).round().astype(int)):
        left = 60 + column * (side + 4)
        draw.text((left + side // 2, 12), label[step], "black", font, anchor="mm")
        for row, image in enumerate((xt[step], x0[step])):
            tile = Image.fromarray(to_uint8(image)[0]).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(tile, (left, 26 + row * side))
    return picture


def charts(results, folder):
    """The two charts of the benchmark's results. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    rows = results["guidance"]
    weights = [row["guidance_weight"] for row in rows]
    for (above, below), domain in zip(axes.T, DOMAINS):
        distance = [row[domain]["frechet"] for row in rows]
        accuracy = [100 * row[domain]["accuracy"] for row in rows]
        above.plot(distance, accuracy, "o-", color="tab:blue")
        for i, (x, y, w) in enumerate(zip(distance, accuracy, weights)):
            above.annotate(f"w={w:g}", (x, y), fontsize=8, textcoords="offset points", xytext=(-4, 6 + 9 * (i % 2)))
        above.set(title=f"{domain}, {rows[0]['images'] // 2} images each", xlabel="Fréchet distance, as many real images = 1", ylabel="accuracy, %")
        above.margins(0.15)
        for name in ("precision", "coverage"):
            below.plot(weights, [row[domain][name] for row in rows], "o-", label=name)
        below.axhline(1, color="gray", linewidth=1)
        below.set(xlabel="guidance weight w", ylabel="as many real images = 1")
        below.legend()
    paths = [save_chart(figure, folder / "p1_guidance.png")]

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = results["ladder"] + ([results["classic"]] if "classic" in results else [])
    for kind in sorted({(row["sampler"], row["spacing"]) for row in rows}):
        own = sorted((row for row in rows if (row["sampler"], row["spacing"]) == kind), key=lambda row: row["steps"])
        seconds = [1000 / row["images_per_second"] for row in own]
        axis.plot(seconds, [100 * row["mean_accuracy"] for row in own], "o-", label=", ".join(kind))
        for x, row in zip(seconds, own):
            axis.annotate(row["steps"], (x, 100 * row["mean_accuracy"]), fontsize=8, textcoords="offset points", xytext=(4, 4))
    if "student" in results:
        own = results["student"]
        axis.plot(np.mean([1000 / row["images_per_second"] for row in own]), np.mean([100 * row["mean_accuracy"] for row in own]), "*", markersize=12,
                  label=f"the student, {own[0]['steps']} step")
    axis.set(xscale="log", xlabel=f"seconds for 1,000 images on {results['machine']['device']}, {results['machine']['threads']} threads",
             ylabel="mean accuracy, %", title="sampler and number of steps")
    axis.legend()
    return [*paths, save_chart(figure, folder / "p1_samplers.png")]


def save_chart(figure, path):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def main():
    parser = argparse.ArgumentParser(description="Draws the report's figures of P1.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "report" / "figures", help="folder for p1_*.png")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what scripts/p1_benchmark.sh wrote; the charts are left out without it")
    add_arguments(parser)
    args = parser.parse_args()
    model, diffusion, sampling, batch_size, checkpoint = load_with_settings(args)
    parameter = next(model.parameters())
    print(f"drawing with {checkpoint} on {describe(parameter.device, parameter.dtype)}", flush=True)
    writable_folder(args.output)
    written = []
    if args.results.is_file():
        try:
            written += charts(json.loads(args.results.read_text(encoding="utf-8")), args.output)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{args.results} is not what scripts/p1_benchmark.sh writes ({type(error).__name__}: {error}); run it again") from None
    for domain in DOMAINS:
        images = np.stack([image for _, image in generate(model, diffusion, all_jobs(10, [domain], range(NUM_DIGITS)), sampling, batch_size)])
        written += [args.output / f"p1_grid_{domain}.png", args.output / f"p1_reverse_{domain}.png"]
        save_image(grid(images), written[-2])
        save_image(reverse_process(model, diffusion, Job(domain, 0, 1), sampling), written[-1])
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
