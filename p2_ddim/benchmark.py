"""Seconds per 256x256 face with the full-size network (random weights: time does not depend on them), several ways side by side.

    python -m p2_ddim.benchmark      # writes report/results/p2_benchmark.json

Each way runs in a process of its own, so that its peak memory is its own. A step is timed, as the median of several, and multiplied by the
50 of a face. Where the time goes, per kind of layer, stands beside how fast a large matrix product is in the same process: the machine's peak. What
bf16 costs in quality is measured on the miniature: the MSE of its pictures against its reference images.
"""

import argparse
import json
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .data import MINI_DATA, read_noises
from .device import DTYPES, describe, is_slow, machine, peak_memory, pick_device
from .diffusion import Denoiser
from .evaluate import mse, read_pixels
from .files import ROOT, UserError, check_flags, note, run, writable_file, write_json
from .guard import command as command_of
from .inference import DrawConfig, check_size, generate, to_pictures
from .model import SelfAttention, UNet, UNetConfig, load_unet
from .provenance import HelpFormatter, command_line
from .samplers import ddim

RESULTS = ROOT / "report" / "results" / "p2_benchmark.json"
WAYS = {  # name: (which network, dtype, channels-last, batch size)
    "plain loop, fp32": ("ours", "fp32", False, 1),
    "diffusers, fp32": ("diffusers", "fp32", False, 1),
    "this project, fp32": ("ours", "fp32", True, None),
    "this project, bf16": ("ours", "bf16", True, None),
}


class Plain(Denoiser):
    """Any network, called as it is: in the layout that x has."""

    def eps(self, x, t):
        answer = self.unet(x, torch.full((len(x),), t, device=x.device))
        return getattr(answer, "sample", answer)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def matrix_peak(dtype, device, size=4096, repeats=5):
    """Operations a second of a product of two square matrices, the best of several: two for each multiplication and addition."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def kind_and_operations(module, output):
    """(kind of layer, multiplications and additions) of one call. Norms and what is left have a few a value, not counted: memory is their limit."""
    if isinstance(module, nn.Conv2d):
        kind = "3x3 convolutions" if module.kernel_size == (3, 3) else "1x1 convolutions"
        return kind if module.stride == (1, 1) else f"{kind}, stride 2", 2 * output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return "linear", 2 * output.numel() * module.in_features
    if isinstance(module, SelfAttention):
        return "attention", 4 * output.numel() * output.shape[-2] * output.shape[-1]  # q k and the weighted sum of v, each of all positions
    return ("norms" if isinstance(module, nn.GroupNorm) else "activations, concatenations, sums"), 0


@torch.inference_mode()
def by_kind(unet, call, repeats, device):
    """{kind of layer: {"seconds", "operations"}} of call(), which runs the network once; the median of several, after one to warm up.

    A layer's time is its own, without the layers inside it; each is waited for, so that the sum is a little more than the whole."""
    runs, operations, open_calls = [], {}, []

    def before(module, inputs):
        wait(device)
        open_calls.append([time.perf_counter(), 0.0])

    def after(module, inputs, output):
        wait(device)
        started, inner = open_calls.pop()
        took = time.perf_counter() - started
        if open_calls:
            open_calls[-1][1] += took
        kind, count = kind_and_operations(module, output)
        runs[-1][kind] += took - inner
        operations[len(runs), kind] = operations.get((len(runs), kind), 0) + count

    timed = [unet, *(module for module in unet.modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, SelfAttention)))]
    hooks = [hook for module in timed for hook in (module.register_forward_pre_hook(before), module.register_forward_hook(after))]
    for _ in range(repeats + 1):
        runs.append(defaultdict(float))
        call()
    for hook in hooks:
        hook.remove()
    return {kind: {"seconds": float(np.median([run[kind] for run in runs[1:]])), "operations": operations[1, kind]} for kind in runs[0]}


def shares_of_peak(kinds, peak, seconds):
    """kinds, each with its share of the time and, where it computes, its speed as a share of the machine's; and all of them, in `seconds` a step."""
    total, whole = sum(row["operations"] for row in kinds.values()), sum(row["seconds"] for row in kinds.values())
    for row in kinds.values():
        row["share_of_time"] = row["seconds"] / whole
        row["share_of_peak"] = row["operations"] / row["seconds"] / peak if row["operations"] else None
    return {"peak": peak, "operations": total, "share_of_peak": total / seconds / peak, "kinds": kinds}


def measure(way, batch_size, side, repeats, device):
    """Seconds per image and step, and peak memory in GB, of one way; of this project's, also where they go."""
    kind, dtype, channels_last, own_batch = WAYS[way]
    torch.manual_seed(0)
    unet = UNet(UNetConfig()).eval().requires_grad_(False)
    if kind == "diffusers":
        from .reference import to_diffusers

        unet = to_diffusers(unet)
    unet = unet.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    model = Denoiser(unet, dtype=DTYPES[dtype]) if channels_last else Plain(unet)
    n = own_batch or batch_size
    seconds = []
    with torch.inference_mode():
        started = time.perf_counter()
        for _, state in zip(range(repeats + 1), ddim(model, torch.randn(n, 3, side, side, device=device), DrawConfig().steps())):
            state.x.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    a_step = float(np.median(seconds[1:]))  # the first is a warm-up
    row = {"seconds_per_step": a_step / n, "batch_size": n, "peak_memory_gb": peak_memory(device) / 1e9}
    if channels_last:
        x = torch.randn(n, 3, side, side, device=device)
        kinds = by_kind(unet, lambda: model.eps(x, 500), repeats, device)
        row["arithmetic"] = shares_of_peak(kinds, matrix_peak(DTYPES[dtype], device, repeats=repeats), a_step)
    return row


def miniature_mse(device):
    """MSE of the miniature's pictures against its reference images, in fp32 and, where the device computes it faster, bf16."""
    noises, unet = read_noises(MINI_DATA / "noise"), load_unet(MINI_DATA / "UNet.pt", device)
    results = {}
    for name in (name for name in ("fp32", "bf16") if not is_slow(name, device)):
        pictures = {k: to_pictures(x[None])[0] for k, x in generate(unet, noises, DrawConfig(), 5, dtype=DTYPES[name], shown=False)}
        results[name] = float(np.mean([mse(picture, read_pixels(MINI_DATA / "GT" / f"{k}.png")) for k, picture in pictures.items()]))
    return results


def main():
    parser = argparse.ArgumentParser(description="Times the full-size face network.", formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--batch-size", type=int, default=2, help="of this project's ways")
    parser.add_argument("--side", type=int, default=256, help="of the images")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; their median counts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--way", choices=list(WAYS), default=None, help=argparse.SUPPRESS)  # one way, in this process
    args = parser.parse_args()
    check_flags(args, ("batch_size", "side", "repeats"), lambda value: value >= 1, "at least 1")
    check_size(UNetConfig(), (3, args.side, args.side))
    device = pick_device(args.device)
    if args.way:
        print(json.dumps(measure(args.way, args.batch_size, args.side, args.repeats, device)))
        return
    writable_file(args.output)
    print(f"measuring the full-size network of {args.side}x{args.side} pixels on {describe(device)}, in each way's own format", flush=True)
    rows = {}
    slow = [way for way, (_, dtype, *_) in WAYS.items() if is_slow(dtype, device)]
    if slow:
        note(f"left out, as {describe(device)} computes it slower than fp32: {'; '.join(slow)}")
    for way in tqdm([way for way in WAYS if way not in slow], desc="ways", unit="way"):
        command = [*command_of("p2_ddim.benchmark"), "--way", way, "--device", args.device]
        command += [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("batch-size", "side", "repeats")]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{way}: {(result.stderr.strip().splitlines() or [f'its process ended with code {result.returncode}'])[-1]}")
        rows[way] = json.loads(result.stdout.strip().splitlines()[-1])
    plain = rows["plain loop, fp32"]["seconds_per_step"]
    for way, row in rows.items():
        row |= {"seconds_per_image": 50 * row["seconds_per_step"], "speed_up": plain / row["seconds_per_step"]}
        print(f"{way:22} {row['seconds_per_step']:7.3f} s a step  {row['seconds_per_image']:7.1f} s an image  "
              f"{row['speed_up']:5.2f} x  {row['peak_memory_gb']:5.2f} GB  batch {row['batch_size']}")
    for way, row in rows.items():
        if "arithmetic" in row:
            told = row["arithmetic"]
            print(f"{way}: {told['operations'] / 1e12:.2f} T operations a step, at {told['share_of_peak']:.0%} of a "
                  f"matrix product's {told['peak'] / 1e9:.0f} G/s")
            for kind, part in sorted(told["kinds"].items(), key=lambda item: -item[1]["seconds"]):
                speed = "" if part["share_of_peak"] is None else f"at {part['share_of_peak']:4.0%} of it"
                print(f"  {kind:34} {part['share_of_time']:4.0%} of the time  {speed}")
    command = command_line("python -m p2_ddim.benchmark", parser, args, leave_out=("device", "output", "way"))
    results = {"command": command, "machine": machine(device), "side": args.side, "ways": rows}
    if (MINI_DATA / "UNet.pt").is_file():
        results["miniature_mse"] = miniature_mse(device)
        print("MSE of the miniature against its references: " + ", ".join(f"{k} {v:.4f}" for k, v in results["miniature_mse"].items()))
    write_json(args.output, results)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
