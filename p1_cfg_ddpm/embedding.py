"""A self-supervised embedding of the digits, in which sets of images are compared (quality.py).

    python -m p1_cfg_ddpm.embedding --data DIGITS        # writes runs/embedding.safetensors

A classifier's features record how sure it is, and little of what varies between two clear sevens. These are learned without labels
(SimCLR, Chen et al. 2020): two distorted views of an image shall be nearer to each other than to the views of all other images.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .classifier import augment
from .data import load_digits
from .device import DTYPES, describe, pick_device, pick_dtype, progress, use_tf32
from .files import UserError, check_flags, run, writable_file
from .model import BUNDLED
from .pictures import to_model
from .tensors import fill, load_weights, save_weights


def convolution(in_channels, out_channels, stride=1):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_channels))


class ResidualStage(nn.Module):
    """Two residual blocks (He et al. 2016); the first one halves the resolution."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.skip = nn.Conv2d(in_channels, channels, 1, 2, bias=False)
        self.first = nn.Sequential(convolution(in_channels, channels, 2), nn.ReLU(), convolution(channels, channels))
        self.second = nn.Sequential(nn.ReLU(), convolution(channels, channels), nn.ReLU(), convolution(channels, channels))

    def forward(self, x):
        x = self.skip(x) + self.first(x)
        return F.relu(x + self.second(x))


class Embedding(nn.Module):
    """forward: [B, 3, 28, 28] in [-1, 1] -> [B, 128]. In eval mode an image does not depend on the others of its batch."""

    num_features = 128

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(convolution(3, 48), nn.ReLU(), ResidualStage(48, 96), ResidualStage(96, 128))

    def forward(self, x):
        return self.stages(x).mean(dim=(2, 3))


def bundled_embedding(device="cpu"):
    path = BUNDLED / "embedding.safetensors"
    return load_embedding(path, device)


def load_embedding(path, device="cpu"):
    """An `Embedding` from a file that this module wrote, in eval mode."""
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_weights(path)[0].items()}
    return fill(Embedding(), tensors, path).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.inference_mode()
def embed(model, images, batch_size=500):
    """images: uint8 numpy [N, 28, 28, 3] -> float64 [N, 128] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(to_model(images[i:i + batch_size]).to(device)) for i in range(0, len(images), batch_size)]).double().cpu()


def view(x, generator):
    """A distorted view: moved, turned and resized, other colours (grey for one in five), noise; no flip, which would make another digit."""
    x = augment(x, generator, strength=1.6)
    grey = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) < 0.2
    x = torch.where(grey, x.mean(dim=1, keepdim=True), x)
    return x + 0.05 * torch.randn_like(x)


def contrastive_loss(a, b, temperature=0.2):
    """NT-Xent, Chen et al. 2020, eq. 1: a[i] and b[i], [N, F], are views of one image; all other 2N - 2 are not."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(a)))


def main():
    parser = argparse.ArgumentParser(description="Trains the embedding.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnistm/ and svhn/ in the course's layout, or a .npz of it")
    parser.add_argument("--output", type=Path, default=Path("runs/embedding.safetensors"), help="the file to write")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=1024, help="images; each gives two views, and the others of the batch are what it is told from")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW, one cycle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_flags(args, ("epochs", "batch_size"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("lr",), lambda value: 0 <= value < math.inf, "a number from 0")
    output = writable_file(args.output)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16:
        raise UserError("--dtype fp16 is not for training; use bf16 or fp32")
    data = load_digits(args.data, "train")
    images = torch.from_numpy(data.images).to(device)

    print(f"embedding, {len(data)} images from {args.data}, on {describe(device, dtype)}", flush=True)
    use_tf32(True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Embedding().to(device, memory_format=torch.channels_last)
    projector = nn.Sequential(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)).to(device)
    parameters = [*model.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3)
    batches = max(len(data) // args.batch_size, 1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * batches)
    bar = progress(total=args.epochs * batches, unit="step", desc="embedding")
    for _ in range(args.epochs):
        order = torch.randperm(len(data), generator=generator).to(device)
        for i in range(batches):
            x = to_model(images[order[i * args.batch_size:(i + 1) * args.batch_size]])
            views = torch.cat([view(x, generator), view(x, generator)]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                a, b = projector(model(views)).chunk(2)
            loss = contrastive_loss(a.float(), b.float())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            cycle.step()
            bar.update()
            if i % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
    bar.close()
    if not math.isfinite(loss.item()):
        raise UserError("the loss is not finite; try a smaller --lr, or --dtype fp32")
    facts = {"images": len(data), "epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed, "loss": loss.item()}
    save_weights(output, model.half().state_dict(), facts)
    print(f"wrote {output}: {json.dumps(facts)}")


if __name__ == "__main__":
    run(main)
