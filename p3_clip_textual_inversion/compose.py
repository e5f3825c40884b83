"""Guidance that brings two concepts into one picture: each half follows a prompt of its own, or a style is added to a subject.

The noise estimate of "a <new1> next to a <new2>" is a weighted sum: a share of the whole prompt's everywhere, the rest of each side's prompt in its own half
(regional guidance, in the manner of MultiDiffusion, Bar-Tal et al. 2023); or, with masks of one half everywhere, composed noise estimates (Liu et al. 2022).
"""

import math

import torch

from .diffusion import Guided

SEPARATOR = " next to "


def halves(height, width, soft=0.125, first=(0.25, 0.5), second=(0.75, 0.5)):
    """Two masks [1, 1, height, width] that sum to 1: of what is nearer to the point `first` and of what is nearer to `second`, by default the left half and
    the right. Points are (x, y), 0..1 from the upper left corner; the seam between the halves is soft for `soft` of the side to either side."""
    (x1, y1), (x2, y2) = first, second
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    beyond = ((x - (x1 + x2) / 2) * (x2 - x1) + (y - (y1 + y2) / 2) * (y2 - y1)) / math.hypot(x2 - x1, y2 - y1)
    nearer = (beyond / (2 * soft) + 0.5).clamp(0, 1)[None, None]
    return 1 - nearer, nearer


class Regional(Guided):
    """Like `Guided`, with prompts for parts of the picture: eps_cond = whole * eps(prompt) + (1 - whole) * sum_k mask_k eps(prompt_k).

    sides: hidden states [tokens, dim] of each part's prompt; whole: share of the whole prompt; masks: of `halves`, or None for a plain mean."""

    def __init__(self, unet, alpha_bar, cond, uncond, w, dtype, sides, whole=0.3, masks=halves):
        super().__init__(unet, alpha_bar, cond, uncond, w, dtype)
        self.whole, self.masks, self.count = whole, masks, len(sides)
        self.all = Guided(unet, alpha_bar, torch.cat([cond, uncond, *(side.expand_as(cond) for side in sides)]), uncond, 0, dtype)

    def eps(self, x, t):
        cond, uncond, *sides = self.all.eps(torch.cat([x] * (2 + self.count)), t).chunk(2 + self.count)
        masks = self.masks(*x.shape[-2:]) if self.masks else [1 / self.count] * self.count
        parts = sum((mask.to(x.device) if torch.is_tensor(mask) else mask) * side for mask, side in zip(masks, sides))
        return (1 + self.w) * (self.whole * cond + (1 - self.whole) * parts) - self.w * uncond


class Styled(Guided):
    """Like `Guided`, towards a style: eps_cond = eps(prompt) + strength * (eps(styled) - eps(plain)), the direction in which the style changes an ordinary
    subject (two composed noise estimates, Liu et al. 2022). plain, styled: hidden states [tokens, dim] of prompts that differ in the style only."""

    def __init__(self, unet, alpha_bar, cond, uncond, w, dtype, plain, styled, strength=1.0):
        super().__init__(unet, alpha_bar, cond, uncond, w, dtype)
        self.strength = strength
        self.all = Guided(unet, alpha_bar, torch.cat([cond, uncond, plain.expand_as(cond), styled.expand_as(cond)]), uncond, 0, dtype)

    def eps(self, x, t):
        cond, uncond, plain, styled = self.all.eps(torch.cat([x] * 4), t).chunk(4)
        return (1 + self.w) * (cond + self.strength * (styled - plain)) - self.w * uncond


def toward_style(parts, plain, styled, strength=1.0):
    """What `inference.draw` takes as `guided`, for a prompt of a learned subject in a style: plain and styled are prompts of an ordinary one."""
    with torch.inference_mode():
        ends = parts.encode_text([plain, styled])

    def guided(unet, alpha_bar, cond, uncond, w, dtype=torch.float32):
        return Styled(unet, alpha_bar, cond, uncond, w, dtype, *ends[:, None], strength)
    return guided


def regional(parts, prompt, whole=0.3, masks=halves, twice=True):
    """What `inference.draw` takes as `guided`, for a prompt "A next to B" (learned words written out). Other prompts have no sides: plain guidance.

    twice: each side's prompt is "A next to A", whose estimate places an A of the right size in its half; that of "A" alone is of one large A in the middle."""
    sides = prompt.split(SEPARATOR)
    if len(sides) != 2:
        return Guided
    with torch.inference_mode():
        hidden = parts.encode_text([f"{side}{SEPARATOR}{side}" if twice else side for side in sides])

    def guided(unet, alpha_bar, cond, uncond, w, dtype=torch.float32):
        return Regional(unet, alpha_bar, cond, uncond, w, dtype, [side[None] for side in hidden], whole, masks)
    return guided
