"""The conditional UNet: predicts the noise (or v) in a digit image, given the time step, the digit and the domain.

Architecture after Ho et al. 2020 (DDPM) with the scale-shift conditioning of Dhariwal and Nichol 2021. Every layer treats
each image of a batch by itself (GroupNorm, never BatchNorm), so an image does not depend on what else is in the batch.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .files import UserError
from .tensors import fill, load_weights, save_weights

BUNDLED = Path(__file__).resolve().parent / "weights"
DOMAINS = ("mnistm", "svhn")
NUM_DIGITS = 10
IMAGE_SIZE = 28


@dataclass(frozen=True)
class UNetConfig:
    patch_size: int = 1  # 2: the network works on 2x2 patches, at 14x14, which costs a quarter
    widths: tuple = (128, 256, 256)  # channels per resolution; each level halves it
    num_blocks: int = 2  # residual blocks per level on the way down, and as many on the way up
    attention_levels: tuple = (1, 2)  # levels whose blocks are followed by self-attention (the middle always has one)
    dropout: float = 0.1
    times: tuple = ()  # of a distilled student: the t at which it is called, one after the other. Its guidance weight is an input


SIZES = {
    "base": UNetConfig(),
    "medium": UNetConfig(patch_size=2, widths=(96, 160), num_blocks=2, attention_levels=(0, 1), dropout=0.05),
    "small": UNetConfig(patch_size=2, widths=(64, 192), num_blocks=1, attention_levels=(), dropout=0.0),
    "guide": UNetConfig(patch_size=2, widths=(48, 96), num_blocks=1, attention_levels=(), dropout=0.0),  # a weaker one, for autoguidance
    "tiny": UNetConfig(patch_size=2, widths=(16, 32), num_blocks=1, attention_levels=(), dropout=0.0),  # for tests
}


def group_norm(channels):
    return nn.GroupNorm(max(channels // 16, 1), channels)


def timestep_embedding(t, dim):
    """Sinusoids of the time step (Vaswani et al. 2017): t int [B] -> float32 [B, dim]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice; the condition scales and shifts between the two. The second conv starts at zero."""

    def __init__(self, in_channels, out_channels, condition_dim, dropout):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(condition_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, condition):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Every position looks at every other: GroupNorm, heads of 32 channels, residual. The projection starts at zero."""

    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 32
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, heads, H*W, C/heads]
        return x + self.projection(attended.transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """A residual block and, where the level has it, self-attention."""

    def __init__(self, in_channels, out_channels, condition_dim, dropout, attention):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, condition_dim, dropout)
        self.attention = SelfAttention(out_channels) if attention else nn.Identity()

    def forward(self, x, condition):
        return self.attention(self.residual(x, condition))


class UNet(nn.Module):
    """forward(x, t, digit, domain): x float [B, 3, 28, 28] in [-1, 1] plus noise, t int [B] in 0..999, digit int [B] in
    0..10, domain int [B] in 0..2, where digit 10 (`null_digit`) and domain 2 (`null_domain`) mean "not told"; w float [B], of a student only.
    Returns float [B, 3, 28, 28]: what the network was trained to predict (eps or v)."""

    null_digit = NUM_DIGITS
    null_domain = len(DOMAINS)

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, p = config.widths, config.patch_size
        dim = 4 * widths[0]
        self.time_mlp = nn.Sequential(nn.Linear(widths[0], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.digit_embedding = nn.Embedding(NUM_DIGITS + 1, dim)  # the last row is the learned null
        self.domain_embedding = nn.Embedding(len(DOMAINS) + 1, dim)
        self.weight_mlp = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim)) if config.times else None

        def block(in_channels, out_channels, level):
            return Block(in_channels, out_channels, dim, config.dropout, level in config.attention_levels)

        self.stem = nn.Conv2d(3 * p * p, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, kept = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(config.num_blocks):
                self.down.append(block(channels, width, level))
                channels = width
                kept.append(channels)
            if level + 1 < len(widths):
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                kept.append(channels)
        self.middle = nn.ModuleList([Block(channels, channels, dim, config.dropout, True),
                                     Block(channels, channels, dim, config.dropout, False)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_blocks + 1):
                self.up.append(block(channels + kept.pop(), width, level))
                channels = width
            if level > 0:
                channels = widths[level - 1]  # narrowed here, where it is cheap, and not in the wider blocks that follow
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, channels, 3, padding=1)))
        self.head = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3 * p * p, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, x, t, digit, domain, w=None):
        time = timestep_embedding(t, self.config.widths[0]).to(self.digit_embedding.weight.dtype)
        condition = self.time_mlp(time) + self.digit_embedding(digit) + self.domain_embedding(domain)
        if self.weight_mlp is not None:
            condition = condition + self.weight_mlp(w[:, None].to(condition.dtype))
        condition = F.silu(condition)
        h = self.stem(F.pixel_unshuffle(x, self.config.patch_size).contiguous(memory_format=torch.channels_last))
        kept = [h]
        for layer in self.down:
            h = layer(h, condition) if isinstance(layer, Block) else layer(h)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, condition)
        for layer in self.up:
            h = layer(torch.cat([h, kept.pop()], dim=1), condition) if isinstance(layer, Block) else layer(h)
        return F.pixel_shuffle(self.head(h), self.config.patch_size)


def save_model(path, model, diffusion, training=None):
    """Writes weights (as they are), the network's and the diffusion's settings, and facts about the training."""
    save_weights(path, model.state_dict(), {"unet": asdict(model.config), "diffusion": asdict(diffusion.config), "training": training or {}})


def load_model(path, device="cpu", dtype=torch.float32):
    """Reads a checkpoint written by `save_model`. Returns (UNet in eval mode and channels-last, metadata)."""
    state_dict, metadata = load_weights(path)
    try:
        settings = {"times": ()} | metadata["unet"]  # files from before there were students have none
        values = {field.name: settings[field.name] for field in fields(UNetConfig)}
        if values["num_blocks"] > len(state_dict):  # it would build for ever
            raise ValueError(f"num_blocks {values['num_blocks']}")
        with torch.device("meta"):  # nor take memory for what the file has not
            model = UNet(UNetConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} is not a checkpoint of this UNet (its configuration lacks or garbles {error})") from None
    fill(model, state_dict, path)
    return model.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False), metadata
