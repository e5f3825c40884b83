"""Real pictures in the network's noise: pictures to noises and exactly back, and from one picture to the next.

    python -m p2_ddim.edit invert PICTURES OUT UNet.pt          # then: bash scripts/p2_infer.sh OUT AGAIN UNet.pt --sampler belm
    python -m p2_ddim.edit morph PICTURE PICTURE ... OUT        # OUT/strip.png and OUT/morph.webp
    python -m p2_ddim.edit measure                              # how exactly, in three number formats: report/results/p2_exact.json
"""

import argparse
import copy
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .data import MINI_DATA, checked_pair, square
from .device import DTYPES, describe, in_batches, is_slow, machine, name_of, pick_device, pick_dtype, progress
from .diffusion import Denoiser
from .evaluate import mse, psnr
from .files import ROOT, UserError, atomic_path, check_flags, fingerprint, lock, run, writable_file, writable_folder, write_json
from .inference import DrawConfig, check_size, generate, to_pictures
from .interpolation import slerp
from .inversion import exact_batch, to_pair
from .model import load_unet
from .pictures import read_picture, read_pictures, save_image, sheet, to_model
from .provenance import REPORTED, HelpFormatter, Made, read_made, report_file, script_line
from .tensors import read_tensors, tensor_fingerprint


def of_one_size(pictures):
    """The pictures, {name: uint8 [H, W, 3]}; a `UserError` where they are not all of one size."""
    sizes = {name: f"{picture.shape[1]}x{picture.shape[0]}" for name, picture in pictures.items()}
    first = next(iter(sizes))
    other = next((name for name in sizes if sizes[name] != sizes[first]), None)
    if other:
        raise UserError(f"{other} is {sizes[other]}, but {first} is {sizes[first]}; give --side to crop them to one size")
    return pictures


@torch.inference_mode()
def invert_all(unet, pictures, config, batch_size, dtype=torch.float32):
    """{name: uint8 [H, W, 3]}, all of one size -> yields (name, float64 [2, 3, H, W]), the pair of states from which belm draws each picture."""
    device = next(unet.parameters()).device
    model = Denoiser(unet, clip=False, dtype=dtype)

    def work(batch):
        return to_pair(model, to_model(np.stack([pictures[name] for name in batch]), device), config.steps()).cpu()

    with progress(total=len(pictures), unit="picture", desc="finding noises") as bar:
        for batch, found in in_batches(list(pictures), exact_batch(batch_size, dtype), work, "face", "--dtype bf16 or --device cpu"):
            for name, pair in zip(batch, found):
                if not pair.isfinite().all():
                    raise UserError(f"the way back from {name} is not finite; try more --steps, or --dtype fp32")
                yield name, pair
            bar.update(len(batch))


def value_range(picture):
    """(lowest, highest) value of a picture, which the drawing stretches to."""
    return float(picture.min()), float(picture.max())


def facts_of(picture, num_steps, network, dtype):
    """What a pair is of, beside its numbers. picture: uint8 [H, W, 3]; network, dtype: by what it is found, as text; only the same draws the picture."""
    return {"picture": tensor_fingerprint(torch.from_numpy(picture)), "steps": torch.tensor(num_steps), "network": network, "dtype": dtype}


def refuse_others(folder, facts, overwrite):
    """A `UserError` for a file in the way of a picture's noise that `invert` did not write, such as one of the course's noises, or that is of another
    picture or network or of other settings, unless that may be overwritten. facts: {stem: `facts_of` what will be written}"""
    for stem, own in facts.items():
        path = folder / f"{stem}.pt"
        if not os.path.lexists(path):
            continue
        try:
            there = checked_pair(read_tensors(path, "noise tensor"), path)
        except (UserError, AttributeError):
            raise UserError(f"{path} is there, was not made by p2_invert, and is not overwritten; choose another OUT") from None
        if not overwrite and {name: there.get(name) for name in own} != own:
            raise UserError(f"{path} is of another picture, of another network or of other settings; choose another OUT, or give --overwrite")


def refuse_strip(folder):
    """A `UserError` for what is in the way of the strip and its animation and was not made by `morph`."""
    if any(os.path.lexists(folder / name) for name in ("strip.png", "morph.webp")) and (read_made(folder / "strip.png") or {}).get("program") != "p2_ddim.edit":
        raise UserError(f"{folder} has a strip.png or morph.webp that p2_ddim.edit did not make, and which is not overwritten; choose another OUT")


def save_pair(path, pair, picture, facts):
    """facts: of `facts_of`"""
    with atomic_path(path) as temporary:
        torch.save({"states": pair.clone(), "range": torch.tensor(value_range(picture), dtype=torch.float64), **facts}, temporary)


def morph(unet, pictures, config, frames, batch_size, dtype=torch.float32):
    """[uint8 [H, W, 3], ...] -> the way from each picture to the next in `frames` steps, both states along the sphere; the given ones are on it."""
    pairs = [pair for _, pair in invert_all(unet, {str(i): picture for i, picture in enumerate(pictures)}, config, batch_size, dtype)]
    starts, ranges = {}, {}
    for i, (a, b) in enumerate(pairwise(pairs)):
        for k in range(frames + (i + 2 == len(pairs))):
            alpha, name = k / frames, f"{i} {k}"
            starts[name] = torch.stack([slerp(one, other, alpha) for one, other in zip(a, b)])
            ranges[name] = [(1 - alpha) * low + alpha * high for low, high in zip(value_range(pictures[i]), value_range(pictures[i + 1]))]
    return [to_pictures(x[None], *ranges[name])[0] for name, x in generate(unet, starts, config, batch_size, dtype=dtype)]


def round_trip(unet, pictures, config, batch_size):
    """{number format: {"psnr": dB before rounding, "mse": squared grey levels after}} of {name: uint8 [H, W, 3]} to pairs and back; the worst picture's."""
    results = {}
    half = [] if is_slow("bf16", next(unet.parameters()).device) else [("bf16", unet, torch.bfloat16)]
    for name, network, dtype in (("fp64", copy.deepcopy(unet).double(), torch.float64), ("fp32", unet, torch.float32), *half):
        before, after = [], []
        pairs = dict(invert_all(network, pictures, config, batch_size, dtype))
        for key, x in generate(network, pairs, config, batch_size, dtype=dtype):
            picture = pictures[key]
            before.append(float((x - to_model(np.stack([picture]))[0].double()).square().mean()) * 127.5**2)
            after.append(mse(to_pictures(x[None], *value_range(picture))[0], picture))
        results[name] = {"psnr": psnr(max(before)), "mse": max(after)}
    return results


def measure(unet, args, config, batch_size):
    """The `measure` command: round trips of pictures that the network drew, and of others."""
    results = {"machine": machine(args.device), "checkpoint": args.checkpoint.name, "model": fingerprint(args.checkpoint), "steps": config.num_steps}
    for kind in ("references", "drawings"):
        found = read_pictures(getattr(args, kind), make=lambda picture: square(picture, args.side))[0]
        chosen = list(found)[::max(len(found) // args.count, 1)][:args.count]  # spread over the folder
        pictures = of_one_size({name: found[name] for name in chosen})
        check_size(unet.config, (3, *pictures[chosen[0]].shape[:2]))
        results[kind] = {"pictures": len(chosen), **round_trip(unet, pictures, config, batch_size)}
        for name in (name for name in ("fp64", "fp32", "bf16") if name in results[kind]):
            print(f"{kind}, {name}: {results[kind][name]['psnr']:.1f} dB, after rounding an MSE of at most {results[kind][name]['mse']:g}", flush=True)
    write_json(args.output, results)
    print(f"wrote {args.output}")


def parse_args():
    parser = argparse.ArgumentParser(description="Pictures to noises and back.", formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    invert = commands.add_parser("invert", help="a noise file for each picture", formatter_class=HelpFormatter,
                                 description="Writes OUT/{name}.pt for each picture, from which p2_infer.sh OUT AGAIN CKPT --sampler belm draws it again.")
    invert.add_argument("pictures", type=Path, metavar="PICTURES", help="folder of pictures, all of one size (or give --side)")
    invert.add_argument("output", type=Path, metavar="OUT", help="folder to write {name}.pt into")
    invert.add_argument("checkpoint", type=Path, metavar="CKPT", help="the network's state dict, UNet.pt")
    invert.add_argument("--overwrite", action="store_true", help="also where OUT has noises of other pictures or settings, which is refused otherwise")
    way = commands.add_parser("morph", help="from picture to picture", formatter_class=HelpFormatter,
                              description="From each picture to the next, through the noises that they come from: OUT/strip.png, OUT/morph.webp.")
    way.add_argument("pictures", type=Path, metavar="PICTURE", nargs="+", help="two pictures or more, of one size (or give --side)")
    way.add_argument("output", type=Path, metavar="OUT", help="folder to write into")
    way.add_argument("--checkpoint", type=Path, default=MINI_DATA / "UNet.pt", help="the network's state dict")
    way.add_argument("--frames", type=int, default=8, help="from one picture to the next")
    way.add_argument("--milliseconds", type=int, default=120, help="a frame of the animation")
    check = commands.add_parser("measure", help="how exactly pictures come back", formatter_class=HelpFormatter,
                                description="Measures round trips in float64, float32 and bfloat16.")
    check.add_argument("--references", type=Path, default=MINI_DATA / "GT", help="folder of pictures that the network drew")
    check.add_argument("--drawings", type=Path, default=ROOT / "hw2_data" / "mini" / "clip_zeroshot" / "val", help="folder of others, of the same size")
    check.add_argument("--checkpoint", type=Path, default=MINI_DATA / "UNet.pt", help="the network's state dict")
    check.add_argument("--count", type=int, default=10, help="pictures of each")
    check.add_argument("--output", type=Path, default=None, help=f"the JSON file to write {REPORTED}")
    for command in (invert, way, check):
        command.add_argument("--side", type=int, default=None, help="crop pictures to their middle square and bring it to this side (default: as they are)")
        command.add_argument("--steps", type=int, default=50, help="network calls a picture, each way")
        command.add_argument("--batch-size", type=int, default=None, help="pictures at a time (default: 2 on a CPU, 10 on a GPU)")
        if command is not check:
            command.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the network, the same for both ways")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    return parser.parse_args()


def main():
    args = parse_args()
    check_flags(args, ("steps",), lambda value: value >= 2, "at least 2")  # a pair of states has a step between them
    check_flags(args, ("batch_size", "side"), lambda value: value is None or value >= 1, "at least 1")
    try:
        config = DrawConfig("belm", args.steps, "trailing", "one")
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if args.command == "morph":
        check_flags(args, ("frames", "milliseconds"), lambda value: 1 <= value <= 10**6, "between 1 and 1000000")
        if len(args.pictures) < 2:
            raise UserError("a way needs two pictures at least: PICTURE PICTURE ... OUT")
    args.device = device = pick_device(args.device)
    batch_size = args.batch_size or (2 if device.type == "cpu" else 10)
    if args.command == "measure":
        check_flags(args, ("count",), lambda value: value >= 1, "at least 1")
        args.output = writable_file(report_file(args.output, "p2_exact.json", args.checkpoint, MINI_DATA / "UNet.pt"))
        measure(load_unet(args.checkpoint, device), args, config, batch_size)
        return
    dtype = pick_dtype(args.dtype, device)
    if args.command == "invert":
        pictures = read_pictures(args.pictures, make=lambda picture: square(picture, args.side))[0]
    else:
        pictures = {f"{i} {path.name}": square(read_picture(path), args.side) for i, path in enumerate(args.pictures)}
    of_one_size(pictures)
    with lock(writable_folder(args.output)):
        write(args, pictures, config, batch_size, device, dtype)


def write(args, pictures, config, batch_size, device, dtype):
    """The `invert` and the `morph` command. pictures: {name: uint8 [H, W, 3]}, all of one size."""
    output, first, network = args.output, next(iter(pictures)), fingerprint(args.checkpoint)
    if args.command == "invert":
        stems = {name: Path(name).stem for name in pictures}
        if len(set(stems.values())) < len(stems):
            raise UserError(f"two pictures of {args.pictures} have one name but for its ending; rename one")
        facts = {stems[name]: facts_of(picture, config.num_steps, network, name_of(dtype)) for name, picture in pictures.items()}
        refuse_others(output, facts, args.overwrite)
    else:
        refuse_strip(output)
    started = time.perf_counter()
    unet = load_unet(args.checkpoint, device)
    check_size(unet.config, (3, *pictures[first].shape[:2]))
    print(f"{len(pictures)} pictures, with {args.checkpoint}, on {describe(device, dtype)}", flush=True)
    if args.command == "invert":
        left = {name: picture for name, picture in pictures.items() if args.overwrite or not os.path.lexists(output / f"{stems[name]}.pt")}
        spread = []
        for name, pair in invert_all(unet, left, config, batch_size, dtype):
            save_pair(output / f"{stems[name]}.pt", pair, pictures[name], facts[stems[name]])
            spread.append(pair[0].std().item())
        there = f"{len(pictures) - len(left)} were there already; " if len(left) < len(pictures) else ""
        told = f"; their standard deviations are {min(spread):.2f} to {max(spread):.2f} (noise has 1)" if spread else ""
        print(f"{there}wrote {len(left)} noises to {output} in {time.perf_counter() - started:.1f} s{told}\nnext: "
              + script_line("p2_infer.sh", output, "AGAIN", args.checkpoint, "--sampler", "belm", "--steps", config.num_steps,
                            *([] if dtype == torch.float32 else ["--dtype", name_of(dtype)])))
        return
    frames = morph(unet, list(pictures.values()), config, args.frames, batch_size, dtype)
    rows = [frames[i * args.frames:(i + 1) * args.frames + 1] for i in range(len(pictures) - 1)]
    save_image(sheet(rows, above=[f"{k / args.frames:.3g}" for k in range(args.frames + 1)]), output / "strip.png",
               Made("p2_ddim.edit", {"frames": args.frames, "steps": config.num_steps, "dtype": name_of(dtype)}, {"model": network}).as_json())
    there_and_back = [Image.fromarray(frame) for frame in (*frames, *frames[-2:0:-1])]
    with atomic_path(output / "morph.webp") as temporary:
        there_and_back[0].save(temporary, save_all=True, append_images=there_and_back[1:], duration=args.milliseconds, loop=0, quality=90)
    print(f"wrote strip.png and morph.webp ({len(there_and_back)} frames) to {output} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
