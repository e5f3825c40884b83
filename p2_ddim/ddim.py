"""DDIM (Song et al. 2021): the noise schedule, the update rule as a generator, and its inversion.

**The convention**, by which the course's references were made and which is the default: 50 steps at t = 981, 961, ..., 21, 1, the network and
alpha_bar both at that same t; the step before t = 1 goes to index 0, so that the last alpha_bar_prev is alpha_bar[0] = 0.9999 and not 1;
the predicted x0 is clamped to [-1, 1], eps is not recomputed afterwards; eta 0.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

NUM_TIMESTEPS = 1000


def make_alpha_bar():
    """alpha_bar_t = prod (1 - beta), beta linear from 1e-4 to 0.02, float64 [1000]."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64), dim=0)


@dataclass(frozen=True)
class DDIMConfig:
    """num_steps: network calls. spacing: "leading" (the convention: t = 1 + k * 1000/num_steps), "trailing" (from 999 down) or "linspace" (999 to 0).
    last_alpha_bar: the alpha_bar after the last step: "first" (alpha_bar[0], the convention) or "one". clip: clamp x0 to [-1, 1]. eta: 0 is
    deterministic, 1 has the variance of DDPM."""

    num_steps: int = 50
    spacing: str = "leading"
    last_alpha_bar: str = "first"
    clip: bool = True
    eta: float = 0.0

    def __post_init__(self):
        if not 1 <= self.num_steps <= NUM_TIMESTEPS:
            raise ValueError(f"steps must be between 1 and {NUM_TIMESTEPS}, not {self.num_steps}")
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"unknown spacing {self.spacing!r}")
        if self.last_alpha_bar not in ("first", "one"):
            raise ValueError(f"unknown last alpha_bar {self.last_alpha_bar!r}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")

    def timesteps(self):
        """The decreasing list of t at which the network is called."""
        n, total = self.num_steps, NUM_TIMESTEPS
        if self.spacing == "leading":
            stride = total // n
            # offset 1, but never past the last index: at 1000 steps it is 0..999
            return [min(i * stride + 1, total - 1) if stride > 1 else i for i in reversed(range(n))]
        if self.spacing == "trailing":
            return [round(total - i * total / n) - 1 for i in range(n)]
        return [round((total - 1) * (1 - i / max(n - 1, 1))) for i in range(n)]


class State(NamedTuple):
    t: int  # the step just taken started at x_t
    x: torch.Tensor  # where it ended, float32 [B, 3, H, W]
    x0: torch.Tensor  # the clean image predicted on the way, float32 [B, 3, H, W]


def alpha_bars(config):
    """(alpha_bar at every step, alpha_bar after it), float64 [num_steps] each. Gathered from the list of steps, never from a stride."""
    alpha_bar = make_alpha_bar()
    now = alpha_bar[config.timesteps()]
    last = alpha_bar[:1] if config.last_alpha_bar == "first" else torch.ones(1, dtype=torch.float64)
    return now, torch.cat([now[1:], last])


def ddim(predict, x, config=None, noise=None):
    """Song et al. 2021 eq. 12 from pure noise x [B, 3, H, W]; yields a `State` after every step.

    predict(x, t): eps for x float32 [B, 3, H, W] at the integer t. `noise()`: standard normal noise like x, asked for only where sigma > 0."""
    config = config or DDIMConfig()
    for t, ab, ab_prev in zip(config.timesteps(), *(part.float() for part in alpha_bars(config))):
        eps = predict(x, t)
        x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        if config.clip:
            x0 = x0.clamp(-1, 1)
        sigma = config.eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)).sqrt()
        x = ab_prev.sqrt() * x0 + (1 - ab_prev - sigma**2).clamp(min=0).sqrt() * eps
        if sigma > 0:
            x = x + sigma * noise()
        yield State(t, x, x0)


class ImageNoise:
    """Standard normal noise for a batch, one generator per image, seeded by (seed, the image's name); drawn on the CPU."""

    def __init__(self, seed, names, shape, device="cpu"):
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1)
                           for name in names]

    def __call__(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def invert(predict, x, config=None, iterations=3):
    """DDIM inversion: from an image x [B, 3, H, W], as `ddim` at eta 0 would leave it, back to the noise it comes from; yields a `State` per step.

    Each step solves the update rule for its starting point x_t, given where it ended:
    x_t = sqrt(ab_t / ab_prev) (x_prev - sqrt(1 - ab_prev) eps) + sqrt(1 - ab_t) eps, with eps = predict(x_t, t), which is found by fixed-point
    iteration from x_t = x_prev. One iteration is the usual inversion, which takes eps at the wrong point. The clamp of x0 has no
    inverse and is left out: inside [-1, 1] it does nothing."""
    config = config or DDIMConfig()
    now, before = (part.float() for part in alpha_bars(config))
    for t, ab, ab_prev in reversed(list(zip(config.timesteps(), now, before))):
        xt = x
        for _ in range(iterations):
            eps = predict(xt, t)
            xt = (ab / ab_prev).sqrt() * (x - (1 - ab_prev).sqrt() * eps) + (1 - ab).sqrt() * eps
        x = xt
        yield State(t, x, (x - (1 - ab).sqrt() * eps) / ab.sqrt())
