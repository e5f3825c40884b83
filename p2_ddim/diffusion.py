"""The noise schedule of the face network, and the network as samplers ask it (Ho et al. 2020; Song et al. 2021).

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, for t = 0 (almost clean) .. 999 (almost pure noise).
"""

import math

import torch

from .device import autocast

NUM_TIMESTEPS = 1000


def make_alpha_bar():
    """alpha_bar_t = prod (1 - beta), beta linear from 1e-4 to 0.02, float64 [1000]."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64), dim=0)


def loss(unet, alpha_bar, x0, t, eps, max_weight):
    """Squared error of the predicted noise (Ho et al. 2020, algorithm 1), one value per picture [B], weighed by 1 / alpha_bar_t, at most `max_weight`.

    x0, eps: [B, 3, H, W]; t: int [B]; alpha_bar: float32 [1000] on their device. Velocity's loss has this weight without an upper bound (Salimans and Ho
    2022)."""
    ab = alpha_bar[t][:, None, None, None]
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    return (unet(xt, t).float() - eps).square().mean(dim=(1, 2, 3)) / alpha_bar[t].clamp(min=1 / max_weight)


class Denoiser:
    """A face network as the samplers ask it: denoiser(x, t) -> (x0, eps), for x [B, 3, H, W] at the integer t, both in x's dtype.

    clip: clamp x0 to [-1, 1]; eps is kept as it is. dtype: the number format that the network computes in."""

    def __init__(self, unet, clip=True, dtype=torch.float32):
        self.unet, self.clip, self.dtype = unet, clip, dtype
        self.alpha_bar = make_alpha_bar().tolist()
        parameter = next(unet.parameters())
        self.device, self.own = parameter.device, parameter.dtype

    def eps(self, x, t):
        """The network's answer, in x's dtype."""
        steps = torch.full((len(x),), t, dtype=torch.long, device=self.device)
        with autocast(self.device, self.dtype if self.own == torch.float32 else torch.float32):
            return self.unet(x.to(self.own).contiguous(memory_format=torch.channels_last), steps).to(x.dtype)

    def __call__(self, x, t):
        eps = self.eps(x, t)
        x0 = (x - math.sqrt(1 - self.alpha_bar[t]) * eps) / math.sqrt(self.alpha_bar[t])
        return (x0.clamp(-1, 1) if self.clip else x0), eps
