"""Latent diffusion as Stable Diffusion v1 does it: its noise schedule, the loss, and the network, guided, as the samplers ask it.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, where x0 is a scaled latent of the autoencoder, float32 [B, 4, h, w].

Guidance is `eps = (1 + w) eps_cond - w eps_uncond` (Ho and Salimans 2022, eq. 6). diffusers calls 1 + w the guidance scale: its usual 7.5 is w = 6.5.
"""

import math
from contextlib import nullcontext

import torch


def make_alpha_bar(beta_start=0.00085, beta_end=0.012, num_timesteps=1000):
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), float64 [T]. "scaled linear": sqrt(beta) is what rises linearly (Rombach et al. 2022)."""
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0)


def add_noise(alpha_bar, x0, eps, t):
    """q(x_t | x0), Ho et al. 2020 eq. 4. t: int [B]."""
    ab = alpha_bar.to(t.device)[t].float()[:, None, None, None]
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def loss(unet, alpha_bar, x0, t, eps, hidden, min_snr_gamma=None):
    """Squared error of the predicted noise, one value per latent [B] (Ho et al. 2020, algorithm 1).

    hidden: the text encoder's states [B, tokens, dim]. min_snr_gamma: weighed by min(SNR, gamma) / SNR (Hang et al. 2023), less where there
    is next to no noise."""
    noisy = add_noise(alpha_bar, x0, eps, t)
    error = (unet(noisy.to(hidden.dtype), t, hidden).sample.float() - eps).square().mean(dim=(1, 2, 3))
    if min_snr_gamma is None:
        return error
    ab = alpha_bar.to(t.device)[t].float()
    snr = ab / (1 - ab)
    return error * snr.clamp(max=min_snr_gamma) / snr


class Guided:
    """A UNet with its condition and guidance weight w, as the samplers ask it: guided(x, t) -> (x0, eps) float32, for x [B, 4, h, w] at the integer t.

    cond, uncond: hidden states [B, tokens, dim] of the prompts and of the negative prompt, by default the empty one. interval (low, high): guided only where
    low <= t/T <= high (Kynkaanniemi et al. 2024). Elsewhere, and at w = 0, the unconditional half is not computed."""

    def __init__(self, unet, alpha_bar, cond, uncond, w, dtype=torch.float32, interval=(0.0, 1.0)):
        self.unet, self.alpha_bar, self.cond, self.w, self.dtype, self.interval = unet, alpha_bar.tolist(), cond, w, dtype, interval
        self.both = torch.cat([cond, uncond])

    def eps(self, x, t):
        """The guided estimate of the noise."""
        low, high = self.interval
        plain = self.w == 0 or not low <= t / len(self.alpha_bar) <= high
        hidden = self.cond if plain else self.both
        x = (x if plain else torch.cat([x, x])).to(next(self.unet.parameters()).dtype)
        with torch.autocast(x.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
            eps = self.unet(x, torch.full((len(x),), t, device=x.device), hidden.to(x.dtype)).sample.float()
        if plain:
            return eps
        cond, uncond = eps.chunk(2)
        return (1 + self.w) * cond - self.w * uncond

    def __call__(self, x, t):
        eps = self.eps(x, t)
        return (x - math.sqrt(1 - self.alpha_bar[t]) * eps) / math.sqrt(self.alpha_bar[t]), eps
