"""Which digit the network itself sees in an image, so that what it doubts can be drawn again. No classifier takes part.

A conditional diffusion model is a classifier (Li et al. 2023; Clark and Jaini 2023): its loss bounds -log p(image | digit), so it reads the digit under whose
condition it denoises the image best:

    e(y) = || target(x0, eps, t) - net(x_t, t, y) ||^2,    x_t = alpha_t x0 + sigma_t eps,    read is the y of the least e

Each digit is tried on the same noise, which takes most of the noise's share out of their differences. One noise is ten evaluations of the network, no guidance.
"""

import torch

from .samplers import ImageNoise

TIMES = (400, 600)  # one noise at each; where the first tells clearly that the digit is right, there is no second
CLEAR = 0.03  # of e: by which share the best other digit is worse at least. It and the times were chosen on images of a seed that measures nothing.


def errors(model, diffusion, x0, domain, t, eps):
    """e(y) of every digit y. x0, eps: [B, 3, H, W]; domain: int [B]; t: one number -> float32 [B, digits]."""
    steps = torch.full_like(domain, t)
    x, target = diffusion.add_noise(x0, eps, steps).to(next(model.parameters()).dtype), diffusion.target(x0, eps, steps)
    outputs = (model(x, steps, torch.full_like(domain, digit), domain).float() for digit in range(model.null_digit))
    return torch.stack([(output - target).square().mean(dim=(1, 2, 3)) for output in outputs], dim=1)


def doubt(model, diffusion, x0, digit, domain, seed, names):
    """How sure the network is that an image shows something else than it should: by which share of the least error the error of `digit` is above that of the
    best other digit, float32 [B]; above 0 it reads another one.

    x0: [B, 3, H, W] in [-1, 1]; digit, domain: int [B]; seed, names: of the images, by which they have their noises."""
    noise, total, doubts = ImageNoise(seed, names, x0.shape[1:], x0.device), 0, torch.zeros(len(x0), device=x0.device)
    open_ = torch.arange(len(x0), device=x0.device)
    for t in TIMES:
        total = total + errors(model, diffusion, x0[open_], domain[open_], t, noise()[open_])
        own = total.gather(1, digit[open_, None])[:, 0]
        other = total.scatter(1, digit[open_, None], torch.inf).amin(dim=1)
        doubts[open_] = (own - other) / torch.minimum(own, other)
        unclear = doubts[open_] > -CLEAR
        open_, total = open_[unclear], total[unclear]
        if not len(open_):
            break
    return doubts
