"""Diffusion: noise schedules, the training loss, classifier-free guidance, and three samplers as generators.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, for t = 0 (almost clean) .. T-1 (almost pure noise).

**The guidance convention**, used everywhere in this project: `eps = (1 + w) eps_cond - w eps_uncond` (Ho and Salimans 2022,
eq. 6). w = 0 is the plain conditional model and -1 the unconditional one. Others write `eps_uncond + s (eps_cond - eps_uncond)`
with s = 1 + w (diffusers), or call s itself w.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: str = "cosine"  # or "linear"
    prediction: str = "v"  # what the network puts out: "v" or "eps"
    num_timesteps: int = 1000


def make_alpha_bar(schedule, num_timesteps=1000):
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), float64 [T].

    "linear": beta from 1e-4 to 0.02 (Ho et al. 2020, section 4; scaled where T is not 1000).
    "cosine": alpha_bar = cos^2((t/T + 0.008) / 1.008 * pi/2), beta at most 0.999 (Nichol and Dhariwal 2021, eq. 17)."""
    if schedule == "linear":
        scale = 1000 / num_timesteps
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    elif schedule == "cosine":
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return torch.cumprod(1 - beta, dim=0)


class Diffusion:
    """A noise schedule together with what the network predicts."""

    def __init__(self, config=None):
        self.config = config or DiffusionConfig()
        if self.config.prediction not in ("eps", "v"):
            raise ValueError(f"unknown prediction {self.config.prediction!r}")
        if self.config.num_timesteps not in range(1, 100_001):
            raise ValueError(f"num_timesteps must be a whole number from 1 to 100,000, not {self.config.num_timesteps!r}")
        self.alpha_bar = make_alpha_bar(self.config.schedule, self.config.num_timesteps)  # float64, on the CPU
        self.signal, self.noise = self.alpha_bar.sqrt().float(), (1 - self.alpha_bar).sqrt().float()

    def coefficients(self, t):
        """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)) for t int [B], as float32 [B, 1, 1, 1] on t's device."""
        if self.signal.device != t.device:  # moved once: a copy in every step would make a GPU wait for it
            self.signal, self.noise = self.signal.to(t.device), self.noise.to(t.device)
        return tuple(table[t][:, None, None, None] for table in (self.signal, self.noise))

    def add_noise(self, x0, eps, t):
        """q(x_t | x0), Ho et al. 2020 eq. 4. x0, eps: [B, 3, H, W]; t: int [B]."""
        a, s = self.coefficients(t)
        return a * x0 + s * eps

    def target(self, x0, eps, t):
        """What the network learns to put out: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022).

        x0, eps: [B, 3, H, W]; t: int [B]."""
        if self.config.prediction == "eps":
            return eps
        a, s = self.coefficients(t)
        return a * eps - s * x0

    def x0_and_eps(self, output, xt, t):
        """Turns the network's output [B, 3, H, W] at (xt, t), alike and int [B], into the x0 and the eps it stands for."""
        a, s = self.coefficients(t)
        if self.config.prediction == "eps":
            return (xt - s * output) / a, output
        return a * xt - s * output, s * xt + a * output

    def loss(self, model, x0, digit, domain, t, eps, drop, min_snr_gamma=None):
        """Mean squared error of the network's output, one value per image, [B].

        `drop` bool [B]: images whose condition is replaced by the learned null (both digit and domain), so that the same
        network also learns the unconditional noise (Ho and Salimans 2022, algorithm 1).
        `min_snr_gamma`: weight by min(SNR, gamma), expressed in the network's output (Hang et al. 2023)."""
        digit = torch.where(drop, model_attribute(model, "null_digit"), digit)
        domain = torch.where(drop, model_attribute(model, "null_domain"), domain)
        output = model(self.add_noise(x0, eps, t), t, digit, domain)
        error = (output.float() - self.target(x0, eps, t)).square().mean(dim=(1, 2, 3))
        if min_snr_gamma is None:
            return error
        a, s = (c.flatten() for c in self.coefficients(t))
        snr = (a / s).square()
        return error * snr.clamp(max=min_snr_gamma) / (snr if self.config.prediction == "eps" else snr + 1)


def model_attribute(model, name):
    """An attribute of the network, also when accelerate has wrapped it for several GPUs."""
    return getattr(getattr(model, "module", model), name)


def moment_density(alpha_bar, mean, std):
    """How often training visits each t: ln(sigma / alpha) normal with this mean and deviation (Karras et al. 2022, table 1), float64 [T].

    Uniform t spends most of its steps where little can be learned: on almost pure noise, and on almost clean images."""
    log_sigma = 0.5 * ((1 - alpha_bar) / alpha_bar).log()
    density = (-0.5 * ((log_sigma - mean) / std).square()).exp() * torch.gradient(log_sigma)[0]
    return density / density.sum()


class Guided:
    """A network with its condition and its guidance: callable as `guided(x, t)` -> (x0, eps), for any sampler.

    digit, domain: int [B]. w: the guidance weight, a number or float [B]. `interval` (low, high): guide only where low <= t/T <= high
    (Kynkaanniemi et al. 2024); outside, the unconditional half is not computed. `guide`: a weaker network, told the same condition, in place of the
    unconditional half (autoguidance, Karras et al. 2024): away from its mistakes, not from what other digits look like. `clip`: clamp x0 to [-1, 1]
    and take the eps that belongs to it: with strong guidance the network's own no longer fits, and DDIM, which uses both, goes astray."""

    def __init__(self, model, diffusion, digit, domain, w, interval=(0.0, 1.0), guide=None, clip=True):
        self.model, self.diffusion, self.w, self.interval, self.guide, self.clip = model, diffusion, w, interval, guide, clip
        self.digit, self.domain = digit, domain
        if torch.is_tensor(w):
            self.w = w[:, None, None, None]

    def output(self, x, t):
        """The network's guided output, float32. v is linear in eps at a given x_t, so guiding either is the same."""
        low, high = self.interval
        x, steps = x.to(next(self.model.parameters()).dtype), torch.full_like(self.digit, t)
        if (not torch.is_tensor(self.w) and self.w == 0) or not low <= t / self.diffusion.config.num_timesteps <= high:
            return self.model(x, steps, self.digit, self.domain).float()
        return self.extrapolated(x, steps, self.w)

    def extrapolated(self, x, steps, w):
        """(1 + w) cond - w uncond for steps int [B], each image at its own; w a number or float [B, 1, 1, 1]."""
        model = self.model
        if self.guide is not None:
            cond, uncond = (net(x, steps, self.digit, self.domain).float() for net in (model, self.guide))
        else:
            digit = torch.cat([self.digit, torch.full_like(self.digit, model.null_digit)])
            domain = torch.cat([self.domain, torch.full_like(self.domain, model.null_domain)])
            cond, uncond = model(torch.cat([x, x]), torch.cat([steps, steps]), digit, domain).float().chunk(2)
        return (1 + w) * cond - w * uncond

    def __call__(self, x, t):
        steps = torch.full_like(self.digit, t)
        x0, eps = self.diffusion.x0_and_eps(self.output(x, t), x, steps)
        if self.clip:
            x0 = x0.clamp(-1, 1)
            signal, noise = self.diffusion.coefficients(steps)
            eps = (x - signal * x0) / noise
        return x0, eps


class Distilled:
    """A student (distill.py) with its condition, callable as `Guided` is. The guidance is inside the network: w, a number or float [B], is its input."""

    def __init__(self, model, diffusion, digit, domain, w):
        self.model, self.diffusion, self.digit, self.domain = model, diffusion, digit, domain
        self.w = w if torch.is_tensor(w) else torch.full_like(digit, w, dtype=torch.float32)

    def __call__(self, x, t):
        steps = torch.full_like(self.digit, t)
        output = self.model(x.to(next(self.model.parameters()).dtype), steps, self.digit, self.domain, self.w)
        return self.diffusion.x0_and_eps(output.float(), x, steps)


def spaced_timesteps(num_steps, num_timesteps=1000):
    """`num_steps` steps from T-1 downwards, evenly spaced, ending T/num_steps above clean ("trailing" spacing, Lin et al. 2024)."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"the number of steps must be between 1 and {num_timesteps}, not {num_steps}")
    return [round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps)]


def logsnr_timesteps(num_steps, alpha_bar, low=-2.0, high=1.7):
    """`num_steps` decreasing steps, evenly spaced in lambda = log(alpha / sigma) from `low` to `high`, the rest of the way to clean in the last.

    A few steps evenly spaced in t spend one of them on pure noise, where the network can only answer with the mean image, and
    leap from there to where much is decided: the images come out pale and alike. These begin where the first decisions are made. The ends
    were chosen by measuring: a lower `low` exaggerates the colours under guidance."""
    lambda_ = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
    timesteps = []
    for target in torch.linspace(low, high, num_steps, dtype=torch.float64):
        nearest = int((lambda_ - target).abs().argmin())
        timesteps.append(min(nearest, timesteps[-1] - 1) if timesteps else nearest)  # no step twice, where they are dense
    if timesteps[-1] < 0:
        raise ValueError(f"{num_steps} steps do not fit between the noise levels lambda {low} and {high}; use evenly spaced ones")
    return timesteps


class State(NamedTuple):
    t: int  # the step that was just taken started at x_t
    x: torch.Tensor  # where it ended, float32 [B, 3, H, W]; after the last step the finished image
    x0: torch.Tensor  # what the clean image was predicted to be


def ddpm(predict, diffusion, x, timesteps, noise):
    """Ancestral sampling, Ho et al. 2020 eq. 6 and 7 (variance: beta tilde), on any decreasing list of steps.

    `noise()` -> [B, 3, H, W]: fresh standard normal noise, asked for at every step but the last."""
    alpha_bar = alpha_bars_along(diffusion, timesteps)
    for i, t in enumerate(timesteps):
        x0, _ = predict(x, t)
        now, after = alpha_bar[i], alpha_bar[i + 1]
        alpha = now / after
        mean = (after.sqrt() * (1 - alpha) * x0.double() + alpha.sqrt() * (1 - after) * x.double()) / (1 - now)
        variance = (1 - alpha) * (1 - after) / (1 - now)
        x = (mean + variance.sqrt() * noise()).float() if i + 1 < len(timesteps) else mean.float()
        yield State(t, x, x0)


def ddim(predict, diffusion, x, timesteps, eta=0.0, noise=None):
    """Song et al. 2021 eq. 12. eta 0 is deterministic and draws no noise; eta 1 has the variance of DDPM."""
    alpha_bar = alpha_bars_along(diffusion, timesteps)
    for i, t in enumerate(timesteps):
        x0, eps = predict(x, t)
        now, after = alpha_bar[i], alpha_bar[i + 1]
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        x = after.sqrt() * x0.double() + (1 - after - sigma**2).clamp(min=0).sqrt() * eps.double()
        if sigma > 0:
            x = x + sigma * noise()
        x = x.float()
        yield State(t, x, x0)


def dpmpp_2m(predict, diffusion, x, timesteps):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: a multistep solver of second order in lambda = log(alpha / sigma).

    The first step is of first order for want of a predecessor, and the last for stability (lambda is infinite at its end)."""
    alpha_bar = alpha_bars_along(diffusion, timesteps)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    lambda_ = alpha.log() - sigma.log()  # infinite at the end, where sigma is 0
    previous = None
    for i, t in enumerate(timesteps):
        x0, _ = predict(x, t)
        h = lambda_[i + 1] - lambda_[i]
        d = x0.double()
        if previous is not None and i + 1 < len(timesteps):
            r = (lambda_[i] - lambda_[i - 1]) / h
            d = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * previous
        x = (sigma[i + 1] / sigma[i] * x.double() - alpha[i + 1] * torch.expm1(-h) * d).float()
        previous = x0.double()
        yield State(t, x, x0)


SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")


def sample(sampler, predict, diffusion, x, timesteps, eta=0.0, noise=None):
    """One of the three samplers by its name; yields a `State` after every step."""
    if sampler == "ddpm":
        return ddpm(predict, diffusion, x, timesteps, noise)
    if sampler == "ddim":
        return ddim(predict, diffusion, x, timesteps, eta, noise)
    return dpmpp_2m(predict, diffusion, x, timesteps)


def alpha_bars_along(diffusion, timesteps):
    """alpha_bar at each step and, after the last, 1 (a clean image): float64 [len + 1]."""
    return torch.cat([diffusion.alpha_bar[list(timesteps)], torch.ones(1, dtype=torch.float64)])


class ImageNoise:
    """Standard normal noise for a batch of images, one generator per image, seeded by (seed, the image's name).

    Drawn on the CPU, so that the noise of an image is the same on every device, in every batch and in every process."""

    def __init__(self, seed, names, shape, device="cpu"):
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(image_seed(seed, name)) for name in names]

    def __call__(self):
        """float32 [B, *shape]"""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def image_seed(seed, name):
    """A 63-bit seed from a run's seed and an image's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
