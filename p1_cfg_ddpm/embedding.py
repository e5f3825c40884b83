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

from .classifier import add_training_arguments, augment, check_training_arguments, is_there, train_in_one_cycle
from .data import load_digits
from .device import autocast, describe, name_of
from .files import run, writable_file
from .model import BUNDLED
from .pictures import to_model
from .provenance import HelpFormatter
from .state import data_fingerprint
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
    return fill(Embedding(), load_weights(path)[0], path).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.inference_mode()
def embed(model, images, batch_size=500):
    """images: uint8 numpy [N, 28, 28, 3] -> float64 [N, 128] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(to_model(images[i:i + batch_size], device)) for i in range(0, len(images), batch_size)]).cpu().double()


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
    parser = argparse.ArgumentParser(description="Trains the embedding.", formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnistm/ and svhn/ in the course's layout, or a .npz of it")
    parser.add_argument("--output", type=Path, default=Path("runs/embedding.safetensors"), help="the file to write")
    add_training_arguments(parser, epochs=25, batch_size=1024, lr=2e-3)  # each image gives two views, and the others of the batch are what it is told from
    args = parser.parse_args()
    device, dtype = check_training_arguments(args)
    output = writable_file(args.output)
    data = load_digits(args.data, "train")
    settings = {"images": len(data), "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed, "dtype": name_of(dtype),
                "pictures": data_fingerprint(data.images)}
    if is_there(output, settings):
        return
    images = torch.from_numpy(data.images).to(device)

    print(f"embedding, {len(data)} images from {args.data}, on {describe(device, dtype)}", flush=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Embedding().to(device, memory_format=torch.channels_last)
    projector = nn.Sequential(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)).to(device)

    def loss_of(index):
        x = to_model(images[index])
        views = torch.cat([view(x, generator), view(x, generator)]).contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            a, b = projector(model(views)).chunk(2)
        return contrastive_loss(a.float(), b.float())

    loss = train_in_one_cycle([*model.parameters(), *projector.parameters()], loss_of, len(data), args, 1e-3, generator, device, "embedding")
    facts = settings | {"loss": loss}
    save_weights(output, model.half().state_dict(), facts)
    print(f"wrote {output}: {json.dumps(facts)}")


if __name__ == "__main__":
    run(main)
