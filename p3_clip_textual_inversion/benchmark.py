"""How fast P3 is: zero-shot classification, pictures a second; and textual inversion beside the straightforward way, steps a second.

    python -m p3_clip_textual_inversion.benchmark      # writes report/results/p3_benchmark.json

Each row runs in a process of its own, so that its peak memory is its own. ViT-B/32 has random weights: time does not depend on them.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import open_clip
import torch
from tqdm import tqdm

from . import diffusion
from .clip import image_features, load_clip
from .data import example_pictures, read_concepts, varied
from .defaults import MINIATURE
from .device import DTYPES, pick_device
from .embedding import add_words, initial_rows
from .files import MINI, ROOT, UserError, check_flags, run, writable_file, write_json
from .inference import DrawConfig, draw
from .stable_diffusion import load_stable_diffusion
from .train import Loss, draw_batch, draw_noise, encode, pick

RESULTS = ROOT / "report" / "results" / "p3_benchmark.json"
ROUNDS = 3  # of the ways to learn, in turn; the best of each counts, since whatever else a machine does only slows it
ROWS = {  # name: (what, how, dtype)
    "miniature of CLIP, fp32": ("zero-shot", "miniature", "fp32"), "miniature of CLIP, bf16": ("zero-shot", "miniature", "bf16"),
    "ViT-B/32, fp32": ("zero-shot", "ViT-B-32", "fp32"), "ViT-B/32, bf16": ("zero-shot", "ViT-B-32", "bf16"),
    "textual inversion, straightforward, fp32": ("learn", "plain", "fp32"), "textual inversion, this project, fp32": ("learn", "ours", "fp32"),
    "textual inversion, straightforward, bf16": ("learn", "plain", "bf16"), "textual inversion, this project, bf16": ("learn", "ours", "bf16"),
    "25 steps of drawing, fp32": ("draw", "miniature", "fp32"), "25 steps of drawing, bf16": ("draw", "miniature", "bf16"),
}


def zero_shot_speed(name, dtype, device, count):
    """Pictures a second through the image tower, in batches of 64."""
    clip = load_clip(str(MINI / "clip"))[0] if name == "miniature" else open_clip.create_model(name).eval()
    size = clip.visual.image_size
    batches = [torch.randn(64, 3, *(size if isinstance(size, tuple) else (size, size))) for _ in range(max(count // 64, 1) + 1)]
    clip = clip.to(device)
    image_features(clip, batches[:1], device, dtype)  # warm-up
    started = time.perf_counter()
    image_features(clip, batches[1:], device, dtype).sum().item()
    return {"pictures_per_second": 64 * (len(batches) - 1) / (time.perf_counter() - started)}


def drawing_speed(dtype, device):
    parts = load_stable_diffusion(device=device)
    config = DrawConfig(num_steps=25, guidance_weight=MINIATURE.drawing.guidance_weight, dtype=dtype, batch_size=8)
    list(draw(parts, ["a fox"] * 8, list("abcdefgh"), replace(config, num_steps=2)))  # warm-up
    started = time.perf_counter()
    list(draw(parts, ["a fox"] * 8, list("abcdefgh"), config))
    return {"seconds_per_picture": (time.perf_counter() - started) / 8}


def learning_speed(way, dtype, device, steps, batch_size):
    """Steps a second of learning the bundled subject, by the median step after five to warm up, and the mean loss of the last half.

    "plain" is what published scripts do: the whole token table goes to AdamW, the other rows are restored after each step, and every
    step encodes its pictures and its captions. Both ways see the same pictures, noise and timesteps."""
    concept = read_concepts(MINI / "textual_inversion" / "input.json")[0]
    pictures = example_pictures(MINI / "textual_inversion" / concept.number)
    parts = load_stable_diffusion(device=device, dtype=dtype if way == "ours" else torch.float32)
    rows, scaling = initial_rows(parts, concept.src_image, 1), parts.vae.config.scaling_factor
    squares = torch.cat([varied(picture, parts.side, 8, np.random.default_rng(0)) for picture in pictures])
    captions = [f"a drawing of a {concept.token}"]
    sources = [encode(parts, squares, captions)]
    if way == "ours":
        trained = add_words(parts, {concept.token: rows}).rows
    else:
        parts.tokenizer.add_tokens([concept.token])
        parts.text_encoder.resize_token_embeddings(len(parts.tokenizer), mean_resizing=False)
        trained = parts.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        trained.data[-1] = rows[0]
        original = trained.detach().clone()
    optimizer = torch.optim.AdamW([trained], lr=5e-3, weight_decay=0.0)
    model, losses, seconds = Loss(parts, None), [], []
    for step in range(steps + 5):
        started, generator = time.perf_counter(), torch.Generator().manual_seed(step)
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            if way == "ours":
                x0, eps, t, texts = draw_batch(sources, scaling, batch_size, generator)
                loss = model(x0, eps, t, parts.tokens(texts).to(device))
            else:
                picked = pick(sources, batch_size, generator)
                with torch.no_grad():
                    posterior = parts.vae.encode(squares[[row for _, row, _ in picked]].to(device)).latent_dist
                x0, eps, t = draw_noise(posterior.mean.float(), posterior.std.float(), scaling, generator)
                hidden = parts.text_encoder(parts.tokens([caption for _, _, caption in picked]).to(device)).last_hidden_state
                loss = diffusion.loss(parts.unet, parts.alpha_bar, x0, eps, t, hidden).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if way == "plain":
            with torch.no_grad():
                trained[:-1] = original[:-1]
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"steps_per_second": 1 / float(np.median(seconds[5:])), "loss": float(np.mean(losses[-steps // 2:])),
            "optimizer_bytes": sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))}


def measure(row, device, args):
    what, how, dtype = ROWS[row]
    if what == "zero-shot":
        result = zero_shot_speed(how, DTYPES[dtype], device, args.images)
    elif what == "draw":
        result = drawing_speed(DTYPES[dtype], device)
    else:
        result = learning_speed(how, DTYPES[dtype], device, args.steps, args.batch_size)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return result | {"peak_memory_gb": peak / 1e9}


def main():
    parser = argparse.ArgumentParser(description="Times classification, learning and drawing.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--images", type=int, default=512, help="pictures through each CLIP")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of textual inversion")
    parser.add_argument("--batch-size", type=int, default=8, help="of textual inversion")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--row", choices=list(ROWS), default=None, help=argparse.SUPPRESS)  # one row, in this process
    args = parser.parse_args()
    check_flags(args, ("images", "steps", "batch_size"), lambda value: value >= 1, "at least 1")
    device = pick_device(args.device)
    if args.row:
        print(json.dumps(measure(args.row, device, args)))
        return
    writable_file(args.output)
    rows = {}
    for row in tqdm([row for turn in range(ROUNDS) for row, (what, *_) in ROWS.items() if turn == 0 or what == "learn"], desc="measuring", unit="row"):
        command = [sys.executable, "-m", "p3_clip_textual_inversion.benchmark", "--row", row, "--device", args.device]
        command += [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("images", "steps", "batch-size")]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{row}: {result.stderr.strip().splitlines()[-1]}")
        values = json.loads(result.stdout.strip().splitlines()[-1])
        if row not in rows or values["steps_per_second"] > rows[row]["steps_per_second"]:
            rows[row] = values
    for row, values in rows.items():
        print(f"{row:42} " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    write_json(args.output, {"machine": {"device": name or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0],
                                         "python": platform.python_version(), "date": date.today().isoformat()}, "batch_size": args.batch_size, "rows": rows})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
