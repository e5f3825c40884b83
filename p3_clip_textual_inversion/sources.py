"""What textual inversion learns from: latents of the examples with captions, and of ordinary pictures; and batches of these."""

from typing import NamedTuple

import numpy as np
import torch

from .concepts import kind_of
from .data import read_captions, varied
from .device import progress
from .embedding import expand
from .inference import check_lengths, generate
from .pictures import read_pictures

HELD = 2  # crops of each example that are kept from learning
MOST_TOKENS = 4  # of initial words that have a vector each


class Source(NamedTuple):
    """Latents of one kind of picture, means and deviations [N, 4, h, w], with captions; either any caption fits any picture, or each its own. ordinary: of
    a prior, without a learned word."""
    means: torch.Tensor
    deviations: torch.Tensor
    captions: list
    paired: bool = False
    ordinary: bool = False


def initial_words(concept, config):
    """What a word begins as: --init, by default what input.json says of the concept; None for noise."""
    return {"src_image": concept.src_image, "noise": None}.get(config.init, config.init)


def counts_of(parts, concepts, config):
    """{word: number of vectors}: --vectors or, where that is 0, as many as its initial words have tokens, `MOST_TOKENS` at most."""
    def tokens(words):
        return len(parts.tokenizer(words, add_special_tokens=False).input_ids) if words else 1
    return {concept.token: config.vectors or min(max(tokens(initial_words(concept, config)), 1), MOST_TOKENS) for concept in concepts}


@torch.no_grad()
def encode(parts, squares, captions, paired=False):
    """A `Source` of pictures [N, 3, H, W] in -1..1: encoded once, as mean and deviation, so that each step still draws afresh."""
    posteriors = [parts.vae.encode(part.to(parts.vae.device, parts.vae.dtype)).latent_dist for part in squares.split(4)]
    return Source(*(torch.cat([getattr(p, name).float() for p in posteriors]) for name in ("mean", "std")), captions, paired)


def pick(sources, batch_size, generator):
    """[(source, row, caption)] of a batch, each picture from a source picked at random."""
    picked = []
    for source in (sources[i] for i in torch.randint(0, len(sources), (batch_size,), generator=generator).tolist()):
        row = int(torch.randint(0, len(source.means), (), generator=generator))
        caption = int(torch.randint(0, len(source.captions), (), generator=generator))
        picked.append((source, row, source.captions[row if source.paired else caption]))
    return picked


def draw_noise(means, deviations, scaling, generator):
    """(x0, eps, t) of latents with these means and deviations. Everything is drawn on the CPU from the generator; a GPU does not wait for it."""
    fresh, eps = (torch.randn(means.shape, generator=generator).to(means.device, non_blocking=True) for _ in range(2))
    t = torch.randint(0, 1000, (len(means),), generator=generator).to(means.device, non_blocking=True)
    return scaling * (means + deviations * fresh), eps, t


def draw_batch(sources, scaling, batch_size, generator):
    """(x0, eps, t, captions) of a batch."""
    picked = pick(sources, batch_size, generator)
    means, deviations = (torch.stack([getattr(source, name)[row] for source, row, _ in picked]) for name in ("means", "deviations"))
    return *draw_noise(means, deviations, scaling, generator), [caption for _, _, caption in picked]


def make_held(parts, concepts, config, row, side):
    """A `Source` of crops that nothing is learned from, each with its caption: what tells how well a word does."""
    squares, captions = [], []
    for concept in concepts:
        rng, folder = np.random.default_rng([config.seed, 1]), concept.folder
        pictures = read_pictures(folder)[0]
        own = read_captions(folder, pictures, concept.token)
        texts = own or [template.format(concept.token) for template in row.templates[kind_of(concept, config.kind)]]
        squares += [varied(picture, side, 2 + HELD, rng)[2:] for picture in pictures.values()]
        captions += [texts[i // HELD if own else i % len(texts)] for i in range(HELD * len(pictures))]
    counts = counts_of(parts, concepts, config)
    return encode(parts, torch.cat(squares), [expand(text, counts) for text in captions], paired=True)


def make_sources(parts, concepts, config, row, side, drawing):
    """The pictures to learn from: each concept's, and ordinary ones, if weights learn.

    config: train.py's `TrainConfig`; row: the model's `Defaults`, for captions and ordinary things; drawing: `DrawConfig` of the latter."""
    counts = counts_of(parts, concepts, config)
    sources = []
    for concept in concepts:
        rng, folder, kind = np.random.default_rng(config.seed), concept.folder, kind_of(concept, config.kind)
        pictures = read_pictures(folder)[0]
        squares = torch.cat([varied(picture, side, config.crops, rng) for picture in pictures.values()])
        own = read_captions(folder, pictures, concept.token)
        captions = [text for text in own for _ in range(config.crops)] if own else [template.format(concept.token) for template in row.templates[kind]]
        captions = [expand(text, counts) for text in captions]
        check_lengths(parts, captions, counts)
        sources.append(encode(parts, squares, captions, paired=bool(own)))
    if (config.custom_diffusion or config.lora) and config.prior:
        words = [concept.src_image for concept in concepts if kind_of(concept, config.kind) == "object"] + list(row.ordinary)
        captions = [row.templates["object"][-1].format(words[i % len(words)]) for i in range(config.prior)]
        with progress(total=config.prior, unit="picture", desc="drawing ordinary pictures") as bar:
            drawn = np.stack(list(generate(parts, captions, [f"prior/{i}" for i in range(config.prior)], drawing, progress=bar)))
        ordinary = encode(parts, torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1, captions, paired=True)
        sources += [ordinary._replace(ordinary=True)] * len(sources)  # half of each batch
    return sources
