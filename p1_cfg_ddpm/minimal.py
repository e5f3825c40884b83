"""P1 on one page, which imports nothing of ours: train a network on digits, and have it draw the digit it is asked for.

x0 is a picture, eps noise, x_t both mixed, from t = 0 (almost clean) to 999 (almost pure noise):

    (1)  x_t = a_t x0 + s_t eps                   noising (Ho et al. 2020, eq. 4); a_t^2 = alpha_bar_t, s_t^2 = 1 - a_t^2
    (2)  v = a_t eps - s_t x0                     what the network learns (Salimans and Ho 2022); x0 = a_t x_t - s_t v
    (3)  eps = (1 + w) eps_cond - w eps_uncond    guidance (Ho and Salimans 2022, eq. 6), as linear in eps also of v
    (4)  x_r = a_r x0 + s_r eps                   a step of drawing, from t to the next r < t (Song et al. 2021, eq. 12)
Left out, and in the package: averaged weights, Muon, half precision, resuming, faster samplers, checks of what is given.

    python -m p1_cfg_ddpm.minimal p1_cfg_ddpm/weights/small.safetensors p1_minimal.png
    python -m p1_cfg_ddpm.minimal p1_minimal.safetensors p1_minimal.png --train hw2_data/digits
"""

import argparse
import csv
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm, trange

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, NO_DIGIT, NO_DOMAIN = 1000, 10, 2  # "not told" is one more row of each embedding
# the cosine schedule (Nichol and Dhariwal 2021, eq. 17), with beta at most 0.999; at index -1 alpha_bar is 1: clean
f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
alpha_bar = torch.cat([(f[1:] / f[:-1]).clamp(min=0.001).cumprod(0), f.new_ones(1)])
A, S = alpha_bar.sqrt().float().to(DEVICE), (1 - alpha_bar).sqrt().float().to(DEVICE)


class Residual(nn.Module):
    def __init__(self, inputs, channels):
        super().__init__()  # GroupNorm, never BatchNorm: no picture may depend on the others of its batch
        self.norm1, self.conv1 = nn.GroupNorm(inputs // 16, inputs), nn.Conv2d(inputs, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(channels // 16, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(256, 2 * channels)
        self.skip = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x, condition):
        scale, shift = self.scale_shift(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(channels // 16, channels)
        self.qkv, self.projection = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, -1, 32)).flatten(4).mT.unbind(1)  # [B, head, H*W, 32] each
        return x + self.projection(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, inputs, channels, attention=False):
        super().__init__()
        self.residual, self.attention = Residual(inputs, channels), Attention(channels) if attention else nn.Identity()

    def forward(self, x, condition):
        return self.attention(self.residual(x, condition))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256))
        self.digit_embedding, self.domain_embedding = nn.Embedding(11, 256), nn.Embedding(3, 256)
        self.stem = nn.Conv2d(12, 64, 3, padding=1)
        self.down = nn.ModuleList([Block(64, 64), nn.Conv2d(64, 64, 3, stride=2, padding=1), Block(64, 192)])
        self.middle = nn.ModuleList([Block(192, 192, attention=True), Block(192, 192)])
        up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(192, 64, 3, padding=1))
        self.up = nn.ModuleList([Block(192 + 192, 192), Block(192 + 64, 192), up, Block(64 + 64, 64), Block(64 + 64, 64)])
        self.head = nn.Sequential(nn.GroupNorm(4, 64), nn.SiLU(), nn.Conv2d(64, 12, 3, padding=1))

    def forward(self, x, t, digit, domain):
        """v at x_t [B, 3, 28, 28]; t [B] in 0..999, digit [B] in 0..10, domain [B] in 0..2. It works on 2x2 patches."""
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(32, device=t.device) / 32)
        time = self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        condition = F.silu(time + self.digit_embedding(digit) + self.domain_embedding(domain))
        kept = [h := self.stem(F.pixel_unshuffle(x, 2))]
        for layer in self.down:
            kept.append(h := layer(h, condition) if isinstance(layer, Block) else layer(h))
        for layer in self.middle:
            h = layer(h, condition)
        for layer in self.up:
            h = layer(torch.cat([h, kept.pop()], dim=1), condition) if isinstance(layer, Block) else layer(h)
        return F.pixel_shuffle(self.head(h), 2)


def read_digits(folder):
    """(x0 [N, 3, 28, 28] in [-1, 1], digit [N], domain [N]) of folder/{mnistm,svhn}/{train.csv, data/*.png}."""
    paths, digit, domain = zip(*((Path(folder, name, "data", row["image_name"]), int(row["label"]), number)
                                 for number, name in enumerate(("mnistm", "svhn"))
                                 for row in csv.DictReader(Path(folder, name, "train.csv").read_text().splitlines())))
    pictures = [pil_to_tensor(Image.open(path).convert("RGB").resize((28, 28))) for path in paths]
    return torch.stack(pictures) / 127.5 - 1, torch.tensor(digit), torch.tensor(domain)


def loss(unet, x0, digit, domain, t, eps, drop):
    """The squared error of (2) at (1). drop bool [B]: who is not told, so that one network learns both terms of (3)."""
    digit, domain = torch.where(drop, NO_DIGIT, digit), torch.where(drop, NO_DOMAIN, domain)
    a, s = A[t][:, None, None, None], S[t][:, None, None, None]
    return F.mse_loss(unet(a * x0 + s * eps, t, digit, domain), a * eps - s * x0)


def train(unet, data, num_steps, batch_size=128):
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, num_steps)  # to zero, for want of averaged weights
    for _ in trange(num_steps):
        index = torch.randint(len(data[0]), (batch_size,))
        x0, digit, domain = (part[index].to(DEVICE) for part in data)
        t, drop = torch.randint_like(digit, T), torch.rand(batch_size, device=DEVICE) < 0.1
        loss(unet, x0, digit, domain, t, torch.randn_like(x0), drop).backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()


@torch.inference_mode()
def draw(unet, x, digit, domain, w=2.0, num_steps=20):
    """Pictures [B, 3, 28, 28] in [-1, 1] from noise x, by (3) and (4)."""
    untold = torch.full_like(digit, NO_DIGIT), torch.full_like(domain, NO_DOMAIN)
    ts = [round(T - i * T / num_steps) - 1 for i in range(num_steps)]  # 999, 949, ..., 49
    for t, r in zip(tqdm(ts), [*ts[1:], -1]):
        steps = torch.full_like(digit, t)
        v = (1 + w) * unet(x, steps, digit, domain) - w * unet(x, steps, *untold)
        x0 = (A[t] * x - S[t] * v).clamp(-1, 1)  # guidance leads out of where pictures are
        eps = (x - A[t] * x0) / S[t]
        x = A[r] * x0 + S[r] * eps
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="the network's; with --train, where to write them")
    parser.add_argument("picture", type=Path, help="where to draw two rows of each domain, a column for each digit")
    parser.add_argument("--train", metavar="DIGITS", help="train on this folder first")
    parser.add_argument("--steps", type=int, default=3800, help="of the training (default: 3800)")
    parser.add_argument("--w", type=float, default=2.0, help="guidance weight (default: 2)")
    args = parser.parse_args()
    unet = UNet().to(DEVICE, memory_format=torch.channels_last)  # on a CPU three times as fast
    if args.train:
        train(unet, read_digits(args.train), args.steps)
        save_file({name: tensor.contiguous() for name, tensor in unet.state_dict().items()}, args.weights)
    unet.load_state_dict(load_file(args.weights))
    digit, domain = torch.arange(10, device=DEVICE).repeat(4), torch.arange(2, device=DEVICE).repeat_interleave(20)
    noise = torch.randn(40, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    save_image(draw(unet, noise, digit, domain, args.w), args.picture, nrow=10, normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    main()
