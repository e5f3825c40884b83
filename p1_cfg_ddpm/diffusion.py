"""Diffusion: noise schedules, the training loss, classifier-free guidance, and the network as the samplers ask it.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, for t = 0 (almost clean) .. T-1 (almost pure noise).

**The guidance convention**, used everywhere in this project: `eps = (1 + w) eps_cond - w eps_uncond` (Ho and Salimans 2022,
eq. 6). w = 0 is the plain conditional model and -1 the unconditional one. Others write `eps_uncond + s (eps_cond - eps_uncond)`
with s = 1 + w (diffusers), or call s itself w.
"""

import math
from dataclasses import dataclass

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
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64).clamp(max=0.999)
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
    and take the eps that belongs to it: with strong guidance the network's own no longer fits, and DDIM, which uses both, goes astray. `parallel`: of
    the part of the guidance that is parallel to the predicted image, and only makes its contrast stronger, the share that is kept, by domain (projected
    guidance, Sadat et al. 2024, eta; here from the image's mean, so that brightness is guided as before); 1 is classifier-free guidance as it is."""

    def __init__(self, model, diffusion, digit, domain, w, interval=(0.0, 1.0), guide=None, clip=True, parallel=(1.0, 1.0)):
        self.model, self.diffusion, self.w, self.interval, self.guide, self.clip = model, diffusion, w, interval, guide, clip
        self.digit, self.domain = digit, domain
        self.dropped = None if all(share == 1 for share in parallel) else 1 - torch.tensor(parallel, device=domain.device)[domain][:, None, None, None]
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
        guided = (1 + w) * cond - w * uncond
        return guided if self.dropped is None else guided - w * self.dropped * self.along(cond - uncond, cond, x.float(), steps)

    def along(self, change, cond, x, steps):
        """The part of a change of the output that is parallel to the x0 of the output `cond`, its mean taken off. (x0 is linear in the output.)"""
        x0 = self.diffusion.x0_and_eps(cond, x, steps)[0]
        x0 = x0 - x0.mean(dim=(1, 2, 3), keepdim=True)
        return (change * x0).sum(dim=(1, 2, 3), keepdim=True) / x0.square().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12) * x0

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
