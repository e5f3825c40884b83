"""What each sampler makes of how many evaluations of the network: the table that --quality is chosen from.

    python -m p2_ddim.make_mini faces runs/held_out --count 3000 --seed 1
    python -m p2_ddim.sweep                                                    # writes report/results/p2_samplers.json; p2_figures.sh draws it

Half an hour of one core; each row is written when it is measured, and the same command again goes on.

Three measures. distance: to the answer of 1,000 steps from the same noise (root mean square, in grey levels; not for ddpm, whose answers are random), without
the clamp of x0, as only then all solve one and the same equation. clamped: the same with it, as p2_infer draws. frechet: the Fréchet distance of as many
faces, with the clamp, to drawn ones (quality.py), beside that of as many drawn ones, which is far from zero for few. --measure takes some of them; the file
keeps what it has of others.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .data import MINI_DATA, read_faces
from .device import DTYPES, describe, machine, name_of, pick_device, pick_dtype
from .diffusion import NUM_TIMESTEPS
from .files import RESULTS, UserError, check_flags, fingerprint, lock, read_json, run, writable_file, write_json
from .inference import QUALITIES, DrawConfig, check_size, generate, to_pictures
from .model import load_unet
from .pictures import to_model
from .provenance import REPORTED, HelpFormatter, command_line, report_file, script_line
from .quality import HELD_OUT, check_faces, features, frechet_distance, side_of
from .samplers import SAMPLERS, ImageNoise
from .state import data_fingerprint

MEASURES = ["distance", "clamped", "frechet"]
SETS = 10  # of drawn faces, whose Fréchet distances tell what chance does


def configs(evaluations):
    """{(sampler, spacing): {evaluations: DrawConfig}}; heun has two a step, and one in the last."""
    rows = {}
    for sampler in SAMPLERS:
        for spacing in ("trailing", "logsnr") if sampler in ("dpmpp_2m", "unipc") else ("trailing",):
            rows[sampler, spacing] = {n: DrawConfig(sampler, (n + 1) // 2 if sampler == "heun" else n, spacing, "one") for n in evaluations}
    return rows


def parse_args():
    parser = argparse.ArgumentParser(description="Measures every sampler by its number of evaluations.", formatter_class=HelpFormatter)
    parser.add_argument("--measure", choices=MEASURES, nargs="+", default=MEASURES, help="what is measured")
    parser.add_argument("--faces", type=Path, default=HELD_OUT, help="folder of drawn faces that the network was not trained on, for frechet")
    parser.add_argument("--checkpoint", type=Path, default=MINI_DATA / "UNet.pt", help="the network's state dict")
    parser.add_argument("--count", type=int, default=100, help="faces whose Fréchet distance is measured")
    parser.add_argument("--near", type=int, default=4, help="faces whose distance to the answer of --truth steps is measured")
    parser.add_argument("--truth", type=int, default=1000, help="steps of that answer, by ddim")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50], help="of the network, an image")
    parser.add_argument("--side", type=int, default=None, help="of the pictures (default: 64 for the bundled network; others do not tell theirs)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noises")
    parser.add_argument("--batch-size", type=int, default=25, help="faces at a time")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--output", type=Path, default=None, help=f"the JSON file to write {REPORTED}")
    args = parser.parse_args()
    check_flags(args, ("count", "batch_size"), lambda value: value >= 2, "at least 2")
    check_flags(args, ("near",), lambda value: value >= 1, "at least 1")
    check_flags(args, ("truth",), lambda value: 1 <= value <= NUM_TIMESTEPS, f"between 1 and {NUM_TIMESTEPS}")
    try:
        configs(args.evaluations)
    except ValueError as error:
        raise UserError(f"--evaluations: {error}") from None
    if "frechet" in args.measure:
        check_faces(args.faces)
    args.output = report_file(args.output, "p2_samplers.json", args.checkpoint, MINI_DATA / "UNet.pt")
    args.command = command_line("python -m p2_ddim.sweep", parser, args, leave_out=("measure", "device", "output"))
    args.side = side_of(args)
    check_flags(args, ("side",), lambda value: value >= 2, "at least 2")
    return args


def reference_of(folder, side, count):
    """(features of drawn faces, Fréchet distances to them of up to `SETS` sets of `count` others; at least half of the faces remain the reference)"""
    faces = read_faces(folder, side)
    if len(faces) < 2 * count:
        raise UserError(f"{folder} has {len(faces)} pictures; --count {count} needs twice as many at least")
    found = features(to_pictures(to_model(faces)))  # stretched, as the generated ones are
    sets = min(SETS, len(faces) // count // 2)
    truth, others = found[:-sets * count], found[-sets * count:].reshape(sets, count, -1)
    return truth, [frechet_distance(own, truth) for own in others]


def main():
    args = parse_args()
    with lock(writable_file(args.output).parent, "-p2_sweep"):  # each row is added to those that are there: a second run would lose some
        compare(args)


def compare(args):
    """Measures what is missing, and writes it."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    print(f"measuring {args.checkpoint} on {describe(device, dtype)}", flush=True)
    unet = load_unet(args.checkpoint, device)
    check_size(unet.config, (3, args.side, args.side))
    names = [f"quality/{i}" for i in range(max(args.count, args.near))]
    noises = dict(zip(names, ImageNoise(args.seed, names, (3, args.side, args.side))()))

    def draw(config, count):  # of another seed than the noises are: what ddpm adds must not be what it begins with
        some = {name: noises[name] for name in names[:count]}
        return torch.stack([x for _, x in generate(unet, some, config, args.batch_size, f"{args.seed}, fresh", dtype)])

    results = read_json(args.output) if args.output.is_file() else {}
    for measure in args.measure:
        part = {"model": fingerprint(args.checkpoint), "dtype": name_of(dtype), "seed": args.seed, "side": args.side}
        clip, fine = measure != "distance", None
        if measure == "frechet":
            part |= {"faces": args.count, "drawn": data_fingerprint(read_faces(args.faces, args.side))}
        else:
            part |= {"faces": args.near, "truth_steps": args.truth}
        before = {"drawn": part.get("drawn"), "side": 64} | results.get(measure, {})  # older files do not tell them
        if {name: before.get(name) for name in part} != part:  # otherwise its rows are as they would be measured again, and count
            results[measure] = {"machine": machine(device), **part, "rows": []}
        results[measure]["command"] = args.command
        if measure == "frechet":
            truth, drawn = reference_of(args.faces, args.side, args.count)
            results[measure] |= {"of_drawn": float(np.mean(drawn)), "of_drawn_sets": drawn}
        have = {(row["sampler"], row["spacing"], row["asked"]) for row in results[measure]["rows"]}
        rows = {**configs(args.evaluations), ("exact", "leading"): {QUALITIES["exact"].evaluations: QUALITIES["exact"]}}
        for (sampler, spacing), settings in rows.items():
            for n, config in settings.items():
                if (sampler, spacing, n) in have:
                    continue
                if measure == "frechet":
                    value = frechet_distance(features(to_pictures(draw(config, args.count))), truth)
                elif sampler == "ddpm" or (sampler, clip) == ("exact", False):  # random; the convention has the clamp
                    continue
                else:
                    if fine is None:
                        fine = draw(DrawConfig(num_steps=args.truth, spacing="trailing", last_alpha_bar="one", clip=clip), args.near)
                    value = float((draw(replace(config, clip=clip), args.near) - fine).square().mean().sqrt() * 127.5)
                row = {"sampler": sampler, "spacing": spacing, "evaluations": config.evaluations, "asked": n, "value": value}
                results[measure]["rows"].append(row)
                print(measure, json.dumps(row), flush=True)
                write_json(args.output, results)
    own = () if args.output == RESULTS / "p2_samplers.json" else ("--samplers", args.output, "--checkpoint", args.checkpoint)
    print(f"wrote {args.output}\nnext: {script_line('p2_figures.sh', *own)}")


if __name__ == "__main__":
    run(main)
