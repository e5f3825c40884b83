"""From a picture back to the noise that it comes from.

`invert` solves DDIM's own rule step by step, by fixed-point iteration: close. `belm` and `belm_invert` are a pair of rules that undo each other
algebraically, at one evaluation a step: exact but for rounding.

O-BELM (Wang et al. 2024, "BELM: Bidirectional Explicit Linear Multi-step Sampler", NeurIPS; eq. 18): in y = x / sqrt(alpha_bar) and
s = sqrt((1 - alpha_bar) / alpha_bar), DDIM is Euler's method for dy/ds = eps. A rule of two steps that asks the network in the middle only,

    y[i+1] = r^2 y[i-1] + (1 - r^2) y[i] - g[i] (g[i] + g[i-1]) / g[i-1] eps(y[i]),    g[i] = s[i] - s[i+1],  r = g[i] / g[i-1],

is of second order, and solved for y[i-1] it asks the very same: y[i] is at hand either way. What it needs is a pair of neighbouring states in place of
one. They are kept in float64: the way back magnifies their rounding by (g[0] / g[n-1])^2, 1.4e5 for 50 steps; the network computes in any format.
"""

from itertools import pairwise

import torch

from .samplers import State, signal_and_noise


def invert(model, x, ts, *, iterations=3):
    """DDIM inversion: from a picture x [B, 3, H, W], as `ddim` at eta 0 would leave it, back to the noise it comes from; yields a `State` per step.

    Each step solves the update rule for its starting point x_t, given where it ended:
    x_t = alpha_t / alpha_prev (x_prev - sigma_prev eps) + sigma_t eps, with eps = model(x_t, t), which is found by fixed-point iteration from x_t = x_prev.
    One iteration is the usual inversion, which takes eps at the wrong point. The clamp of x0 has no inverse: give a model without one."""
    alpha, sigma, _ = signal_and_noise(ts)
    for i in reversed(range(len(ts.t))):
        xt = x
        for _ in range(iterations):
            x0, eps = model(xt, ts.t[i])
            xt = alpha[i] / alpha[i + 1] * (x - sigma[i + 1] * eps) + sigma[i] * eps
        x = xt
        yield State(ts.t[i], x, x0)


def scales(ts):
    """(alpha, g) of the rule above, along `Steps`."""
    alpha, sigma, _ = signal_and_noise(ts)
    s = [noise / signal for noise, signal in zip(sigma, alpha)]
    return alpha, [now - after for now, after in pairwise(s)]


def belm(model, x, ts, *, noise=None, second=None):
    """Draws by O-BELM, by the signature of the other samplers. second: the state after the first step, as `belm_invert` found it; without it that step is
    DDIM's. The model should not clamp x0, if it is to be undone. States are float64."""
    alpha, g = scales(ts)
    before, y = None, x.double() / alpha[0]
    if second is not None:
        before, y = y, second.double() / alpha[1]
        yield State(ts.t[0], second.double(), second.double())
    for i in range(0 if second is None else 1, len(ts.t)):
        x0, eps = model(alpha[i] * y, ts.t[i])
        if before is None:
            before, y = y, y - g[0] * eps
        else:
            r = g[i] / g[i - 1]
            before, y = y, r**2 * before + (1 - r**2) * y - r * (g[i] + g[i - 1]) * eps
        yield State(ts.t[i], alpha[i + 1] * y, x0)


def belm_invert(model, x, ts, *, iterations=3):
    """From a picture x [B, 3, H, W], where `belm` ended, back to the pair that it starts from: the last two states' x are (second, first).

    A picture is one state of a pair; its neighbour is found by DDIM's rule, solved as in `invert`. Any would be undone exactly; this one leads to noise."""
    alpha, g = scales(ts)
    last = len(ts.t) - 1
    after = y = x.double() / alpha[-1]
    for _ in range(iterations):
        x0, eps = model(alpha[last] * y, ts.t[last])
        y = after + g[last] * eps
    yield State(ts.t[last], alpha[last] * y, x0)
    for i in range(last, 0, -1):
        x0, eps = model(alpha[i] * y, ts.t[i])
        r = g[i] / g[i - 1]
        after, y = y, (after - (1 - r**2) * y + r * (g[i] + g[i - 1]) * eps) / r**2
        yield State(ts.t[i - 1], alpha[i - 1] * y, x0)


def exact_batch(batch_size, dtype):
    """How many pictures at a time may go both ways: in half precision one. A step is undone by the same answer of the network, and in few bits the answer
    depends on how many are asked about together (an MSE of 7 to 23 squared grey levels for two and one); in float32 by too little to be seen."""
    return batch_size if torch.finfo(dtype).bits >= 32 else 1


@torch.inference_mode()
def to_pair(model, x, ts):
    """float64 [B, 2, 3, H, W]: the first and second state from which `belm` draws x [B, 3, H, W]."""
    before = state = None
    for now in belm_invert(model, x, ts):
        before, state = state, now
    return torch.stack([state.x, before.x], dim=1)
