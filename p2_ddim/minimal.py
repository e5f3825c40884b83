"""P2 on one page, which imports nothing of ours: a trained network makes a face of each noise, and faces between two.

x_t = a_t x0 + s_t eps, of a picture x0 and noise eps, from t = 0 (almost clean) to 999 (almost pure noise), with
a_t = sqrt(alpha_bar_t), s_t = sqrt(1 - alpha_bar_t). The network tells eps from x_t and t; DDIM goes from t to r < t:

    (1)  x0 = (x_t - s_t eps) / a_t                                  clamped to [-1, 1]; eps is kept as it is
    (2)  sigma = eta s_r / s_t sqrt(1 - alpha_bar_t / alpha_bar_r)   how much is chance: none at eta 0, as in DDPM at 1
    (3)  x_r = a_r x0 + sqrt(s_r^2 - sigma^2) eps + sigma z          z ~ N(0, 1); Song et al. 2021, eq. 12
    (4)  slerp(u, v, c) = (sin((1 - c) h) u + sin(c h) v) / sin h    h: the angle between u and v; Shoemake 1985

The course's convention: t = 981, 961, ..., 21, 1, and at last to r = 0, not quite clean.
Left out, and in the package: training, inversion, other samplers and steps, opposite noises, checks of what is given.

    python -m p2_ddim.minimal hw2_data/mini/face/noise OUT hw2_data/mini/face/UNet.pt       # OUT/00.png, ..., slerp.png
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # what newer cards do for speed makes other pictures than the convention's
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0).tolist()
COURSE = (128, 128, 256, 256, 512, 512), 2, 4  # channels, and blocks, at each resolution; which of them has attention: 113.67 M parameters for 256x256
MINIATURE = (32, 64, 96, 128), 1, 3  # the bundled network: 3.68 M for 64x64


class Sinusoids(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2)))

    def forward(self, t):
        angles = t[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Residual(nn.Module):
    def __init__(self, inputs, channels, dim, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs), nn.Conv2d(inputs, channels, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(dim, channels))
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=2)  # [B, H*W, C] each: one head
        return x + self.out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, inputs, channels, dim, groups, attention):
        super().__init__()
        self.resblocks = Residual(inputs, channels, dim, groups)
        self.attention = Attention(channels, groups) if attention else nn.Identity()

    def forward(self, x, time):
        return self.attention(self.resblocks(x, time))


class UNet(nn.Module):
    def __init__(self, widths, num_blocks, attention):
        super().__init__()
        dim, groups = 4 * widths[0], min(32, widths[0] // 4)
        self.time = nn.Sequential(Sinusoids(widths[0]), nn.Linear(widths[0], dim), nn.SiLU(), nn.Linear(dim, dim))
        down, up, kept, channels = [nn.Conv2d(3, widths[0], 3, padding=1)], [], [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                down.append(Block(channels, width, dim, groups, attention=level == attention))
                kept.append(channels := width)
            if level + 1 < len(widths):
                down.append(nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                kept.append(channels)
        mid = [Block(channels, channels, dim, groups, attends) for attends in (True, False)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_blocks + 1):
                up.append(Block(channels + kept.pop(), width, dim, groups, attention=level == attention))
                channels = width
            if level > 0:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1)))
        for name, modules in (("down", down), ("mid", mid), ("up", up)):
            for number, module in enumerate(modules, start=1):
                self.add_module(f"{name}{number}", module)  # the names in the course's file: down1, ..., up1, ...
        self.down, self.mid, self.up = down, mid, up  # the same ones in order
        self.out = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x, t):
        """eps in x_t [B, 3, H, W]; t [B] in 0..999."""
        time, h, kept = self.time(t), x, []
        for module in self.down:
            kept.append(h := module(h, time) if isinstance(module, Block) else module(h))
        for module in self.mid:
            h = module(h, time)
        for module in self.up:
            h = module(torch.cat([h, kept.pop()], dim=1), time) if isinstance(module, Block) else module(h)
        return self.out(h)


def load_unet(path):
    weights = torch.load(path, map_location=DEVICE, weights_only=True)
    unet = UNet(*(COURSE if len(weights["down1.bias"]) == 128 else MINIATURE))
    unet.load_state_dict(weights)
    return unet.to(DEVICE, memory_format=torch.channels_last).eval()


@torch.inference_mode()
def ddim(unet, x, eta=0.0, num_steps=50, noise=torch.randn_like):
    """x at t = 0 from noise x [B, 3, H, W], by (1) to (3). noise(x): z, where eta is above 0."""
    stride = 1000 // num_steps
    for t in range((num_steps - 1) * stride + 1, 0, -stride):  # 981, 961, ..., 21, 1
        now, after = ALPHA_BAR[t], ALPHA_BAR[max(t - stride, 0)]
        eps = unet(x, torch.full((len(x),), t, device=x.device))
        x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        sigma = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        x = math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * eps + (sigma * noise(x) if eta > 0 else 0)
    return x


def slerp(u, v, c):
    """(4). It is as long as independent noises u and v are; (1 - c) u + c v is shorter, and makes flat faces."""
    h = torch.acos(F.cosine_similarity(u.double().flatten(), v.double().flatten(), dim=0)).item()
    return (math.sin((1 - c) * h) * u + math.sin(c * h) * v) / math.sin(h)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("noises", type=Path, help="folder of noises, *.pt, [1, 3, H, W] each")
    parser.add_argument("output", type=Path, help="folder for a PNG of each, and slerp.png, between the first two")
    parser.add_argument("unet", help="the network's state dict: the course's UNet.pt, or the bundled miniature")
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic; 1: as noisy as DDPM (default: 0)")
    args = parser.parse_args()
    unet, paths = load_unet(args.unet), sorted(args.noises.glob("*.pt"))
    noises = [torch.load(path, map_location=DEVICE, weights_only=True) for path in paths]
    args.output.mkdir(parents=True, exist_ok=True)
    stretch = {"normalize": True, "scale_each": True}  # from each picture's minimum, over all channels, to its maximum
    for path, noise in zip(tqdm(paths), noises):
        save_image(ddim(unet, noise, args.eta), args.output / f"{path.stem}.png", **stretch)
    save_image(ddim(unet, torch.cat([slerp(noises[0], noises[1], c / 10) for c in range(11)])), args.output / "slerp.png", nrow=11, **stretch)


if __name__ == "__main__":
    main()
