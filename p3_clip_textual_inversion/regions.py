"""Several things in one picture, each in its place: every cross-attention is bounded to regions. Nothing is trained, and no weight changes.

A layer's queries h (a row for each place of the picture) ask the whole prompt c and, in its region m_k (each place's share that lies in the box, 0..1), the
text c_k of a thing:

    out = (1 - sum_k m_k) attention(h, c) + sum_k m_k attention(h, c_k)             m_k divided by max(1, sum_k m_k), so where boxes overlap all share

which is the regionally controllable sampling of Mix-of-Show (Gu et al. 2023, section 3.3) with shares in place of cut-out queries, so that a box of any size
acts at every resolution. Everything else (self-attention, convolutions, the background) stays whole, which keeps the picture one. It costs one more
attention per thing and layer, no further call of the network: composable diffusion (Liu et al. 2022) and MultiDiffusion (Bar-Tal et al. 2023), which add the
noise estimates of each prompt instead, call it once more for each; Attend-and-Excite (Chefer et al. 2023) and MC2 (Jiang et al. 2024) move the latent by the
gradient of what the words' attention should be, which costs a backward pass a step; these two have not been tried here.

What a region is told must fit its size. A model that is told of one thing draws it large, in the middle: text k is therefore the whole prompt with thing k in
the place of every thing ("a <new1> next to a <new1>"), of which a region then shows its part.
"""

import math
from contextlib import contextmanager
from functools import lru_cache, partial

import torch

from .diffusion import Guided
from .embedding import expand
from .places import AUTO, LEARNED, arranged, plan

WATCHED = 0.8  # t/T down to which a picture's own attention is watched, where its prompt tells no places; set, not measured, for any model


@lru_cache(256)  # each layer asks for it at each step
def cover(box, side, device=None):
    """The share of each place of a layer of side x side that lies in a box, [side * side]."""
    left, top, right, bottom = box

    def along(low, high):
        edges = torch.arange(side + 1, device=device) / side
        return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)) * side).clamp(min=0)
    return torch.outer(along(top, bottom), along(left, right)).flatten()


class Bounded:
    """A cross-attention's processor, around the one that it has: rows[i], the i-th of the batch, follows its own text where its box is.

    turns: a list of (rows int [n], texts [n, tokens, dim], boxes), each row at most once in each, so that sums do not depend on their order."""

    def __init__(self, stock, turns):
        self.stock, self.turns = stock, turns

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        side, total, found = math.isqrt(hidden_states.shape[1]), out.new_zeros(*out.shape[:2], 1), []
        for rows, texts, boxes in self.turns:
            share = torch.stack([cover(box, side, out.device) for box in boxes])[..., None].to(out.dtype)
            found.append((rows, share, self.stock(attn, hidden_states[rows], texts, attention_mask, temb)))
            total[rows] += share
        over = total.clamp(min=1)
        out = out * (1 - total / over)
        for rows, share, own in found:
            out[rows] += share / over[rows] * own
        return out


class Watching:
    """A cross-attention's processor that notes where the batch's first `count` pictures attend to their things.

    tokens: for each picture the positions of each of its things' tokens; points: a list of (x, y) for each, to which each call adds."""

    def __init__(self, stock, tokens, points):
        self.stock, self.tokens, self.points = stock, tokens, points

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        count, side = len(self.tokens), math.isqrt(hidden_states.shape[1])
        query, key = (attn.head_to_batch_dim(part(states[:count])) for part, states in ((attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states)))
        attention = attn.get_attention_scores(query, key).float().unflatten(0, (count, -1)).mean(1).cpu()  # [count, places, tokens]
        middle = (torch.arange(side) + 0.5) / side
        for number, things in enumerate(self.tokens):
            for thing, positions in enumerate(things):
                where = attention[number][:, positions].sum(1).view(side, side)
                x, y = (where.sum(0) @ middle / where.sum()).item(), (where.sum(1) @ middle / where.sum()).item()
                self.points[number][thing].append((x, y))
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@contextmanager
def processors(unet, make):
    """Has make(stock) in the place of every cross-attention's processor, for a while."""
    layers = [(module, module.processor) for name, module in unet.named_modules() if name.endswith("attn2")]
    try:
        for module, stock in layers:
            module.processor = make(stock)
        yield
    finally:
        for module, stock in layers:
            module.processor = stock


class Regional(Guided):
    """Like `Guided`, bounded to regions. pictures: for each of the batch a list of (text's hidden states [tokens, dim], box or None, positions of its tokens).

    Where a box is None it is `arranged` by where the picture attends to its things while t/T is above WATCHED."""

    def __init__(self, unet, alpha_bar, cond, uncond, w, dtype=torch.float32, *, pictures, **options):
        super().__init__(unet, alpha_bar, cond, uncond, w, dtype, **options)
        self.pictures, self.points = pictures, [[[] for _ in things] for things in pictures]
        self.tokens = [[tokens for _, _, tokens in things] if any(box is None for _, box, _ in things) else [] for things in pictures]  # of who is watched
        self.turns = self.turns_of(pictures)

    @staticmethod
    def turns_of(pictures):
        """What `Bounded` takes of those pictures whose boxes are known."""
        known = [things if all(box for _, box, _ in things) else [] for things in pictures]
        turns = []
        for turn in range(max(map(len, known))):
            rows = [row for row, things in enumerate(known) if len(things) > turn]
            texts, boxes = [known[row][turn][0] for row in rows], [known[row][turn][1] for row in rows]
            turns.append((torch.tensor(rows, device=texts[0].device), torch.stack(texts), boxes))
        return turns

    def eps(self, x, t):
        if any(self.tokens) and (t / len(self.alpha_bar) > WATCHED or not any(map(any, self.points))):  # few steps may begin below
            with processors(self.unet, lambda stock: Watching(Bounded(stock, self.turns), self.tokens, self.points)):
                return super().eps(x, t)
        if any(self.tokens):
            self.place()
        with processors(self.unet, lambda stock: Bounded(stock, self.turns)):
            return super().eps(x, t)

    def place(self):
        """Gives the things of watched pictures their boxes, by the mean of the points where they were seen."""
        for row, points in enumerate(self.points):
            if self.tokens[row]:
                boxes = arranged([[sum(values) / len(values) for values in zip(*where)] for where in points])
                self.pictures[row] = [(text, box, tokens) for (text, _, tokens), box in zip(self.pictures[row], boxes)]
        self.tokens, self.turns = [], self.turns_of(self.pictures)


def regional(parts, plans, hidden):
    """What `states` takes as `guided` for a batch: `Guided` where no picture has regions. plans: a `plan` for each picture; hidden: {text: states}."""
    if not any(plans):
        return Guided

    def positions(region):
        first, last = (len(parts.tokenizer(text, add_special_tokens=False).input_ids) for text in (region.before, region.before + region.thing))
        return list(range(1 + first, 1 + last))  # behind the start token
    return partial(Regional, pictures=[[(hidden[region.text], region.box, positions(region)) for region in plan] for plan in plans])


def plans_of(prompts, config, counts):
    """{prompt: its regions}, of prompts with learned words written out that have some. counts: {word: number of vectors}"""
    regions = config.regions if config.regions in (AUTO, LEARNED) else [(expand(name, counts), box) for name, box in config.regions]
    words = [expand(word, counts) for word in counts]
    return {prompt: found for prompt in dict.fromkeys(prompts) if (found := plan(prompt, regions, words))}


def texts_of(plans):
    """What the regions of `plans_of` are told."""
    return [region.text for regions in plans.values() for region in regions]


def print_plans(prompts, config, words, most=8):
    """A line for each prompt (learned words as they are), of what is where; nothing without regions."""
    every, plans = list(dict.fromkeys(prompts)) if config.regions else [], plans_of(prompts, config, dict.fromkeys(words, 1))
    for prompt in every[:most]:
        told = [f"{thing} {','.join(f'{edge:.3g}' for edge in box) if box else 'where its attention goes'}" for _, box, _, thing in plans.get(prompt, ())]
        print(f"regions of {prompt!r}: {'; '.join(told) or 'none'}", flush=True)
    if every[most:]:
        print(f"... and of {len(every) - most} prompts more", flush=True)
