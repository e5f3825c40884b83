"""Which digit the network itself sees in an image, so that what it doubts can be drawn again. No classifier takes part.

A conditional diffusion model is a classifier (Li et al. 2023; Clark and Jaini 2023): its loss bounds -log p(image | digit), so it reads the digit under whose
condition it denoises the image best:

    e(y) = || target(x0, eps, t) - net(x_t, t, y) ||^2,    x_t = alpha_t x0 + sigma_t eps,    read is the y of the least e

Each digit is tried on the same noise, which takes most of the noise's share out of their differences. One noise is ten evaluations of the network, no guidance.
"""

import torch

from .diffusion import Diffusion, DiffusionConfig
from .samplers import ImageNoise

# (t of the cosine schedule, and of others where as much noise is; by which share of the least error the best other digit must be worse): an image that is
# sure at the first has no second noise, on which both count.
# Chosen with the bundled network on 1,450 SVHN images of a seed that measures nothing, w 3: of 2 % that are misread these leave 0.2 %, and draw 15 % again.
SURE = ((600, 0.10), (500, 0.05))


def errors(model, diffusion, x0, domain, t, eps):
    """e(y) of every digit y. x0, eps: [B, 3, H, W]; domain: int [B]; t: one number -> float32 [B, digits]."""
    steps = torch.full_like(domain, t)
    x, target = diffusion.add_noise(x0, eps, steps).to(next(model.parameters()).dtype), diffusion.target(x0, eps, steps)
    outputs = (model(x, steps, torch.full_like(domain, digit), domain).float() for digit in range(model.null_digit))
    return torch.stack([(output - target).square().mean(dim=(1, 2, 3)) for output in outputs], dim=1)


def as_noisy(t, diffusion):
    """The t at which a schedule has as much noise as the cosine one has at t."""
    return int((diffusion.alpha_bar - Diffusion(DiffusionConfig("cosine")).alpha_bar[t]).abs().argmin())


def doubt(model, diffusion, x0, digit, domain, seed, names):
    """How unsure the network is that an image shows the digit that it should, float32 [B]: above 0 it is not sure enough, and the image worth another try.

    x0: [B, 3, H, W] in [-1, 1]; digit, domain: int [B]; seed, names: of the images, by which they have their noises."""
    noise, total, doubts = ImageNoise(seed, names, x0.shape[1:], x0.device), 0, torch.zeros(len(x0), device=x0.device)
    left = torch.arange(len(x0), device=x0.device)
    for t, share in SURE:
        total = total + errors(model, diffusion, x0[left], domain[left], as_noisy(t, diffusion), noise()[left])
        own = total.gather(1, digit[left, None])[:, 0]
        other = total.scatter(1, digit[left, None], torch.inf).amin(dim=1)
        doubts[left] = share - (other - own) / torch.minimum(own, other)
        unsure = doubts[left] > 0
        left, total = left[unsure], total[unsure]
        if not len(left):
            break
    return doubts
