"""The miniature's pictures: scenes of world.py painted, patterned, placed and laid over each other, in batches, on the drawings' device."""

import functools
import math

import torch
import torch.nn.functional as F

from ..files import UserError
from .world import COLOURS, GROUNDS, LUMA, PLACES, RENDERINGS, SIDE, SLOTS, TONES


@functools.cache
def constant(values, device):
    """A tuple as a tensor that stays on the device: making it anew would have the GPU wait each time."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def luma(rgb):
    """Brightness [N, 1, H, W] of colours [N, 3, H, W]."""
    return (rgb * constant(LUMA, rgb.device)[:, None, None]).sum(1, keepdim=True)


def inner_mean(values, alpha):
    """The mean [N, 1, 1, 1] of values over where the drawing is."""
    return (values * alpha).sum((1, 2, 3), keepdim=True) / alpha.sum((1, 2, 3), keepdim=True).clamp(min=1e-6)


def paint(rgb, alpha, hue):
    """Drawings [N, 3, H, W] in 0..1 in other colours, [N] as in `Scenes`: black stays black, white white, and the drawing's mean brightness becomes the
    colour itself, whatever it was."""
    table = constant(((0, 0, 0), *COLOURS.values()), rgb.device) / 255
    colour = table[hue][:, :, None, None]
    brightness = 0.04 + 0.94 * luma(rgb)
    power = math.log(0.5) / inner_mean(brightness, alpha).clamp(0.04, 0.96).log()
    level = 2 * brightness ** power
    painted = torch.where(level < 1, level * colour, colour + (level - 1).clamp(max=1) * (1 - colour))
    return torch.where((hue > 0)[:, None, None, None], painted, rgb)


def overlay(rgb, alpha, pattern, phase):
    """Patterns [N], as in `Scenes`, laid over drawings [N, 3, H, W] in 0..1: white ones on what is dark, dark ones on what is light. phase: [N] in 0..1."""
    at = torch.arange(SIDE, device=rgb.device).float() / 16
    x, y = at[None, None, :] + phase[:, None, None], at[None, :, None] + phase[:, None, None]
    striped = ((x + y) * 0.7071) % 1 < 0.45
    dotted = ((x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2) < 0.09
    checked = (x % 1 < 0.5) != (y % 1 < 0.5)
    which = pattern[:, None, None]
    mask = torch.where(which == 1, striped, torch.where(which == 2, dotted, checked)) & (which > 0)
    tone = torch.where(inner_mean(luma(rgb), alpha) < 0.6, 1.0, 0.1)
    return torch.where(mask[:, None], rgb + 0.8 * (tone - rgb), rgb)


def render(rgb, alpha, rendering):
    """(colours, cover) of drawings in the styles that are made from drawings. rendering: [N] on the CPU, as in `Scenes`."""
    for k, name in enumerate(RENDERINGS, 1):
        at = (rendering == k).nonzero()[:, 0].to(rgb.device, non_blocking=True)
        if len(at) == 0:
            continue
        bright, cover = luma(rgb[at]), alpha[at]
        if name in TONES:
            dark, light = (constant(tone, rgb.device)[:, None, None] / 255 for tone in TONES[name])
            rgb[at] = dark + bright * (light - dark)
        elif name == "pastel":
            rgb[at] = 0.4 * rgb[at] + 0.6
        else:
            if name == "stencil":  # a hole where it is light
                alpha[at] = cover * (1 - ((255 * bright - 150) / 40).clamp(0, 1))
            else:  # the largest less the smallest around
                levels = torch.cat([bright * cover, cover], dim=1)
                alpha[at] = (2 * (F.max_pool2d(levels, 3, 1, 1) + F.max_pool2d(-levels, 3, 1, 1)).amax(1, keepdim=True)).clamp(0, 1)
            rgb[at] = 0.0
    return rgb, alpha


def layout(scenes, generator, shift, spread):
    """(scene, slot, x, y, scale), [M] each, of everything to draw; x, y in -1..1. spread: the (smallest, largest) scale of a subject alone."""
    count = (scenes.name >= 0).sum(1)
    things = torch.maximum(count, scenes.number)
    scene, slot = (torch.arange(SLOTS) < things[:, None]).nonzero().unbind(1)
    total, alone = things[scene], (count == 1)[scene]
    relation = torch.where(alone, 0, scenes.relation[scene])
    sign = 2.0 * slot - 1
    x = torch.where(total == 2, torch.where(relation == 0, 0.5 * sign, 0), torch.where(total == 3, torch.tensor([-0.5, 0.5, 0.0])[slot], 0))
    y = torch.where(total == 2, torch.where(relation == 0, 0, torch.where(relation == 1, 0.5, -0.5) * sign),
                    torch.where(total == 3, torch.tensor([-0.48, -0.48, 0.5])[slot], 0))
    places = torch.tensor([(0.0, 0.0), *PLACES.values()])[scenes.place[scene] * alone]
    size = scenes.size[scene, torch.where(alone, 0, slot)]
    low, high = spread
    wide = torch.rand(len(scene), generator=generator)
    single = torch.where(size == 1, 0.36 + 0.12 * wide, torch.where(size == 2, high + 0.12 * wide, low + (high - low) * wide))
    single = torch.where((scenes.place[scene] > 0) & (size == 0), 0.54 + 0.08 * wide, single)
    several = torch.where(size == 1, 0.27 + 0.06 * wide, torch.where(size == 2, 0.5 + 0.06 * wide, 0.38 + 0.09 * wide))
    near = torch.where(total == 1, shift, 0.5 * shift)
    x, y = (c + places[:, k] + near * (2 * torch.rand(len(scene), generator=generator) - 1) for k, c in enumerate((x, y)))
    return scene, slot, x, y, torch.where(total == 1, single, several)


def compose(drawings, scenes, generator, shift=0.08, spread=(0.68, 0.95), jitter=12, turn=0.1):
    """Pictures float32 [B, 3, 64, 64] in -1..1, on the drawings' device: each drawing painted, moved, scaled and turned a little, on its jittered ground.

    generator: of torch, on the CPU. shift: largest, as a share of the side; spread: scales of a subject alone of ordinary size; turn: largest, in radians;
    jitter: largest, of the ground, in grey levels. Drawn at twice the side and averaged, so that small ones are not jagged."""
    device = drawings.pixels.device
    scene, slot, x, y, scale = layout(scenes, generator, shift, spread)
    angle = turn * (2 * torch.rand(len(scene), generator=generator) - 1)
    own = torch.where(scenes.name[scene, slot] >= 0, slot, 0)  # several of one thing look alike
    hue, pattern = scenes.hue[scene, own], scenes.pattern[scene, own]
    rows = drawings.rows[scenes.name[scene, own], scenes.style[scene]]
    if (rows < 0).any():
        raise UserError("a scene asks for a drawing that its style does not have")
    phase = torch.rand(len(scenes), generator=generator)[scene]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, sin, -cos * x - sin * y], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)], 1)
    ground = torch.tensor(list(GROUNDS.values()), dtype=torch.float32)[scenes.ground]
    ground = (ground + jitter * (2 * torch.rand(len(scenes), 3, generator=generator) - 1)).clamp(0, 255) / 255
    rendering = scenes.rendering[scene]
    theta, hue, pattern, phase, rows, ground, scene = (v.to(device, non_blocking=True) for v in (theta, hue, pattern, phase, rows, ground, scene))
    rgba = drawings.pixels[rows].float() / 255
    rgb, alpha = rgba[:, :3], rgba[:, 3:].clone()
    rgb, alpha = render(overlay(paint(rgb, alpha, hue), alpha, pattern, phase), alpha, rendering)
    grid = F.affine_grid(theta, [len(rows), 4, 2 * SIDE, 2 * SIDE], align_corners=False)
    moved = F.grid_sample(torch.cat([rgb * alpha, alpha], 1), grid, mode="bilinear", align_corners=False)
    moved = F.avg_pool2d(moved, 2)
    picture = ground[:, :, None, None].expand(-1, -1, SIDE, SIDE).clone()
    for k in range(SLOTS):
        at = (slot == k).nonzero()[:, 0].to(device, non_blocking=True)
        if len(at):
            where = scene[at]
            picture[where] = moved[at, :3] + (1 - moved[at, 3:]) * picture[where]
    return 2 * picture - 1
