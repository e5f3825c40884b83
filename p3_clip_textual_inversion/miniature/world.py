"""The miniature's world: emoji as captioned pictures. One to three subjects with their looks and places, on a ground, drawn in a style; everything is made in
batches of tensors, on whatever device, so that a training never sees the same picture for long.

    drawings = Drawings("runs/emoji.npz")                                   # which `drawings render` made
    scenes = sample(drawings, 64, torch.Generator().manual_seed(0))        # what is to be seen, as tables of numbers
    pictures = compose(drawings, scenes, torch.Generator().manual_seed(0)) # float32 [64, 3, 64, 64] in -1..1
    captions(drawings, scenes)                                             # "a small striped teal dog face next to a red apple on a blue background"
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..files import UserError

SIDE, SLOTS = 64, 3  # pixels; most things in one picture
STYLES = ("twemoji", "openmoji", "fluent-emoji-flat", "emojione", "noto-v1")  # what the miniature of Stable Diffusion sees
SILHOUETTES = "fluent-emoji-high-contrast"  # Stable Diffusion learns it by textual inversion only
CLIP_STYLES = (*STYLES, SILHOUETTES)
UNSEEN_STYLE = "noto"  # nothing is trained on it: the zero-shot classes are drawn in it
KEPT_OUT = ("penguin", "panda", "unicorn")  # subjects that nothing is trained on
SUBJECTS = tuple("""
dog-face cat-face mouse-face hamster rabbit-face fox bear koala tiger-face lion cow-face pig-face frog monkey-face chicken duck eagle owl bat wolf
horse-face honeybee bug butterfly snail lady-beetle ant spider turtle snake octopus squid shrimp crab blowfish tropical-fish dolphin spouting-whale
shark crocodile elephant camel rooster cactus evergreen-tree palm-tree four-leaf-clover maple-leaf mushroom tulip rose sunflower red-apple pear
tangerine lemon banana watermelon grapes strawberry cherries peach pineapple kiwi-fruit tomato avocado eggplant carrot ear-of-corn hot-pepper
croissant bread pancakes hamburger french-fries pizza hot-dog taco egg doughnut cookie birthday-cake lollipop soft-ice-cream automobile bus
fire-engine ambulance tractor bicycle locomotive airplane rocket helicopter sailboat house castle umbrella balloon soccer-ball basketball guitar
trumpet violin drum camera television light-bulb key crown top-hat glasses t-shirt dress alarm-clock snowman star sun crescent-moon cloud fire
rainbow red-heart gem-stone bomb wrapped-gift jack-o-lantern christmas-tree ghost alien skull
""".split())  # noqa: SIM905  the everyday subjects of the miniature of Stable Diffusion
GROUNDS = {"white": (255, 255, 255), "gray": (200, 200, 200), "yellow": (250, 235, 150), "orange": (250, 200, 140), "pink": (250, 200, 215),
           "purple": (215, 195, 240), "blue": (175, 215, 250), "green": (190, 235, 190)}  # light, so that silhouettes are seen
COLOURS = {"red": (220, 35, 40), "orange": (250, 130, 10), "yellow": (245, 215, 30), "green": (50, 165, 55), "teal": (0, 155, 155), "blue": (40, 85, 225),
           "purple": (140, 55, 190), "pink": (250, 110, 175)}  # of subjects: strong
PATTERNS = ("striped", "dotted", "checked")
SIZES = ("small", "large")
PLACES = {"on the left": (-0.45, 0.0), "on the right": (0.45, 0.0), "at the top": (0.0, -0.45), "at the bottom": (0.0, 0.45)}  # of a subject alone
DRAWINGS = Path("runs/emoji.npz")  # which `drawings render` makes; trainings and scores look there
RELATIONS = ("next to", "above", "below")
NUMBERS = ("two", "three")
# Toned styles: luma from one colour to another, which is how prints, stencils and photographs differ. A model that knew only coloured emoji could not be
# taught one more style by a word, as the real one, which has seen every style, can.
TONES = {"ink": ((0, 0, 0), (255, 255, 255)), "negative": ((255, 255, 255), (0, 0, 0)), "sepia": ((70, 40, 10), (250, 225, 180)),
         "shadow": ((30, 30, 45), (60, 60, 80)), "blueprint": ((15, 40, 140), (190, 215, 255))}
RENDERINGS = (*TONES, "pastel", "stencil", "outline")  # styles made from drawings, beside the sets
LUMA = (0.299, 0.587, 0.114)


def words(name):
    """The words of a name: "four-leaf-clover" -> "four leaf clover"."""
    return name.replace("-", " ")


def plural(name):
    """The words of a name for several: "maple-leaf" -> "maple leaves"."""
    for end, several in (("leaf", "leaves"), ("wolf", "wolves"), ("mouse", "mice"), ("fly", "flies"), ("berry", "berries"), ("lady", "ladies"),
                         ("candy", "candies"), ("fish", "fish"), ("sheep", "sheep"), ("s", "s"), ("ch", "ches"), ("sh", "shes"), ("x", "xes")):
        if name.endswith(end):
            return words(name.removesuffix(end) + several)
    return words(name) + "s"


class Drawings:
    """The rendered sets. pixels: uint8 RGBA [N, 4, 64, 64]; names, styles: lists; rows: int64 [names, styles], the pixels of a name in a style, -1 for none;
    trained: the names not kept out; everyday: of which, `SUBJECTS` that are there. As numbers, both are places in `names`."""

    def __init__(self, path, device="cpu"):
        try:
            with np.load(path) as content:  # allow_pickle is off
                pixels, of_names, of_styles = (content[key] for key in ("pixels", "names", "styles"))
        except Exception as error:  # a damaged archive makes its readers raise anything
            command = f"python -m p3_clip_textual_inversion.miniature.drawings render {path}"
            raise UserError(f"cannot read the drawings {path} ({error}); {command} makes them") from None
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
        self.names, self.styles = list(dict.fromkeys(of_names.tolist())), list(dict.fromkeys(of_styles.tolist()))
        self.rows = torch.full((len(self.names), len(self.styles)), -1)
        for row, (name, style) in enumerate(zip(of_names.tolist(), of_styles.tolist())):
            self.rows[self.names.index(name), self.styles.index(style)] = row
        self.trained = torch.tensor([i for i, name in enumerate(self.names) if name not in KEPT_OUT])
        self.everyday = torch.tensor([i for i, name in enumerate(self.names) if name in SUBJECTS])
        # whose names tell a colour: "a teal red apple" would contradict itself
        self.coloured = torch.tensor([bool({*COLOURS, *GROUNDS, "black", "brown"} & set(words(name).split())) for name in self.names])


@dataclass
class Scenes:
    """A batch of pictures to compose: int64 tables on the CPU, by scene [B] or by slot [B, 3]. 0 stands for none (of `name`, whose numbers are places in
    Drawings.names, -1), k for the k-th entry of the world's tables. What is drawn and what the caption tells are two things: `tell` [B, 3, 3] (hue,
    pattern, size), `tell_ground` and `tell_style` are bool. number: 1, or how many of its only subject; opening: whether it begins "a drawing of"."""
    name: torch.Tensor
    style: torch.Tensor  # place in Drawings.styles
    ground: torch.Tensor  # place in GROUNDS
    hue: torch.Tensor
    pattern: torch.Tensor
    size: torch.Tensor
    relation: torch.Tensor  # place in RELATIONS
    place: torch.Tensor
    number: torch.Tensor
    rendering: torch.Tensor
    opening: torch.Tensor
    tell: torch.Tensor
    tell_ground: torch.Tensor
    tell_style: torch.Tensor

    def __len__(self):
        return len(self.style)

    def __getitem__(self, rows):
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


def make_scenes(drawings, entries):
    """`Scenes` by words: a dict each, {"names": [...], "style": ..., "ground": ..., and, if wanted, "hues", "patterns", "sizes": ["teal", None, ...],
    "relation", "place", "number", "rendering", "opening"}; the caption tells all of it, but the style only by "tell_style"."""
    def table(key, values, default=None):
        return torch.tensor([[1 + list(values).index(v) if v else 0 for v in [*entry.get(key, ()), *[default] * SLOTS][:SLOTS]] for entry in entries])

    def column(key, values, default=None):
        return torch.tensor([list(values).index(entry.get(key, default)) for entry in entries])

    none = (None,)
    return Scenes(
        torch.tensor([[*(drawings.names.index(name) for name in entry["names"]), -1, -1][:SLOTS] for entry in entries]),
        column("style", drawings.styles), column("ground", GROUNDS), table("hues", COLOURS), table("patterns", PATTERNS), table("sizes", SIZES),
        column("relation", RELATIONS, RELATIONS[0]), column("place", (*none, *PLACES)), torch.tensor([entry.get("number", 1) for entry in entries]),
        column("rendering", (*none, *RENDERINGS)), torch.tensor([entry.get("opening", False) for entry in entries]),
        torch.ones(len(entries), SLOTS, 3, dtype=torch.bool), torch.tensor([entry.get("tell_ground", True) for entry in entries]),
        torch.tensor([entry.get("tell_style", False) for entry in entries]))


def sample(drawings, count, generator, names=None, styles=STYLES, rendered=0.0, several=(3 / 8, 1 / 2, 1 / 8), looks=0.5, tell=0.85, tell_ground=0.6,
           tell_style=0.4, first=None):
    """Random scenes. names: numbers to choose from (default: the everyday ones); first: [count] the first subjects, where they are given.

    several: the shares of scenes with one, two, three subjects; looks: the share of subjects with a hue, and with a pattern; tell: the share of looks that
    the caption tells; rendered: the share of scenes in one of `RENDERINGS`, which leave no hue and are always told."""
    def chance(share, *shape):
        return torch.rand(count, *shape, generator=generator) < share

    def whole(high, *shape):
        return torch.randint(0, high, (count, *shape), generator=generator)

    names = drawings.everyday if names is None else names
    subjects = torch.multinomial(torch.tensor(several), count, replacement=True, generator=generator) + 1
    name = names[torch.rand(count, len(names), generator=generator).topk(min(SLOTS, len(names)), dim=1).indices]
    name = torch.cat([name, name[:, :1].expand(-1, SLOTS - name.shape[1])], 1)
    if first is not None:
        name[:, 0] = first
        name[:, 1:] = torch.where(name[:, 1:] == first[:, None], name[:, 1:].roll(1, 0), name[:, 1:])
    there = torch.arange(SLOTS) < subjects[:, None]
    alone = subjects == 1
    columns = torch.tensor([drawings.styles.index(style) for style in styles if style in drawings.styles])
    drawn = drawings.rows[name][..., columns] >= 0
    both = (drawn | ~there[..., None]).all(1)
    style = columns[torch.multinomial(both.float() + 1e-9, 1, generator=generator)[:, 0]]
    rendering = torch.where(chance(rendered), 1 + whole(len(RENDERINGS)), 0)
    hue = (1 + whole(len(COLOURS), SLOTS)) * chance(looks, SLOTS) * ~drawings.coloured[name] * (rendering == 0)[:, None]
    number = torch.where(alone & chance(0.2), 2 + whole(2), 1)
    place = torch.where(alone & (number == 1) & chance(0.3), 1 + whole(len(PLACES)), 0)
    size = (1 + whole(2, SLOTS)) * chance(0.35, SLOTS)
    size[:, 0] = torch.where((place > 0) & (size[:, 0] == 2) | (number > 1), 0, size[:, 0])  # a large one has no place to be at
    pattern = (1 + whole(len(PATTERNS), SLOTS)) * chance(0.6 * looks, SLOTS)
    return Scenes(torch.where(there, name, -1), style, whole(len(GROUNDS)), hue * there, pattern * there, size * there,
                  torch.where(subjects == 3, 0, whole(len(RELATIONS)) * chance(0.75)), place, number, rendering, alone & chance(0.5),
                  chance(tell, SLOTS, 3), chance(tell_ground), chance(tell_style) | (rendering > 0))


# ------------------------------------------------------------------ captions

def pieces_of(drawings):
    """Every phrase that a caption is made of, the empty one first, and {kind: where its phrases begin}."""
    kinds = {"none": [""], "opening": ["a drawing of"], "article": ["a", "an", *NUMBERS], "size": SIZES, "pattern": PATTERNS, "hue": COLOURS,
             "name": map(words, drawings.names), "names": map(plural, drawings.names), "relation": RELATIONS, "place": PLACES,
             "ground": [f"on {'an' if name[0] in 'aeiou' else 'a'} {name} background" for name in GROUNDS],
             "style": [f"in the style of {words(name)}" for name in (*drawings.styles, *RENDERINGS)]}
    pieces, starts = [], {}
    for kind, phrases in kinds.items():
        starts[kind] = len(pieces)
        pieces += phrases
    return pieces, starts


def phrases(drawings, scenes, pieces, starts):
    """int64 [B, S]: each caption as places in `pieces`, 0 where there is nothing to tell."""
    vowel = torch.tensor([piece[:1] in tuple("aeiou") for piece in pieces])
    hue, pattern, size = (getattr(scenes, key) * scenes.tell[..., k] for k, key in enumerate(("hue", "pattern", "size")))
    told = [torch.where(scenes.opening, starts["opening"], 0)]
    subjects = (scenes.name >= 0).sum(1)
    for slot in range(SLOTS):
        there = slot < subjects
        if slot:  # of three, the third stands below the first two
            relation = torch.where(subjects == 3, slot - 1, scenes.relation)
            told.append(torch.where(there, starts["relation"] + relation, 0))
        several = scenes.number > 1 if slot == 0 else torch.zeros_like(there)
        name = torch.where(several, starts["names"], starts["name"]) + scenes.name[:, slot]
        looks = [torch.where((kind[:, slot] > 0) & there, starts[key] + kind[:, slot] - 1, 0)
                 for key, kind in (("size", size), ("pattern", pattern), ("hue", hue))]
        following = torch.where(looks[0] > 0, looks[0], torch.where(looks[1] > 0, looks[1], torch.where(looks[2] > 0, looks[2], name)))
        article = starts["article"] + torch.where(several, scenes.number, vowel[following].long())
        told += [torch.where(there, article, 0), *looks, torch.where(there, name, 0)]
    told.append(torch.where(scenes.place > 0, starts["place"] + scenes.place - 1, 0))
    told.append(torch.where(scenes.tell_ground, starts["ground"] + scenes.ground, 0))
    style = torch.where(scenes.rendering > 0, len(drawings.styles) + scenes.rendering - 1, scenes.style)
    return torch.stack([*told, torch.where(scenes.tell_style, starts["style"] + style, 0)], 1)


def captions(drawings, scenes):
    """The captions as texts."""
    pieces, starts = pieces_of(drawings)
    return [" ".join(pieces[i] for i in row if i) for row in phrases(drawings, scenes, pieces, starts).tolist()]


class Captioner:
    """The captions as tokens, without writing a text. tokenize: the tokens of a text, as a list; start, end: the tokens around them."""

    def __init__(self, drawings, tokenize, start, end, context, device="cpu"):
        self.drawings, self.start, self.end, self.context, self.device = drawings, start, end, context, device
        self.pieces, self.starts = pieces_of(drawings)
        tokens = [list(tokenize(piece)) for piece in self.pieces]
        longest = max(map(len, tokens))
        self.table = torch.tensor([row + [-1] * (longest - len(row)) for row in tokens], device=device)

    def __call__(self, scenes, pad):
        """int64 [B, context]; pad: the token behind the end (CLIP pads with zeros, Stable Diffusion with ends)."""
        rows = phrases(self.drawings, scenes, self.pieces, self.starts).to(self.device, non_blocking=True)
        tokens = self.table[rows].flatten(1)
        order = (tokens < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :self.context - 2]
        tokens = F.pad(tokens.gather(1, order), (1, 1), value=self.start)
        length = (tokens >= 0).sum(1) - 1  # where the end comes
        at = torch.arange(self.context, device=self.device)
        tokens = F.pad(tokens, (0, self.context - tokens.shape[1]), value=-1) if tokens.shape[1] < self.context else tokens
        return torch.where(at < length[:, None], tokens, torch.where(at == length[:, None], self.end, pad))


def exchanged(scenes, generator):
    """(scenes whose captions have almost the same words and are untrue, bool [B] where there is one): attributes or subjects change places, or one is
    another. What CLIP must tell apart, if it is to judge which attribute belongs to which subject. To be captioned, not drawn."""
    count = len(scenes)
    two = (scenes.name[:, 1] >= 0) & (scenes.name[:, 0] != scenes.name[:, 1])
    tables = {"hue": len(COLOURS), "pattern": len(PATTERNS), "size": len(SIZES)}
    choices, valid = [], []
    for k, (key, high) in enumerate(tables.items()):
        values, told = getattr(scenes, key), getattr(scenes, key) * scenes.tell[..., k]
        swapped, tell = values.clone(), scenes.tell.clone()
        swapped[:, :2], tell[:, :2, k] = values[:, :2].flip(1), scenes.tell[:, :2, k].flip(1)
        choices.append({key: swapped, "tell": tell})
        valid.append(two & (told[:, 0] != told[:, 1]) & ((told[:, :2] > 0) | (values[:, :2] == 0)).all(1))
        other = values.clone()
        other[:, 0] = 1 + (values[:, 0] - 1 + torch.randint(1, high, (count,), generator=generator)) % high
        choices.append({key: other})
        valid.append(told[:, 0] > 0)
    name = scenes.name.clone()
    name[:, :2] = scenes.name[:, :2].flip(1)
    choices.append({"name": name})
    valid.append(two)
    choices.append({"relation": torch.where(scenes.relation > 0, 3 - scenes.relation, 0)})
    valid.append(two & (scenes.name[:, 2] < 0) & (scenes.relation > 0))
    for key, high, told in (("ground", len(GROUNDS), scenes.tell_ground), ("place", len(PLACES), scenes.place > 0)):
        low = int(key == "place")
        values = getattr(scenes, key)
        choices.append({key: low + (values - low + torch.randint(1, high, (count,), generator=generator)) % high})
        valid.append(told)
    valid = torch.stack(valid, 1)
    pick = torch.multinomial(valid.float() + 1e-9, 1, generator=generator)[:, 0]
    result = {}
    for field in fields(scenes):
        value = getattr(scenes, field.name)
        for k, choice in enumerate(choices):
            if field.name in choice:
                value = torch.where((pick == k).reshape(-1, *[1] * (value.ndim - 1)), choice[field.name], value)
        result[field.name] = value
    return replace(scenes, **result), valid.any(1)
