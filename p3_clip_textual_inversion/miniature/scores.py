"""What the miniature's models are worth: what CLIP recognises in their pictures and where, which colour is whose, the autoencoder's error. Real compositions
of the same scenes, judged in the same way, stand beside every share: what a perfect model would get.

    python -m p3_clip_textual_inversion.miniature.scores --drawings runs/emoji.npz      # report/results/p3_miniature.json, report/figures/p3_miniature.png

Scenes come from seeds that no training has. A judge is a CLIP; with --judge a second one, of another architecture, by which nothing was chosen.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..clip import load_clip
from ..device import DTYPES, pick_device, pick_dtype, progress
from ..files import MINI, ROOT, check_flags, run, writable_folder, write_json
from ..inference import DrawConfig, generate
from ..measures import share
from ..model import MINI_SD, load_stable_diffusion
from ..pictures import save_image, to_uint8
from ..provenance import HelpFormatter
from .painting import compose
from .world import CLIP_STYLES, COLOURS, DRAWINGS, GROUNDS, KEPT_OUT, SIDE, UNSEEN_STYLE, Drawings, captions, make_scenes, sample, words

SEED = 10**7
GUIDANCE = 3.0


class Eye:
    """A CLIP as a judge of pictures [N, 3, 64, 64] in -1..1. Features have length 1."""

    def __init__(self, folder, device):
        self.clip, _, self.tokenizer = load_clip(str(folder), None, device)
        self.device = device

    @torch.inference_mode()
    def of_pictures(self, pictures):
        return torch.cat([self.clip.encode_image(part.to(self.device), normalize=True).float().cpu() for part in pictures.split(256)])

    @torch.inference_mode()
    def of_texts(self, texts):
        tokens = self.tokenizer(list(texts)).to(self.device)
        return torch.cat([self.clip.encode_text(part, normalize=True).float().cpu() for part in tokens.split(512)])

    def names(self, pictures, names):
        """[N]: for which of the names it takes each picture."""
        return (self.of_pictures(pictures) @ self.of_texts(f"a drawing of a {words(name)}" for name in names).T).argmax(1)


def halves(pictures):
    """(left, right): squares of 0.55 of the side at mid-height, where the subjects of a pair stand, enlarged to the whole side."""
    side = round(0.55 * SIDE)
    top = (SIDE - side) // 2
    return tuple(F.interpolate(pictures[:, :, top:top + side, left:left + side], size=SIDE, mode="bicubic", antialias=True).clamp(-1, 1)
                 for left in (0, SIDE - side))


def main_colour(pictures):
    """[N]: the place in COLOURS of each picture's strongest colour that is not its ground's: pixels far from the border's median vote, by their chroma, for
    the nearest hue."""
    rgb = ((pictures + 1) / 2).clamp(0, 1)
    border = torch.cat([rgb[:, :, :2].flatten(2), rgb[:, :, -2:].flatten(2)], 2)
    far = (rgb - border.median(2).values[:, :, None, None]).abs().amax(1) > 0.15
    angle, chroma = hue_of(rgb)
    own = hue_of(torch.tensor(list(COLOURS.values()), dtype=torch.float32).T[None, :, :, None] / 255)[0].flatten()
    apart = (angle[..., None] - own).abs()
    nearest = torch.minimum(apart, 1 - apart).argmin(-1)
    votes = F.one_hot(nearest, len(COLOURS)) * (chroma * far * (chroma > 0.15))[..., None]
    return votes.sum((1, 2)).argmax(1)


def hue_of(rgb):
    """(hue in 0..1, chroma) [N, H, W] of colours [N, 3, H, W] in 0..1."""
    r, g, b = rgb.unbind(1)
    high, low = rgb.amax(1), rgb.amin(1)
    chroma = high - low
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(high == r, ((g - b) / safe) % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)) / 6
    return hue, chroma


class Artist:
    """Draws scenes twice: composed from real drawings, and by Stable Diffusion from their captions."""

    def __init__(self, drawings, parts, config):
        self.drawings, self.parts, self.config, self.seconds, self.count = drawings, parts, config, 0.0, 0

    def real(self, scenes, seed=SEED):
        return compose(self.drawings, scenes, torch.Generator().manual_seed(seed)).cpu()

    def drawn(self, texts, names=None):
        """Pictures [N, 3, 64, 64] in -1..1; names: of the noises."""
        started = time.perf_counter()
        names = names or [f"score/{i}" for i in range(len(texts))]
        with progress(total=len(texts), unit="picture", desc="drawing") as bar:
            pictures = np.stack(list(generate(self.parts, list(texts), names, self.config, progress=bar)))
        self.seconds, self.count = self.seconds + time.perf_counter() - started, self.count + len(texts)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def plain(scenes, **changes):
    """Scenes without looks, untold grounds and styles: what a short prompt asks for."""
    zero = torch.zeros_like(scenes.hue)
    none = torch.zeros_like(scenes.style)
    told = torch.zeros_like(scenes.tell_ground)
    return replace(scenes, **{"hue": zero, "pattern": zero, "size": zero, "place": none, "relation": none, "rendering": none, "number": none + 1,
                              "tell": torch.ones_like(scenes.tell), "tell_ground": told, "tell_style": told} | changes)


def single_subjects(artist, eyes, count):
    """One subject: the share that is recognised among the everyday names."""
    drawings, generator = artist.drawings, torch.Generator().manual_seed(SEED)
    first = drawings.everyday[torch.arange(count) % len(drawings.everyday)]
    scenes = plain(sample(drawings, count, generator, first=first, several=(1.0, 0.0, 0.0)), opening=torch.ones(count, dtype=torch.bool))
    names, truth = [drawings.names[i] for i in drawings.everyday], torch.arange(count) % len(drawings.everyday)
    ways = {"real": artist.real(scenes), "drawn": artist.drawn(captions(drawings, scenes))}
    return {judge: {way: share(eye.names(pictures, names) == truth) for way, pictures in ways.items()} for judge, eye in eyes.items()}, ways["drawn"]


def pairs(artist, eyes, count):
    """Two subjects: whether both are recognised, each in its half."""
    drawings, generator = artist.drawings, torch.Generator().manual_seed(SEED + 1)
    scenes = plain(sample(drawings, count, generator, several=(0.0, 1.0, 0.0)), opening=torch.zeros(count, dtype=torch.bool))
    names = [drawings.names[i] for i in drawings.everyday]
    truth = [torch.tensor([names.index(drawings.names[i]) for i in scenes.name[:, slot]]) for slot in (0, 1)]
    ways = {"real": artist.real(scenes, SEED + 1), "drawn": artist.drawn(captions(drawings, scenes))}
    results = {}
    for judge, eye in eyes.items():
        found = {way: [eye.names(half, names) == right for half, right in zip(halves(pictures), truth)] for way, pictures in ways.items()}
        results[judge] = {way: share(left & right) | {"left": left.float().mean().item(), "right": right.float().mean().item()}
                          for way, (left, right) in found.items()}
    return results, ways["drawn"]


def colours(artist, eyes, count):
    """Two subjects with a colour each: whether CLIP prefers the true caption to those with the colours or the subjects exchanged or one colour another, and
    whether the strongest colour of each half is the one that was asked for."""
    drawings, generator = artist.drawings, torch.Generator().manual_seed(SEED + 2)
    plainly = ~drawings.coloured[drawings.everyday]
    scenes = sample(drawings, count, generator, names=drawings.everyday[plainly], several=(0.0, 1.0, 0.0))
    both = torch.stack([torch.randperm(len(COLOURS), generator=generator)[:2] + 1 for _ in range(count)])
    scenes = plain(scenes, hue=F.pad(both, (0, 1)), opening=torch.zeros(count, dtype=torch.bool))
    texts = captions(drawings, scenes)
    other = [captions(drawings, replace(scenes, hue=F.pad(both.flip(1), (0, 1)))),
             captions(drawings, replace(scenes, name=torch.cat([scenes.name[:, :2].flip(1), scenes.name[:, 2:]], 1)))]
    for slot in (0, 1):
        for step in range(1, len(COLOURS)):
            hue = scenes.hue.clone()
            hue[:, slot] = (hue[:, slot] - 1 + step) % len(COLOURS) + 1
            other.append(captions(drawings, replace(scenes, hue=hue)))
    ways = {"real": artist.real(scenes, SEED + 2), "drawn": artist.drawn(texts)}
    results = {}
    for judge, eye in eyes.items():
        options = torch.stack([eye.of_texts(several) for several in (texts, *other)], 1)  # [N, options, dim]
        results[judge] = {way: share((eye.of_pictures(pictures)[:, None] * options).sum(-1).argmax(1) == 0) for way, pictures in ways.items()}
    asked = (both - 1).unbind(1)
    results["pixels"] = {way: share(torch.stack([main_colour(half) == hue for half, hue in zip(halves(pictures), asked)]).all(0))
                         for way, pictures in ways.items()}
    return results, ways["drawn"]


@torch.inference_mode()
def reconstruction(vae, drawings, device):
    """Mean PSNR in dB on drawings that the autoencoder never saw: a whole style, and the subjects kept out."""
    rng = np.random.default_rng(0)
    column = drawings.styles.index(UNSEEN_STYLE)
    unseen = [(drawings.names[i], UNSEEN_STYLE) for i in rng.permutation((drawings.rows[:, column] >= 0).nonzero()[:, 0].numpy())[:200]]
    unseen += [(name, style) for name in KEPT_OUT for k, style in enumerate(drawings.styles) if drawings.rows[drawings.names.index(name), k] >= 0]
    scenes = make_scenes(drawings, [{"names": [name], "style": style, "ground": str(rng.choice(list(GROUNDS)))} for name, style in unseen])
    pictures = compose(drawings, scenes, torch.Generator().manual_seed(0)).cpu()
    again = torch.cat([vae.decode(vae.encode(part.to(device)).latent_dist.mean).sample.cpu() for part in pictures.split(32)])
    error = np.square(to_uint8(pictures).astype(float) - to_uint8(again)).mean(axis=(1, 2, 3))
    return {"psnr": float((10 * np.log10(255**2 / error)).mean()), "pictures": len(pictures)}


def retrieval(eye, drawings, count=1000):
    """Recall@1 of names among all trained ones, on new renderings in trained styles."""
    generator = torch.Generator().manual_seed(SEED)
    first = drawings.trained[torch.randperm(len(drawings.trained), generator=generator)[:count]]
    scenes = plain(sample(drawings, len(first), generator, first=first, styles=CLIP_STYLES, several=(1.0, 0.0, 0.0)))
    found = eye.names(compose(drawings, scenes, generator), [drawings.names[i] for i in drawings.trained])
    return share(drawings.trained[found] == first) | {"names": len(drawings.trained)}


def grid(blocks, columns=10):
    """[[N, 3, H, W] in -1..1, ...] -> one picture. A block begins with a row of its own, and white fills up its last."""
    rows = [list(to_uint8(part)) for block in blocks for part in block.split(columns)]
    return Image.fromarray(np.concatenate([np.concatenate(row + [np.full_like(row[0], 255)] * (columns - len(row)), axis=1) for row in rows]))


def over(drawn, real):
    """What is reached of what real compositions reach; None where these reach nothing."""
    return drawn["share"] / real["share"] if real["share"] else None


def main():
    parser = argparse.ArgumentParser(description="Scores the miniature's models of P3.", formatter_class=HelpFormatter)
    parser.add_argument("--drawings", type=Path, default=DRAWINGS, metavar="NPZ", help="file that miniature.drawings render wrote")
    parser.add_argument("--clip", type=Path, default=MINI / "clip", help="folder of CLIP, the judge")
    parser.add_argument("--judge", type=Path, default=None, help="folder of a second judge")
    parser.add_argument("--sd", type=Path, default=MINI_SD, help="folder of Stable Diffusion")
    parser.add_argument("--output", type=Path, default=ROOT / "report", help="folder for results/p3_miniature.json and figures/p3_miniature.png")
    parser.add_argument("--pictures", type=int, default=200, help="per row of two subjects")
    parser.add_argument("--singles", type=int, default=1000, help="of a subject alone")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--guidance-weight", type=float, default=GUIDANCE, help="w of the guidance; diffusers' scale is 1+w")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the UNet")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_flags(args, ("pictures", "singles", "steps", "batch_size"), lambda value: value >= 1, "at least 1")
    device, drawings = pick_device(args.device), Drawings(args.drawings)
    for name in ("results", "figures"):
        writable_folder(args.output / name)
    eyes = {"clip": Eye(args.clip, device)} | ({"second judge": Eye(args.judge, device)} if args.judge else {})
    parts = load_stable_diffusion(args.sd, device)
    config = DrawConfig(num_steps=args.steps, guidance_weight=args.guidance_weight, batch_size=args.batch_size, dtype=pick_dtype(args.dtype, device))
    artist = Artist(drawings, parts, config)
    scores = {"retrieval": {judge: retrieval(eye, drawings) for judge, eye in eyes.items()},
              "autoencoder": reconstruction(parts.vae, drawings, device)}
    shown, rows = [], {"one subject": (single_subjects, args.singles), "two subjects": (pairs, args.pictures), "two colours": (colours, args.pictures)}
    for name, (measure, count) in rows.items():
        scores[name], pictures = measure(artist, eyes, count)
        shown.append(pictures[:20])
        for judge, ways in scores[name].items():
            ways["over_real"] = over(ways["drawn"], ways["real"])
            print(f"{name}, by {judge}: drawn {ways['drawn']['share']:.3f}, real {ways['real']['share']:.3f}")
    scores["seconds_per_picture"], scores["steps"], scores["guidance_weight"] = artist.seconds / artist.count, args.steps, args.guidance_weight
    save_image(grid(shown), args.output / "figures" / "p3_miniature.png")
    write_json(args.output / "results" / "p3_miniature.json", scores)
    print(f"autoencoder {scores['autoencoder']['psnr']:.2f} dB; retrieval "
          + ", ".join(f"{judge} {row['share']:.3f}" for judge, row in scores["retrieval"].items())
          + f"\n{scores['seconds_per_picture']:.3f} s a picture\nwrote results/p3_miniature.json and figures/p3_miniature.png to {args.output}")


if __name__ == "__main__":
    run(main)
