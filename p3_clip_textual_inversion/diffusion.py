"""Latent diffusion as Stable Diffusion v1 does it: its noise schedule, the loss, classifier-free guidance, and two samplers as generators.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, where x0 is a scaled latent of the autoencoder, float32 [B, 4, h, w].

Guidance is `eps = (1 + w) eps_cond - w eps_uncond` (Ho and Salimans 2022, eq. 6). diffusers calls 1 + w the guidance scale: its usual 7.5 is w = 6.5.
"""

import hashlib
from contextlib import nullcontext
from typing import NamedTuple

import torch


def make_alpha_bar(beta_start=0.00085, beta_end=0.012, num_timesteps=1000):
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), float64 [T]. "scaled linear": sqrt(beta) is what rises linearly (Rombach et al. 2022)."""
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0)


def add_noise(alpha_bar, x0, eps, t):
    """q(x_t | x0), Ho et al. 2020 eq. 4. t: int [B]."""
    ab = alpha_bar.to(t.device)[t].float()[:, None, None, None]
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def loss(unet, alpha_bar, x0, eps, t, hidden, min_snr_gamma=None):
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
    """A UNet with its condition and guidance weight w: callable as `guided(x, t)` -> eps float32, for any sampler.

    cond, uncond: hidden states [B, tokens, dim] of the prompts and of the empty prompt. At w = 0 the unconditional half is not computed."""

    def __init__(self, unet, cond, uncond, w, dtype=torch.float32):
        self.unet, self.cond, self.w, self.dtype = unet, cond, w, dtype
        self.both = torch.cat([cond, uncond])

    def __call__(self, x, t):
        hidden = self.cond if self.w == 0 else self.both
        x = (x if self.w == 0 else torch.cat([x, x])).to(next(self.unet.parameters()).dtype)
        with torch.autocast(x.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
            eps = self.unet(x, torch.full((len(x),), t, device=x.device), hidden.to(x.dtype)).sample.float()
        if self.w == 0:
            return eps
        cond, uncond = eps.chunk(2)
        return (1 + self.w) * cond - self.w * uncond


def leading_timesteps(num_steps, num_timesteps=1000):
    """Stable Diffusion's own: t = 1 + multiples of T / num_steps, from the top: 981, ..., 21, 1 for 50; for T steps, where 1 + T - 1 is none, 999, ..., 0."""
    stride = num_timesteps // num_steps
    return [stride * i + (num_steps < num_timesteps) for i in reversed(range(num_steps))]


def even_timesteps(num_steps, num_timesteps=1000):
    """Evenly from T-1 down, T / num_steps above clean at the last: 999, 949, ..., 50 for 20 (diffusers' "linspace"); for T steps, 999, ..., 0."""
    if num_steps == num_timesteps:  # rounding would have two of them equal
        return list(reversed(range(num_timesteps)))
    return [round((num_timesteps - 1) * i / num_steps) for i in range(num_steps, 0, -1)]


class State(NamedTuple):
    t: int  # the step that was just taken started at x_t
    x: torch.Tensor  # where it ended, float32 [B, 4, h, w]
    x0: torch.Tensor  # what the clean latent was predicted to be


def ddim(predict, alpha_bar, x, num_steps):
    """Song et al. 2021 eq. 12 with eta 0, ending at alpha_bar[0], as Stable Diffusion's scheduler is set (set_alpha_to_one false)."""
    timesteps = leading_timesteps(num_steps, len(alpha_bar))
    for t in timesteps:
        previous = t - len(alpha_bar) // num_steps
        now, after = alpha_bar[t].item(), alpha_bar[max(previous, 0)].item()
        eps = predict(x, t)
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
        yield State(t, x, x0)


def dpmpp_2m(predict, alpha_bar, x, num_steps):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: a multistep solver of second order in lambda = log(alpha / sigma), ending clean.

    The first step is of first order for want of a predecessor, and the last because lambda is infinite at its end."""
    timesteps = even_timesteps(num_steps, len(alpha_bar))
    along = torch.cat([alpha_bar[timesteps], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = along.sqrt(), (1 - along).sqrt()
    lambda_ = alpha.log() - sigma.log()
    before = None
    for i, t in enumerate(timesteps):
        x0 = (x - sigma[i].item() * predict(x, t)) / alpha[i].item()
        h = lambda_[i + 1] - lambda_[i]
        d = x0
        if before is not None and i + 1 < len(timesteps):
            r = ((lambda_[i] - lambda_[i - 1]) / h).item()
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = (sigma[i + 1] / sigma[i]).item() * x - (alpha[i + 1] * torch.expm1(-h)).item() * d
        before = x0
        yield State(t, x, x0)


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def image_noise(seed, names, shape, device="cpu"):
    """Standard normal noise float32 [B, *shape], each image's from its own generator, seeded by (seed, the image's name), drawn on the CPU."""
    generators = [torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1) for name in names]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
