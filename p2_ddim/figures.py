"""The report's figures of P2.

    python -m p2_ddim.figures        # writes report/figures/p2_*.png and report/results/p2_figures.json

The eta grid (noise 00-03 by eta) and how far apart the fresh noise's seeds draw; slerp and lerp in two rows; and those that explain: norm, spectrum and
faces halfway (what lerp loses), mixtures of four noises as a map, the predicted x0 along the steps, inversion round trips with their errors, and, from what
p2_ddim.sweep wrote, the samplers by their number of evaluations.
"""

import argparse
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from .data import MINI_DATA, read_noises
from .device import compile_blocks, describe
from .diffusion import NUM_TIMESTEPS, Denoiser
from .evaluate import GAIN, difference, mse, psnr
from .files import (
    RESULTS,
    ROOT,
    UserError,
    check_flags,
    existing_file,
    fingerprint,
    lock,
    note,
    read_json,
    run,
    writable_file,
    writable_folder,
    write_json,
)
from .inference import add_arguments, check_size, draw_settings, generate, to_pictures
from .interpolation import lerp, mix, slerp
from .inversion import invert
from .model import Block, load_unet
from .pictures import chart, save_image, sheet
from .provenance import HelpFormatter, command_line
from .quality import high_frequency
from .samplers import ImageNoise, ddim, finish

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALPHAS = tuple(i / 10 for i in range(11))
ROUND_TRIP_STEPS = (20, 50, 100)
MOMENTS = 6  # of the way from noise to face
SHOWN_HALFWAY = 10  # pairs


def drawn(unet, noises, config, batch_size, seed, dtype):
    """The pictures of {name: noise}, in order: a list of uint8 [H, W, 3]."""
    return [to_pictures(x[None])[0] for _, x in generate(unet, noises, config, batch_size, seed, dtype)]


def norm_panel(a, b):
    """The norm of slerp and lerp along alpha, as shares of what standard normal noise has, with the band in which nearly all noise lies."""
    def panel(axis):
        alphas, expected = np.linspace(0, 1, 101), a.numel() ** 0.5
        for name, function in (("slerp", slerp), ("lerp", lerp)):
            axis.plot(alphas, [function(a, b, float(alpha)).norm().item() / expected for alpha in alphas], label=name)
        spread = 4 / (2 * a.numel()) ** 0.5  # the norm of n standard normals has standard deviation 1/sqrt(2), around sqrt(n)
        axis.axhspan(1 - spread, 1 + spread, color="tab:gray", alpha=0.3, label="4 deviations of noise")
        axis.set(xlabel="alpha", ylabel="norm / sqrt(number of values)", title="the noise: lerp leaves the sphere, slerp stays")
    return panel


def halfway(unet, config, shape, count, batch_size, seed, dtype):
    """Final states, as grey levels [count, H, W, 3], not stretched as a picture is: {"ends", "slerp", "lerp"} at alpha 0.5, of fresh pairs of noises."""
    names = [f"pair/{i}" for i in range(2 * count)]
    noises = list(ImageNoise(seed, names, shape)())
    pairs = list(zip(noises[::2], noises[1::2]))
    starts = {"ends": noises, **{function.__name__: [function(*pair, 0.5) for pair in pairs] for function in (slerp, lerp)}}
    return {name: torch.stack([x for _, x in generate(unet, dict(enumerate(some)), config, batch_size, seed, dtype)]).permute(0, 2, 3, 1).numpy() * 127.5
            for name, some in starts.items()}


def variety(pictures):
    """The standard deviation of a pixel over pictures [N, H, W, 3], as a mean over pixels: 0 where all are one."""
    return float(pictures.std(axis=0, ddof=1).mean())


def spectrum(pictures):
    """(frequencies, in cycles a pixel, mean power there) of pictures [N, H, W, 3], over all directions and channels, without their mean."""
    x = pictures.astype(float) - pictures.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(x, axes=(1, 2), norm="ortho")) ** 2).mean(axis=(0, 3))
    y, x = (np.fft.fftfreq(n) for n in power.shape)
    radius = np.hypot(y[:, None], x[None])
    edges = np.arange(0.5, min(power.shape) // 2 + 1) / min(power.shape)
    middles = (edges[:-1] + edges[1:]) / 2
    return middles, np.array([power[(low <= radius) & (radius < high)].mean() for low, high in pairwise(edges)])


def spectrum_panel(pictures):
    """What frequencies the pictures halfway have, as a share of what the ends have."""
    def panel(axis):
        frequencies, own = spectrum(pictures["ends"])
        for name in ("slerp", "lerp"):
            axis.plot(frequencies, spectrum(pictures[name])[1] / own, label=name)
        axis.axhline(1, color="tab:gray", label="the ends")
        axis.set(xlabel="frequency, cycles a pixel", ylabel="power / that of the ends", ylim=(0, None),
                 title=f"pictures at alpha 0.5, {len(pictures['lerp'])} pairs")
    return panel


def deviations(grid_rows, draw, seeds):
    """[eta, noise]: the standard deviation of each pixel over the seeds of the fresh noise, in grey levels, as a mean over the picture.

    grid_rows: {eta: [uint8 [H, W, 3], ...]} of the first seed; draw(eta, seed) -> such a list, of another."""
    result = []
    for eta, first in grid_rows.items():
        over_seeds = np.stack([first, *(draw(eta, seed) for seed in seeds[1:])]) if eta else np.stack([first] * 2)  # at eta 0 none is drawn
        result.append([variety(of_one_noise) for of_one_noise in over_seeds.swapaxes(0, 1)])
    return np.array(result)


def deviation_panel(spread, names):
    def panel(axis):
        for name, row in zip(names, spread.T):
            axis.plot(ETAS, row, "o-", label=f"noise {name}")
        axis.set(xlabel="eta", ylabel="deviation over seeds, grey levels", title="how much of the picture the fresh noise decides")
    return panel


def corner_map(unet, corners, config, batch_size, dtype, side=5):
    """side x side pictures: each a mixture of four noises, which stand in the corners, by the distances to them."""
    shares = np.linspace(0, 1, side)
    mixtures = {f"{v} {u}": mix(corners, ((1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v)) for v in shares for u in shares}
    pictures = drawn(unet, mixtures, config, batch_size, 0, dtype)
    return [pictures[row * side:(row + 1) * side] for row in range(side)]


def sampler_panels(results):
    """What p2_ddim.sweep measured, by evaluations: a panel for each of its measures that there is."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    told = {"distance": ("distance to {truth_steps} steps of ddim\nno clamp, {faces} faces", "root mean square, grey levels"),
            "clamped": ("the same with the clamp of x0\n{faces} faces", "root mean square, grey levels"),
            "frechet": ("Fréchet distance of {faces} faces\nin features of CLIP", "Fréchet distance")}
    samplers = dict.fromkeys((row["sampler"], row["spacing"]) for part in results.values() for row in part["rows"])

    def panel(axis, part, title, ylabel):
        for color, (sampler, spacing) in enumerate(samplers):
            own = [row for row in part["rows"] if (row["sampler"], row["spacing"]) == (sampler, spacing)]
            label = sampler if sampler == "exact" or spacing == "trailing" else f"{sampler}, {spacing}"
            if own:
                axis.plot([row["evaluations"] for row in own], [row["value"] for row in own], "k*" if sampler == "exact" else f"C{color}o-", label=label)
        asked = sorted({row["asked"] for row in part["rows"]})
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=ylabel, title=title.format(**part))
        axis.set_xticks(asked, map(str, asked))
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter("")
        if "of_drawn" in part:
            axis.axhline(part["of_drawn"], color="tab:gray", label="drawn faces")
    return [partial(panel, part=results[name], title=title, ylabel=ylabel) for name, (title, ylabel) in told.items() if name in results]


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
    parser = argparse.ArgumentParser(description="Draws the report's figures of P2.", formatter_class=HelpFormatter)
    parser.add_argument("--noise", type=Path, default=MINI_DATA / "noise", help="folder with 00.pt .. 03.pt")
    parser.add_argument("--checkpoint", type=Path, default=MINI_DATA / "UNet.pt", help="the network's state dict")
    parser.add_argument("--output", type=Path, default=ROOT / "report" / "figures", help="folder for p2_*.png")
    parser.add_argument("--results", type=Path, default=None, help="where the numbers go (default: report/results/p2_figures.json, or the folder of --output)")
    parser.add_argument("--samplers", type=Path, default=None, help="what p2_ddim.sweep wrote of this network (default: report/results/p2_samplers.json, "
                        "the bundled network's)")
    parser.add_argument("--iterations", type=int, default=3, help="fixed-point iterations per step of the inversion; 1 is the usual inversion")
    parser.add_argument("--round-trips", type=int, nargs="+", default=ROUND_TRIP_STEPS, metavar="STEPS", help="steps of the inversion's round trips")
    parser.add_argument("--seeds", type=int, default=4, help="of the fresh noise, over which pictures deviate")
    parser.add_argument("--pairs", type=int, default=16, help="of noises, whose pictures halfway are measured")
    add_arguments(parser)
    args = parser.parse_args()
    args.command = command_line("bash scripts/p2_figures.sh", parser, args, leave_out=("output", "results", "samplers", "device", "batch_size"))
    config, device, dtype, batch_size = draw_settings(args)
    check_flags(args, ("iterations",), lambda value: value >= 1, "at least 1")
    check_flags(args, ("seeds", "pairs"), lambda value: value >= 2, "at least 2")
    check_flags(args, ("round_trips",), lambda numbers: all(1 <= number <= NUM_TIMESTEPS for number in numbers), f"between 1 and {NUM_TIMESTEPS}")
    if config.sampler != "ddim":
        raise UserError(f"the figures show eta and inversion, which are ddim's, not {config.sampler}'s; leave --sampler and --quality out")
    noises = read_noises(args.noise)
    if len(noises) < 4:
        raise UserError(f"{args.noise} has {len(noises)} noises; the figures need four")
    folder = writable_folder(args.output)
    default = folder == ROOT / "report" / "figures"
    results = writable_file(args.results or (RESULTS if default else folder) / "p2_figures.json")
    unet = load_unet(args.checkpoint, device)
    check_size(unet.config, next(iter(noises.values())).shape)
    measured = sweep_of(args.samplers, fingerprint(args.checkpoint))
    with lock(folder, "-p2_figures"):
        draw_figures(args, unet, noises, config, device, dtype, batch_size, folder, results, measured)


def sweep_of(path, network):
    """What `p2_ddim.sweep` measured of a network, by its fingerprint: nothing, with a note, where it is another's. path: of the JSON; None: the project's own,
    where there is one."""
    own = RESULTS / "p2_samplers.json"
    if path is None and not own.is_file():
        return {}
    path = existing_file(path or own, "result of p2_ddim.sweep")
    measured = {name: part for name, part in read_json(path).items() if isinstance(part, dict) and part.get("model") == network}
    if not measured:
        note(f"{path} is of another network: p2_samplers.png is not drawn; python -m p2_ddim.sweep measures this one")
    return measured


def draw_figures(args, unet, noises, config, device, dtype, batch_size, folder, results, measured):
    """folder: of the pictures; results: the file of the numbers; measured: of `sweep_of`."""
    print(f"drawing with {args.checkpoint} on {describe(device, dtype)}", flush=True)
    if args.compile:
        compile_blocks(unet, Block)
    names = list(noises)[:4]
    four = {name: noises[name] for name in names}
    a, b = noises[names[0]], noises[names[1]]

    def draw(some, settings=config, seed=args.seed):
        return drawn(unet, some, settings, batch_size, seed, dtype)

    by_eta = {eta: draw(four, replace(config, eta=eta)) for eta in ETAS}
    save_image(sheet(by_eta.values(), [f"eta {eta:g}" for eta in ETAS], names), folder / "p2_eta.png")
    spread = deviations(by_eta, lambda eta, seed: draw(four, replace(config, eta=eta), seed), range(args.seed, args.seed + args.seeds))
    chart([deviation_panel(spread, names)], folder / "p2_deviation.png")
    rows = [draw({f"{alpha:g}": function(a, b, alpha) for alpha in ALPHAS}) for function in (slerp, lerp)]
    save_image(sheet(rows, ["slerp", "lerp"], [f"{alpha:.1f}" for alpha in ALPHAS]), folder / "p2_interpolation.png")
    between = halfway(unet, config, a.shape, args.pairs, batch_size, args.seed, dtype)
    chart([norm_panel(a, b), spectrum_panel(between)], folder / "p2_norm.png")
    rows = [to_pictures(torch.from_numpy(between[name][:SHOWN_HALFWAY]).permute(0, 3, 1, 2)) for name in ("slerp", "lerp")]
    save_image(sheet(rows, ["slerp", "lerp"], [""] * len(rows[0])), folder / "p2_halfway.png")
    rows = corner_map(unet, list(four.values()), config, batch_size, dtype)
    save_image(sheet(rows, [names[0], "", "", "", names[2]], [names[0], "", "", "", names[1]]), folder / "p2_corners.png")
    with torch.inference_mode():
        states = list(config.states(unet, a[None].to(device), dtype=dtype))
    xt = [a[None], *(state.x for state in states[:-1])]  # where each step begins, which is what the network sees x0 in
    chosen = np.linspace(0, len(states) - 1, MOMENTS).round().astype(int)
    rows = [[to_pictures(pictures[i])[0] for i in chosen] for pictures in (xt, [state.x0 for state in states])]
    save_image(sheet(rows, ["x_t", "x0"], [f"t = {states[i].t}" for i in chosen]), folder / "p2_steps.png")
    start = torch.stack(list(four.values())[:2]).to(device)
    trips, usual = (round_trips(unet, start, config, iterations, args.round_trips, dtype) for iterations in (args.iterations, 1))
    rows = [[trip[i][0] for trip in trips.values()] for i in (0, 1)]
    rows.append([difference(trip[0][0], trip[1][0]) for trip in trips.values()])
    save_image(sheet(rows, ["image", "round trip", f"{GAIN} x difference"], [f"{steps} steps" for steps in trips]), folder / "p2_inversion.png")
    if measured:
        chart(sampler_panels(measured), folder / "p2_samplers.png", columns=3, size=(4.4, 3.8))
    mini = args.checkpoint.resolve() == (MINI_DATA / "UNet.pt").resolve()
    write_json(results, {
        "command": args.command, "seeds": args.seeds, "pairs": args.pairs,
        "network": "the bundled miniature" if mini else f"the network {args.checkpoint.name}", "iterations": args.iterations,
        **{name: {str(steps): float(np.mean(trip[2])) for steps, trip in those.items()}
           for name, those in (("round_trip_psnr", trips), ("round_trip_psnr_one_iteration", usual))},
        "deviation": {f"{eta:g}": float(row.mean()) for eta, row in zip(ETAS, spread)},
        **{f"{name}_at_half": {way: measure(between[way]) / measure(between["ends"]) for way in ("slerp", "lerp")}
           for name, measure in (("variety", variety), ("high_frequency", high_frequency))}})
    print(f"wrote p2_*.png to {folder}, {results.name} to {results.parent}")


if __name__ == "__main__":
    run(main)
