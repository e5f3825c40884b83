"""The report's figures of P2.

    python -m p2_ddim.figures        # writes report/figures/p2_*.png and report/results/p2_figures.json

The eta grid (noise 00-03 by eta), the slerp row and the lerp row, and three that explain: the norm of the interpolated noise (why lerp fails),
the predicted x0 along the steps, and an inversion round trip with its error.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .data import read_noises
from .diffusion import Denoiser
from .evaluate import GAIN, difference, mse, psnr
from .files import ROOT, UserError, atomic_path, check_flags, run, writable_file, writable_folder, write_json
from .inference import MINI, add_arguments, check_size, generate, settings_of, to_pictures
from .interpolation import lerp, slerp
from .inversion import invert
from .model import load_unet
from .pictures import save_image
from .samplers import ddim, finish

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALPHAS = tuple(i / 10 for i in range(11))
ROUND_TRIP_STEPS = (20, 50, 100, 250)


def grid(rows, row_titles, column_titles, left=64):
    """rows: lists of uint8 [H, W, 3] -> one picture with titles."""
    height, width = rows[0][0].shape[:2]
    picture = Image.new("RGB", (left + len(column_titles) * (width + 4), 22 + len(rows) * (height + 4)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for column, title in enumerate(column_titles):
        draw.text((left + column * (width + 4) + width // 2, 10), str(title), "black", font, anchor="mm")
    for row, (images, title) in enumerate(zip(rows, row_titles)):
        draw.text((4, 22 + row * (height + 4) + height // 2), str(title), "black", font, anchor="lm")
        for column, image in enumerate(images):
            picture.paste(Image.fromarray(image), (left + column * (width + 4), 22 + row * (height + 4)))
    return picture


def drawn(unet, noises, config, batch_size, seed, dtype):
    """The pictures of {name: noise}, in order: a list of uint8 [H, W, 3]."""
    return [to_pictures(x[None])[0] for _, x in generate(unet, noises, config, batch_size, seed, dtype)]


def norm_chart(a, b, path):
    """The norm of slerp and lerp along alpha, as shares of what standard normal noise has, with the band in which nearly all noise lies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    alphas, expected = np.linspace(0, 1, 101), a.numel() ** 0.5
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, function in (("slerp", slerp), ("lerp", lerp)):
        axis.plot(alphas, [function(a, b, float(alpha)).norm().item() / expected for alpha in alphas], label=name)
    spread = 4 / (2 * a.numel()) ** 0.5  # the norm of n standard normals has standard deviation 1/sqrt(2), around sqrt(n)
    axis.axhspan(1 - spread, 1 + spread, color="tab:gray", alpha=0.3, label="4 standard deviations of noise")
    axis.set(xlabel="alpha", ylabel="norm / sqrt(number of pixels)", title="lerp leaves the sphere the network was trained on, slerp stays on it")
    axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


@torch.inference_mode()
def round_trips(unet, noise, config, iterations, numbers_of_steps, dtype=torch.float32):
    """Noise [B, 3, H, W] to images, back to noise, to images again, for several numbers of steps: {steps: (images, images again, PSNRs in dB)}.

    The clamp of x0 has no inverse: the way back to noise, and from there to the image again, goes without it."""
    results = {}
    for steps in numbers_of_steps:
        ts = replace(config, num_steps=steps).steps()
        image = finish(ddim(Denoiser(unet, config.clip, dtype), noise, ts))
        free = Denoiser(unet, False, dtype)
        back = finish(invert(free, image.x, ts, iterations=iterations))
        again = finish(ddim(free, back.x, ts))
        first, second = to_pictures(image.x), to_pictures(again.x)
        results[steps] = first, second, [psnr(mse(a, b)) for a, b in zip(first, second)]
    return results


def main():
    parser = argparse.ArgumentParser(description="Draws the report's figures of P2.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--noise", type=Path, default=MINI / "noise", help="folder with 00.pt .. 03.pt")
    parser.add_argument("--checkpoint", type=Path, default=MINI / "UNet.pt", help="the network's state dict")
    parser.add_argument("--output", type=Path, default=ROOT / "report" / "figures", help="folder for p2_*.png")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "results" / "p2_figures.json", help="where the numbers go")
    parser.add_argument("--iterations", type=int, default=3, help="fixed-point iterations per step of the inversion; 1 is the usual inversion")
    parser.add_argument("--round-trips", type=int, nargs="+", default=ROUND_TRIP_STEPS, metavar="STEPS", help="steps of the inversion's round trips")
    add_arguments(parser)
    args = parser.parse_args()
    config, device, dtype, batch_size = settings_of(args)
    check_flags(args, ("iterations",), lambda value: value >= 1, "at least 1")
    noises = read_noises(args.noise)
    if len(noises) < 4:
        raise UserError(f"{args.noise} has {len(noises)} noises; the figures need four")
    writable_folder(args.output)
    writable_file(args.results)
    unet = load_unet(args.checkpoint, device)
    check_size(unet.config, next(iter(noises.values())).shape)
    unet = torch.compile(unet) if args.compile else unet
    names = list(noises)[:4]
    a, b = noises[names[0]], noises[names[1]]

    rows = [drawn(unet, {name: noises[name] for name in names}, replace(config, eta=eta), batch_size, args.seed, dtype) for eta in ETAS]
    save_image(grid(rows, [f"eta {eta:g}" for eta in ETAS], names), args.output / "p2_eta.png")
    rows = [drawn(unet, {f"{alpha:g}": function(a, b, alpha) for alpha in ALPHAS}, replace(config, eta=0.0), batch_size, args.seed, dtype)
            for function in (slerp, lerp)]
    save_image(grid(rows, ["slerp", "lerp"], ALPHAS), args.output / "p2_interpolation.png")
    norm_chart(a, b, args.output / "p2_norm.png")
    with torch.inference_mode():
        states = list(replace(config, eta=0.0).states(unet, a[None].to(device), dtype=dtype))
    chosen = [states[i] for i in np.linspace(0, len(states) - 1, 10).round().astype(int)]
    rows = [[to_pictures(getattr(state, name))[0] for state in chosen] for name in ("x", "x0")]
    save_image(grid(rows, ["x_t", "predicted x0"], [f"t = {state.t}" for state in chosen], 84), args.output / "p2_steps.png")
    four = torch.stack([noises[name] for name in names]).to(device)
    trips, usual = (round_trips(unet, four, config, iterations, args.round_trips, dtype) for iterations in (args.iterations, 1))
    rows = [[trip[i][0] for trip in trips.values()] for i in (0, 1)]
    rows.append([difference(trip[0][0], trip[1][0]) for trip in trips.values()])
    save_image(grid(rows, ["image", "round trip", f"{GAIN} x difference"], [f"{steps} steps" for steps in trips], 92), args.output / "p2_inversion.png")
    mini = args.checkpoint.resolve() == (MINI / "UNet.pt").resolve()
    numbers = {"network": "the bundled miniature" if mini else f"the network {args.checkpoint.name}", "iterations": args.iterations,
               **{name: {str(steps): float(np.mean(trip[2])) for steps, trip in those.items()}
                  for name, those in (("round_trip_psnr", trips), ("round_trip_psnr_one_iteration", usual))}}
    write_json(args.results, numbers)
    print(f"wrote p2_eta, p2_interpolation, p2_norm, p2_steps and p2_inversion .png to {args.output}, {args.results.name} to {args.results.parent}")


if __name__ == "__main__":
    run(main)
