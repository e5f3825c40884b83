"""Samplers of one signature, each a generator that reads like its equation. The same file in the three folders.

    model(x, t) -> (x0, eps)       # what the network makes of x [B, C, H, W] at the integer t: the clean picture and the noise in it, each like x
    ts = trailing(alpha_bar, 20)   # where it is asked
    x = finish(SAMPLERS["unipc"](model, x, ts)).x

x_t = alpha x0 + sigma eps with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar). Condition, guidance, a clamp of x0 and the number format are the model's
affair. ddim and ddpm use x0 and eps as they are given; the others go by x0, and take the eps that belongs to it. Where a model is asked once a
step (all but heun: twice), the number of steps is the cost.
"""

import hashlib
import math
from functools import partial
from typing import NamedTuple

import torch


class State(NamedTuple):
    t: int  # the step just taken started at x_t
    x: torch.Tensor  # where it ended, [B, C, H, W], of the dtype that came in
    x0: torch.Tensor  # the clean picture (or latent) predicted on the way


class Steps(NamedTuple):
    """Plain numbers, of no device and dtype."""

    t: tuple  # decreasing: what the network is told
    alpha_bar: tuple  # [len(t) + 1]: at each t, and after the last (1.0 is clean)


def finish(states):
    """The last of a sampler's states; those before are not kept."""
    last = None
    for state in states:
        last = state
    return last


# --- where to ask ---

def steps_at(alpha_bar, t, end=1.0):
    """`Steps` at a decreasing list of t. alpha_bar: float64 [T], of the training's schedule; end: the alpha_bar to end at."""
    t = tuple(t)
    return Steps(t, (*(float(alpha_bar[i]) for i in t), float(end)))


def checked(num_steps, num_timesteps):
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"the number of steps must be between 1 and {num_timesteps}, not {num_steps}")


def leading(alpha_bar, num_steps, end=None):
    """Multiples of floor(T / n), plus one, ending at alpha_bar[0]: 981, ..., 21, 1 for 50. For n = T, where one more leads out of range, 999, ..., 0."""
    total = len(alpha_bar)
    checked(num_steps, total)
    t = [total // num_steps * i + (num_steps < total) for i in reversed(range(num_steps))]
    return steps_at(alpha_bar, t, alpha_bar[0] if end is None else end)


def trailing(alpha_bar, num_steps, end=1.0):
    """From T - 1 down, T / n above clean at the last (Lin et al. 2024): 999, 979, ..., 19 for 50."""
    total = len(alpha_bar)
    checked(num_steps, total)
    return steps_at(alpha_bar, [round(total - i * total / num_steps) - 1 for i in range(num_steps)], end)


def even(alpha_bar, num_steps, end=1.0):
    """Evenly from T - 1 down to what would be 0 one step later: 999, 979, ..., 20 for 50. For T steps 999, ..., 0."""
    total = len(alpha_bar)
    checked(num_steps, total)
    if num_steps == total:  # rounding would have two of them equal
        return steps_at(alpha_bar, reversed(range(total)), end)
    return steps_at(alpha_bar, [round((total - 1) * i / num_steps) for i in range(num_steps, 0, -1)], end)


def linspace(alpha_bar, num_steps, end=1.0):
    """Evenly from T - 1 to 0, both included: 999, 979, ..., 20, 0 for 50."""
    total = len(alpha_bar)
    checked(num_steps, total)
    return steps_at(alpha_bar, [round((total - 1) * (1 - i / max(num_steps - 1, 1))) for i in range(num_steps)], end)


def logsnr(alpha_bar, num_steps, end=1.0, low=-2.0, high=1.7):
    """Evenly in lambda = log(alpha / sigma) from `low` to `high`, the rest of the way to clean in the last step.

    A few steps evenly spaced in t spend one of them on pure noise, where the network can only answer with the mean picture, and leap from there to
    where much is decided. These begin where the first decisions are made. The ends were chosen by measuring, on P1's digits."""
    checked(num_steps, len(alpha_bar))
    lambda_, t = 0.5 * (alpha_bar / (1 - alpha_bar)).log(), []
    for target in torch.linspace(low, high, num_steps, dtype=torch.float64):
        nearest = int((lambda_ - target).abs().argmin())
        t.append(min(nearest, t[-1] - 1) if t else nearest)  # no step twice, where they are dense
    if t[-1] < 0:
        raise ValueError(f"steps {num_steps} do not fit between the noise levels lambda {low} and {high}; use evenly spaced ones")
    return steps_at(alpha_bar, t, end)


SPACINGS = {"leading": leading, "trailing": trailing, "even": even, "linspace": linspace, "logsnr": logsnr}


# --- samplers ---

def ddim(model, x, ts, *, eta=0.0, noise=None):
    """Song et al. 2021, eq. 12. model(x, t) -> (x0, eps), [B, C, H, W] each, t an int; x: noise; ts: `Steps`; noise() -> standard normal, like x,
    asked for only where eta is above 0, and not at a clean end."""
    for t, now, after in zip(ts.t, ts.alpha_bar, ts.alpha_bar[1:]):
        x0, eps = model(x, t)
        sigma = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        x = math.sqrt(after) * x0 + math.sqrt(max(1 - after - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * noise()
        yield State(t, x, x0)


def ddpm(model, x, ts, *, noise=None):
    """Ho et al. 2020, eq. 6 and 7, with the variance beta tilde, on any decreasing list of steps; the end is not noised."""
    for i, (t, now, after) in enumerate(zip(ts.t, ts.alpha_bar, ts.alpha_bar[1:])):
        x0, _ = model(x, t)
        alpha = now / after
        x = (math.sqrt(after) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - after) * x) / (1 - now)
        if i + 1 < len(ts.t):
            x = x + math.sqrt((1 - alpha) * (1 - after) / (1 - now)) * noise()
        yield State(t, x, x0)


def signal_and_noise(ts):
    """(alpha, sigma, lambda = log(alpha / sigma)) along `Steps`, len + 1 each; lambda is infinite at a clean end."""
    alpha, sigma = [math.sqrt(a) for a in ts.alpha_bar], [math.sqrt(1 - a) for a in ts.alpha_bar]
    return alpha, sigma, [math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma)]


def dpmpp_2m(model, x, ts, *, noise=None):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: a multistep solver of second order in lambda.

    The first step is of first order for want of a predecessor, and the last for stability (lambda may be infinite at its end)."""
    alpha, sigma, lambda_ = signal_and_noise(ts)
    before = None
    for i, t in enumerate(ts.t):
        x0, _ = model(x, t)
        h, d = lambda_[i + 1] - lambda_[i], x0
        if 0 < i < len(ts.t) - 1:
            r = (lambda_[i] - lambda_[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d
        before = x0
        yield State(t, x, x0)


def heun(model, x, ts, *, noise=None):
    """Karras et al. 2022, algorithm 1 without churn, in y = x / alpha and s = sigma / alpha: dy/ds = (y - x0) / s. Asks twice a step, and once in the last."""
    alpha, sigma, _ = signal_and_noise(ts)
    for i, t in enumerate(ts.t):
        s, after = sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
        x0, _ = model(x, t)
        y = x / alpha[i]
        slope = (y - x0) / s
        end = y + (after - s) * slope
        if i + 1 < len(ts.t):
            slope = (slope + (end - model(alpha[i + 1] * end, ts.t[i + 1])[0]) / after) / 2
            end = y + (after - s) * slope
        x = alpha[i + 1] * end
        yield State(t, x, x0)


def unipc(model, x, ts, *, noise=None):
    """UniPC of second order, with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 and 6 for a model that predicts x0).

    Each evaluation first corrects the step that led to it (UniC), then serves the next (UniP); the first and the last step are of first order."""
    alpha, sigma, lambda_ = signal_and_noise(ts)
    start, last = None, []  # where the step began, after its own correction; the x0 of the last two evaluations, the newest first
    for i, t in enumerate(ts.t):
        x0, _ = model(x, t)
        if last:  # UniC
            h = lambda_[i] - lambda_[i - 1]
            phi = math.expm1(-h)
            change = 0.5 * (x0 - last[0])
            if len(last) > 1:  # weights that make the rule exact for an x0 of second degree in lambda
                r = (lambda_[i - 2] - lambda_[i - 1]) / h
                first, second = -(phi / h + 1) / phi, 2 * ((phi / h + 1) / h - 0.5) / phi
                older = (second - first) / (r - 1)
                change = older * (last[1] - last[0]) / r + (first - older) * (x0 - last[0])
            x = sigma[i] / sigma[i - 1] * start - alpha[i] * phi * (last[0] + change)
        h, d = lambda_[i + 1] - lambda_[i], x0
        if 0 < i < len(ts.t) - 1:  # UniP
            d = x0 + 0.5 * (last[0] - x0) * h / (lambda_[i - 1] - lambda_[i])
        start, last = x, [x0, *last[:1]]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d
        yield State(t, x, x0)


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(model, x, ts, *, noise=None):
    """DDIM's step with eps extrapolated from the last four by Adams and Bashforth's weights (Liu et al. 2022, eq. 12; warm start: Zhang and Chen 2023)."""
    alpha, sigma, _ = signal_and_noise(ts)
    last = []
    for i, t in enumerate(ts.t):
        x0, _ = model(x, t)
        last = [(x - alpha[i] * x0) / sigma[i], *last[:3]]
        eps = sum(weight * e for weight, e in zip(ADAMS_BASHFORTH[len(last) - 1], last))
        x = alpha[i + 1] / alpha[i] * x + (sigma[i + 1] - alpha[i + 1] / alpha[i] * sigma[i]) * eps
        yield State(t, x, x0)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m, "heun": heun, "unipc": unipc, "ipndm": ipndm}


def by_name(name, eta=0.0):
    """A sampler by its name; eta is ddim's alone, elsewhere it is refused (`ValueError`)."""
    if name == "ddim":
        return partial(ddim, eta=eta)
    if eta:
        raise ValueError(f"eta is for ddim; {name} does without it")
    return SAMPLERS[name]


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
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()[:8], "little") >> 1
