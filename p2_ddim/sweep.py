"""What each sampler makes of how many evaluations of the network: the table that --quality is chosen from.

    python -m p2_ddim.make_mini faces runs/held_out --count 3000 --seed 1
    python -m p2_ddim.sweep --faces runs/held_out       # writes report/results/p2_samplers.json; p2_figures.sh draws it

Two measures: the distance to the answer of 1,000 steps from the same noise (root mean square, in grey levels; not for ddpm, whose answers are random), and
the Fréchet distance of as many faces to drawn ones (quality.py), beside that of drawn ones to drawn ones.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from .data import read_pictures
from .device import DTYPES, machine, pick_device, pick_dtype, use_tf32
from .files import RESULTS, UserError, check_flags, run, writable_file, write_json
from .inference import MINI, QUALITIES, DrawConfig, check_size, generate, to_pictures
from .model import load_unet
from .pictures import to_model
from .quality import features, frechet_distance
from .samplers import SAMPLERS, ImageNoise


def configs(evaluations):
    """{(sampler, spacing): {evaluations: DrawConfig}}; heun has two a step, and one in the last."""
    rows = {}
    for sampler in SAMPLERS:
        for spacing in ("trailing", "logsnr") if sampler in ("dpmpp_2m", "unipc") else ("trailing",):
            rows[sampler, spacing] = {n: DrawConfig(sampler, (n + 1) // 2 if sampler == "heun" else n, spacing, "one") for n in evaluations}
    return rows


def main():
    parser = argparse.ArgumentParser(description="Measures every sampler by its number of evaluations.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="folder of drawn faces that the network was not trained on")
    parser.add_argument("--checkpoint", type=Path, default=MINI / "UNet.pt", help="the network's state dict")
    parser.add_argument("--count", type=int, default=500, help="faces of each row")
    parser.add_argument("--near", type=int, default=16, help="of them, those whose distance to the answer of --truth steps is measured")
    parser.add_argument("--truth", type=int, default=1000, help="steps of that answer, by ddim")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--side", type=int, default=64, help="of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noises")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--output", type=Path, default=RESULTS / "p2_samplers.json", help="the JSON file to write")
    args = parser.parse_args()
    check_flags(args, ("count", "side", "batch_size"), lambda value: value >= 2, "at least 2")
    check_flags(args, ("near",), lambda value: 1 <= value <= args.count, "from 1 to --count")
    writable_file(args.output)
    use_tf32(False)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    unet = load_unet(args.checkpoint, device)
    check_size(unet.config, (3, args.side, args.side))
    faces = read_pictures(args.faces, args.side)
    if len(faces) < 2 * args.count:
        raise UserError(f"{args.faces} has {len(faces)} pictures; --count {args.count} needs twice as many at least")
    stretched = to_pictures(to_model(faces))  # as the generated ones are
    truth = features(stretched[:-args.count])
    names = [f"quality/{i}" for i in range(args.count)]
    noises = dict(zip(names, ImageNoise(args.seed, names, (3, args.side, args.side))()))

    def draw(config, count):
        some = {name: noises[name] for name in names[:count]}
        return torch.stack([x for _, x in generate(unet, some, config, args.batch_size, args.seed, dtype)])

    fine = draw(DrawConfig(num_steps=args.truth, spacing="trailing", last_alpha_bar="one"), args.near)
    results = {"machine": machine(device), "checkpoint": args.checkpoint.name, "faces": args.count, "near": args.near, "truth_steps": args.truth,
               "dtype": args.dtype, "frechet_of_drawn": frechet_distance(features(stretched[-args.count:]), truth), "rows": []}
    print(f"Fréchet distance of {args.count} drawn faces: {results['frechet_of_drawn']:.2f}", flush=True)
    rows = {**configs(args.evaluations), ("exact", "leading"): {QUALITIES["exact"].evaluations: QUALITIES["exact"]}}
    for (sampler, spacing), settings in rows.items():
        for n, config in settings.items():
            x = draw(config, args.count)
            distance = None if sampler == "ddpm" else float((x[:args.near] - fine).square().mean().sqrt() * 127.5)
            row = {"sampler": sampler, "spacing": spacing, "evaluations": config.evaluations, "asked": n, "distance": distance,
                   "frechet": frechet_distance(features(np.concatenate([to_pictures(x)])), truth)}
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_json(args.output, results)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
