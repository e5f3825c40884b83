"""Draws one face per noise file: OUT/{noise name}.png.

    python -m p2_ddim.inference NOISE_DIR OUT UNet.pt
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .ddim import DDIMConfig, ImageNoise, ddim
from .device import DTYPES, autocast, describe, in_batches, pick_device, pick_dtype, progress, use_tf32
from .estimate import announce
from .files import ROOT, UserError, run, writable_folder
from .model import load_unet
from .pictures import save_image
from .tensors import is_plain, read_tensors

MINI = ROOT / "hw2_data" / "mini" / "face"


def read_noise(path):
    """A noise file, [1, 3, H, W] or [3, H, W] -> float32 [3, H, W]. Tensors saved on a GPU load on a CPU."""
    noise = read_tensors(path, "noise tensor")
    if not is_plain(noise):
        raise UserError(f"{path} holds a {type(noise).__name__}, expected a plain (dense) float tensor [1, 3, H, W]")
    if tuple(noise.shape[:-2]) not in ((1, 3), (3,)) or not noise.is_floating_point():
        raise UserError(f"{path} holds a {noise.dtype} tensor {tuple(noise.shape)}, expected floating point [1, 3, H, W] or [3, H, W]")
    if noise.numel() > noise.untyped_storage().nbytes():  # one number that stands for very many: each takes a byte at least
        raise UserError(f"{path} holds {tuple(noise.shape)} values, but is too small for them")
    noise = noise.reshape(noise.shape[-3:]).float()
    if not noise.isfinite().all():
        raise UserError(f"{path} has values that are not finite; expected standard normal noise")
    return noise


def read_noises(folder):
    """{name: noise [3, H, W]} of every *.pt in a folder, in name order; all of one size."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder of noises: {folder}")
    noises = {path.stem: read_noise(path) for path in sorted(folder.glob("[!.]*.pt"))}
    if not noises:
        raise UserError(f"{folder} has no .pt files; expected noise tensors, 00.pt, 01.pt, ...")
    shapes = {name: tuple(noise.shape) for name, noise in noises.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(f"{folder / name}.pt is {shape}, but {first}.pt is {shapes[first]}; all noises must have one size")
    return noises


def check_size(config, shape):
    """Refuses an image size [3, H, W] that the network cannot halve as often as it has levels."""
    factor = 2 ** (len(config.widths) - 1)
    if 0 in shape or shape[1] % factor or shape[2] % factor:
        raise UserError(f"{shape[1]}x{shape[2]} is no size for this network: it needs sides that are multiples of {factor}")


def predictor(model, dtype=torch.float32):
    """predict(x, t) -> eps float32, for `ddim` and `invert`; computed in `dtype` by autocast."""
    device = next(model.parameters()).device

    def predict(x, t):
        with autocast(device, dtype):
            steps = torch.full((len(x),), t, dtype=torch.long, device=device)
            return model(x.contiguous(memory_format=torch.channels_last), steps).float()
    return predict


def to_pictures(x):
    """float [B, 3, H, W] -> uint8 numpy [B, H, W, 3]: each image stretched from its own minimum and maximum, over all channels together."""
    low, high = (getattr(x.float(), f)(dim=(1, 2, 3), keepdim=True) for f in ("amin", "amax"))
    return ((x.float() - low) / (high - low).clamp(min=1e-12) * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def generate(predict, noises, config, batch_size, seed=0, device="cpu", shown=True):
    """noises: {name: [3, H, W]}. Yields (name, final x [3, H, W] on the CPU). A batch that memory cannot hold is halved."""
    def draw(batch):
        x = torch.stack([noises[name] for name in batch]).to(device)
        for state in ddim(predict, x, config, ImageNoise(seed, batch, x.shape[1:], device)):
            bar.update(len(batch))
            x = state.x
        return x.cpu()

    with progress(total=len(noises) * config.num_steps, unit="step", desc="drawing faces", disable=not shown) as bar:
        for batch, x in in_batches(list(noises), batch_size, draw, "face", "--dtype bf16 or --device cpu"):
            yield from zip(batch, x)


def add_arguments(parser):
    """The flags that inference and figures share."""
    defaults = DDIMConfig()
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="network calls")
    parser.add_argument("--spacing", choices=["leading", "trailing", "linspace"], default=defaults.spacing,
                        help="which steps; leading is the course's: 981, ..., 21, 1")
    parser.add_argument("--last-alpha-bar", choices=["first", "one"], default=defaults.last_alpha_bar,
                        help="alpha_bar after the last step: alpha_bar[0] or 1")
    parser.add_argument("--no-clip", action="store_true", help="do not clamp the predicted x0 to [-1, 1]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fresh noise, where eta is above 0")
    parser.add_argument("--batch-size", type=int, default=None, help="images at a time; the images do not depend on it (default: 2 on a CPU, 10 on a GPU)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the network; auto: bf16 where it is native")
    parser.add_argument("--tf32", action="store_true", help="let a GPU compute fp32 with ten bits of mantissa: faster, no longer exact")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: slow to start, faster afterwards")


def settings_of(args, eta=0.0):
    """(DDIMConfig, device, dtype, batch size) of parsed arguments, checked."""
    try:
        config = DDIMConfig(args.steps, args.spacing, args.last_alpha_bar, not args.no_clip, eta)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    use_tf32(args.tf32)
    device = pick_device(args.device)
    batch_size = args.batch_size if args.batch_size is not None else 2 if device.type == "cpu" else 10
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    return config, device, pick_dtype(args.dtype, device), batch_size


def main():
    parser = argparse.ArgumentParser(description="Draws one face per noise file with DDIM.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("noise", type=Path, metavar="NOISE_DIR", help="folder with *.pt noise tensors")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write {noise name}.png into")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the network's state dict, UNet.pt")
    parser.add_argument("--eta", type=float, default=DDIMConfig.eta, help="fresh noise at each step: 0 none (deterministic), 1 as much as DDPM")
    add_arguments(parser)
    args = parser.parse_args()
    config, device, dtype, batch_size = settings_of(args, args.eta)
    noises = read_noises(args.noise)
    writable_folder(args.output)
    started = time.perf_counter()
    model = load_unet(args.checkpoint, device)
    check_size(model.config, next(iter(noises.values())).shape)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"drawing {len(noises)} faces with {args.checkpoint}, {size:.2f} M parameters, on {describe(device, dtype)}", flush=True)
    first = torch.stack(list(noises.values())[:batch_size]).to(device)
    calls = config.num_steps * math.ceil(len(noises) / batch_size)
    announce([(calls, lambda: next(ddim(predictor(model, dtype), first, config, ImageNoise(args.seed, list(noises)[:batch_size], first.shape[1:], device))))],
             model, device, started)
    predict = predictor(torch.compile(model) if args.compile else model, dtype)
    for name, x in generate(predict, noises, config, batch_size, args.seed, device):
        if not np.isfinite(x.sum().item()):
            raise UserError(f"the image of {name}.pt is not finite; try --dtype fp32")
        save_image(Image.fromarray(to_pictures(x[None])[0]), args.output / f"{name}.png")
    print(f"wrote {len(noises)} images to {args.output} in {time.perf_counter() - started:.1f} s\nnext: bash scripts/p2_grade.sh {args.output} GT")


if __name__ == "__main__":
    run(main)
