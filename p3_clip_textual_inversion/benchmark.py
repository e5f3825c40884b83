"""How fast P3 is: zero-shot classification, pictures a second; and textual inversion beside the straightforward way, steps a second.

    python -m p3_clip_textual_inversion.benchmark      # writes report/results/p3_benchmark.json

Each row runs in a process of its own, so that its peak memory is its own. ViT-B/32 has random weights: time does not depend on them.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tqdm import tqdm

from . import diffusion
from .clip import compute_in, image_features, load_clip, load_pictures
from .concepts import read_concepts
from .data import example_pictures, varied
from .defaults import MINIATURE
from .device import DTYPES, autocast, describe, is_slow, machine, peak_memory, pick_device
from .embedding import add_words, initial_rows
from .files import MINI, ROOT, UserError, check_flags, note, read_json, run, writable_file, write_json
from .guard import command as command_of
from .inference import DrawConfig, generate, load
from .model import MINI_SD, load_stable_diffusion
from .objective import Loss
from .provenance import HelpFormatter
from .sources import draw_batch, draw_noise, encode, pick

RESULTS = ROOT / "report" / "results" / "p3_benchmark.json"
ROUNDS = 3  # of the ways to classify and to learn, in turn; the best of each counts, since whatever else a machine does only slows it
KINDS = ("zero-shot", "learn", "draw")
ROWS = {  # name: (what, how, dtype)
    "miniature of CLIP, plain open_clip, fp32": ("zero-shot", ("miniature", "plain"), "fp32"),
    "miniature of CLIP, this project, fp32": ("zero-shot", ("miniature", "ours"), "fp32"),
    "miniature of CLIP, this project, bf16": ("zero-shot", ("miniature", "ours"), "bf16"),
    "ViT-B/32, plain open_clip, fp32": ("zero-shot", ("ViT-B-32", "plain"), "fp32"),
    "ViT-B/32, this project, fp32": ("zero-shot", ("ViT-B-32", "ours"), "fp32"),
    "ViT-B/32, plain open_clip, bf16": ("zero-shot", ("ViT-B-32", "plain"), "bf16"),
    "ViT-B/32, this project, bf16": ("zero-shot", ("ViT-B-32", "ours"), "bf16"),
    "textual inversion, straightforward, fp32": ("learn", "plain", "fp32"), "textual inversion, this project, fp32": ("learn", "ours", "fp32"),
    "textual inversion, straightforward, bf16": ("learn", "plain", "bf16"), "textual inversion, this project, bf16": ("learn", "ours", "bf16"),
    "25 steps of drawing, fp32": ("draw", "miniature", "fp32"), "25 steps of drawing, bf16": ("draw", "miniature", "bf16"),
}


def write_photographs(folder, count):
    """Paths of `count` JPEG files of 640x480, soft and grainy as photographs are; few are different, which no reader knows."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        if i < 8:
            soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
            grain = rng.normal(0, 6, (480, 640, 3))
            Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        else:
            shutil.copyfile(folder / f"{i % 8}.jpg", folder / f"{i}.jpg")
        paths.append(folder / f"{i}.jpg")
    return paths


def plain_features(clip, transform, paths, device, dtype):
    """What published scripts do: a batch of 64 is opened, prepared and encoded, then the next; half precision by autocast."""
    features = []
    for start in range(0, len(paths), 64):
        batch = torch.stack([transform(Image.open(path)) for path in paths[start:start + 64]]).to(device)
        with torch.no_grad(), autocast(device, dtype):
            features.append(clip.encode_image(batch))
    return torch.nn.functional.normalize(torch.cat(features).float(), dim=-1)


def zero_shot_speed(name, way, dtype, device, count):
    """Pictures a second, from JPEG files to features, in batches of 64."""
    if name == "miniature":
        clip, transform, _ = load_clip(str(MINI / "clip"), device=device)
    else:
        clip = open_clip.create_model(name, device=device).eval().requires_grad_(False)
        transform = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    if way == "ours":
        compute_in(clip, dtype)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), count)

        def encode_files(paths):
            if way == "plain":
                return plain_features(clip, transform, paths, device, dtype)
            return image_features(clip, load_pictures(paths, transform, 64), device, dtype)
        encode_files(paths[:16])  # warm-up
        started = time.perf_counter()
        encode_files(paths).sum().item()
        return {"pictures_per_second": len(paths) / (time.perf_counter() - started)}


def drawing_speed(dtype, device):
    config = DrawConfig(num_steps=25, guidance_weight=MINIATURE.drawing.guidance_weight, dtype=dtype, batch_size=8)
    parts = load(MINI_SD, device, config)
    list(generate(parts, ["a fox"] * 8, list("abcdefgh"), replace(config, num_steps=2)))  # warm-up
    started = time.perf_counter()
    list(generate(parts, ["a fox"] * 8, list("abcdefgh"), config))
    return {"seconds_per_picture": (time.perf_counter() - started) / 8}


def learning_speed(way, dtype, device, steps, batch_size):
    """Steps a second of learning the bundled subject, by the median step after five to warm up, and the mean loss of the last half.

    "plain" is what published scripts do: the whole token table goes to AdamW, the other rows are restored after each step, and every
    step encodes its pictures and its captions. Both ways see the same pictures, noise and timesteps."""
    concept = read_concepts(MINI / "textual_inversion" / "input.json")[0]
    pictures = example_pictures(concept.folder)
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
                loss = model(x0, t, eps, *model.ids(texts))
            else:
                picked = pick(sources, batch_size, generator)
                with torch.no_grad():
                    posterior = parts.vae.encode(squares[[row for _, row, _ in picked]].to(device)).latent_dist
                x0, eps, t = draw_noise(posterior.mean.float(), posterior.std.float(), scaling, generator)
                hidden = parts.text_encoder(parts.tokens([caption for _, _, caption in picked]).to(device)).last_hidden_state
                loss = diffusion.loss(parts.unet, parts.alpha_bar, x0, t, eps, hidden).mean()
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
        result = zero_shot_speed(*how, DTYPES[dtype], device, args.images)
    elif what == "draw":
        result = drawing_speed(DTYPES[dtype], device)
    else:
        result = learning_speed(how, DTYPES[dtype], device, args.steps, args.batch_size)
    return result | {"peak_memory_gb": peak_memory(device) / 1e9}


def rows_to_keep(path, here):
    """The rows of an earlier file, if they were measured on this machine, whatever the day."""
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        there = content["machine"]
        same = "device" in there and all(there.get(name, value) == value for name, value in here.items() if name != "date")
        rows = dict(content["rows"])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is no benchmark's; choose another --output") from None
    if not same:
        raise UserError(f"{path} was measured on another machine; choose another --output, or measure all without --only")
    return rows


def main():
    parser = argparse.ArgumentParser(description="Times classification, learning and drawing.", formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--images", type=int, default=256, help="pictures through each CLIP")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of textual inversion")
    parser.add_argument("--batch-size", type=int, default=8, help="of textual inversion")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS,
                        help="what to measure; other rows of the file stay, if they were measured on this machine")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--row", choices=list(ROWS), default=None, help=argparse.SUPPRESS)  # one row, in this process
    args = parser.parse_args()
    check_flags(args, ("images", "steps", "batch_size"), lambda value: value >= 1, "at least 1")
    device = pick_device(args.device)
    if args.row:
        print(json.dumps(measure(args.row, device, args)))
        return
    writable_file(args.output)
    here = machine(device)
    print(f"measuring the miniature, and networks of the real size, on {describe(device)}, in each row's own format", flush=True)
    rows = {} if len(args.only) == len(KINDS) else rows_to_keep(args.output, here)
    measured, chosen = {}, [row for row, (what, *_) in ROWS.items() if what in args.only]
    slow = [row for row in chosen if is_slow(ROWS[row][2], device)]
    if slow:
        note(f"left out, as {describe(device)} computes them slower than fp32: {'; '.join(slow)}")
        chosen = [row for row in chosen if row not in slow]
    for row in tqdm([row for turn in range(ROUNDS) for row in chosen if turn == 0 or ROWS[row][0] != "draw"], desc="measuring", unit="row"):
        command = [*command_of("p3_clip_textual_inversion.benchmark"), "--row", row, "--device", args.device]
        command += [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("images", "steps", "batch-size")]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{row}: {(result.stderr.strip().splitlines() or [f'its process ended with code {result.returncode}'])[-1]}")
        values = json.loads(result.stdout.strip().splitlines()[-1])
        speed = "pictures_per_second" if "pictures_per_second" in values else "steps_per_second"
        if row not in measured or values[speed] > measured[row][speed]:
            measured[row] = values
    rows |= measured
    for row, values in rows.items():
        print(f"{row:42} " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    write_json(args.output, {"machine": here, "batch_size": args.batch_size, "rows": {row: rows[row] for row in ROWS if row in rows}})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
