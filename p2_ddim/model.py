"""The face UNet of DDPM (Ho et al. 2020): predicts the noise in an image, given the time step.

One class for every size: the widths and the depth are read from a checkpoint's tensors, so the course's 113.67 M parameter
network for 256x256 and the bundled miniature for 64x64 are the same code. The tensor names are those of the course's `UNet.pt`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .files import UserError
from .tensors import fill, find_state_dict, read_tensors

NAMES = ("time.1.weight", "down1.weight", "down2.resblocks.conv1.weight", "mid1.resblocks.conv1.weight", "out.0.weight")  # some that each such network has


@dataclass(frozen=True)
class UNetConfig:
    """widths: channels at each resolution, each half the one before. attention: the levels (0 is the finest) whose blocks have
    self-attention; the middle always has. num_blocks: residual blocks per level."""

    widths: tuple = (128, 128, 256, 256, 512, 512)
    attention: tuple = (4,)
    num_blocks: int = 2
    dropout: float = 0.0

    @property
    def groups(self):
        """Of every GroupNorm: 32, as the course's network has, but at least four channels each, and as many as all widths are multiples of. Alone in its
        group, a channel would lose its mean, and the network the image's overall colour."""
        return math.gcd(min(32, self.widths[0] // 4), *self.widths)


class TimeEmbedding(nn.Module):
    """t [B] -> [B, dim]: first all sines, then all cosines of t * inv_freq (a buffer, as in the course's file)."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2)))

    def forward(self, t):
        angles = t.float()[:, None] * self.inv_freq.float()
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(self.inv_freq.dtype)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, plus the time, then the same again with dropout; a 1x1 `skip` where the widths differ."""

    def __init__(self, in_channels, out_channels, time_channels, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class SelfAttention(nn.Module):
    """One head over all positions, scaled by 1/sqrt(channels), residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # [B, H*W, C] each
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(attended.transpose(1, 2).reshape(b, c, h, w))


class Block(nn.Module):
    """A residual block and, where the level has it, self-attention."""

    def __init__(self, in_channels, out_channels, time_channels, groups, dropout, attention):
        super().__init__()
        self.resblocks = ResidualBlock(in_channels, out_channels, time_channels, groups, dropout)
        self.attention = SelfAttention(out_channels, groups) if attention else nn.Identity()

    def forward(self, x, time):
        return self.attention(self.resblocks(x, time))


def downsample(channels):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1))


def upsample(channels):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


class UNet(nn.Module):
    """forward(x, t): x float [B, 3, H, W], H and W divisible by 2^(levels - 1); t int [B] in 0..999 -> eps, like x.

    Every output on the way down is kept, and concatenated after the features on the way up, in reverse order."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, time_channels = config.widths, 4 * config.widths[0]
        self.time = nn.Sequential(TimeEmbedding(widths[0]), nn.Linear(widths[0], time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels))

        def block(in_channels, out_channels, attention):
            return Block(in_channels, out_channels, time_channels, config.groups, config.dropout, attention)

        down, kept, channels = [nn.Conv2d(3, widths[0], 3, padding=1)], [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.num_blocks):
                down.append(block(channels, width, level in config.attention))
                channels = width
                kept.append(channels)
            if level + 1 < len(widths):
                down.append(downsample(channels))
                kept.append(channels)
        mid = [block(channels, channels, True), block(channels, channels, False)]
        up = []
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_blocks + 1):
                up.append(block(channels + kept.pop(), width, level in config.attention))
                channels = width
            if level > 0:
                up.append(upsample(channels))
        for name, modules in (("down", down), ("mid", mid), ("up", up)):
            for number, module in enumerate(modules, start=1):
                self.add_module(f"{name}{number}", module)  # the course's names: down1 .. down18, mid1, mid2, up1 .. up23
        self.out = nn.Sequential(nn.GroupNorm(config.groups, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def stage(self, name):
        """The modules down1, down2, ... (or mid, up) in order."""
        return [module for key, module in self.named_children() if key.rstrip("0123456789") == name]

    def forward(self, x, t):
        # The first and the last layer always in float32: the first steps magnify an error of eps 130 times in x0, and with it half precision's rounding of
        # the noise on the way in and of eps on the way out. What lies between may round.
        first, *down = self.stage("down")
        with torch.autocast(x.device.type, enabled=False):
            h = first(x.to(first.weight.dtype))
        if torch.is_autocast_enabled(x.device.type):
            h = h.to(torch.get_autocast_dtype(x.device.type))
        time, kept = self.time(t), [h]
        for module in down:
            h = module(h, time) if isinstance(module, Block) else module(h)
            kept.append(h)
        for module in self.stage("mid"):
            h = module(h, time)
        for module in self.stage("up"):
            h = module(torch.cat([h, kept.pop()], dim=1), time) if isinstance(module, Block) else module(h)
        with torch.autocast(x.device.type, enabled=False):
            return self.out(h.to(self.out[0].weight.dtype))


def config_of(state_dict, path="the state dict"):
    """Reads the widths and the depth from a checkpoint's tensors. `UserError` where they are not those of this family."""
    try:
        widths, attention, blocks, number = [], [], 0, 2
        while f"down{number}.resblocks.conv1.weight" in state_dict or f"down{number}.0.weight" in state_dict:
            if f"down{number}.0.weight" in state_dict:
                blocks = 0
            else:
                width = state_dict[f"down{number}.resblocks.conv1.weight"].shape[0]
                if blocks == 0:
                    widths.append(width)
                    if f"down{number}.attention.qkv.weight" in state_dict:
                        attention.append(len(widths) - 1)
                blocks += 1
            number += 1
        config = UNetConfig(tuple(widths), tuple(attention), blocks)
        if not widths or any(width % 32 for width in widths):
            raise ValueError("no residual blocks with a multiple of 32 channels under down2, down3, ...")
    except (KeyError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of the face UNet ({error}); expected the course's UNet.pt, "
                        "a state dict with time.1.weight, down1.weight, down2.resblocks.conv1.weight, ...") from None
    return config


def load_unet(path, device="cpu"):
    """Reads a state dict in the course's format strictly, also where it lies under `model` or `state_dict` or in a wrapper's names. Returns the UNet in eval
    mode, channels-last."""
    expected = "the course's UNet.pt, a state dict"
    state_dict, _ = find_state_dict(read_tensors(path, "UNet checkpoint", expected), path, NAMES, expected)
    config = config_of(state_dict, path)
    with torch.device("meta"):
        model = UNet(config)
    fill(model, state_dict, path)
    return model.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
