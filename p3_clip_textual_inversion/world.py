"""The miniature's world: emoji as captioned pictures. A subject (its English name) drawn in a style (the set it is from), alone or beside another.

`make_mini drawings` renders the sets once, to an .npz of RGBA drawings; pictures are composed from them afresh at every training step.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .files import UserError

SIDE = 64
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
COLOURS = {"white": (255, 255, 255), "gray": (200, 200, 200), "yellow": (250, 235, 150), "orange": (250, 200, 140), "pink": (250, 200, 215),
           "purple": (215, 195, 240), "blue": (175, 215, 250), "green": (190, 235, 190)}  # grounds: light, so that silhouettes are seen


def luma(rgba):
    """Brightness [N, 1, H, W] of drawings [N, 4, H, W], in 0..255 alike."""
    return (rgba[:, :3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def toned(dark, light):
    """A rendering: luma from one colour to another, which is how prints, stencils and photographs differ."""
    def render(rgba):
        share = luma(rgba) / 255
        ends = [torch.tensor(colour, dtype=torch.float32)[:, None, None] for colour in (dark, light)]
        return torch.cat([ends[0] + share * (ends[1] - ends[0]), rgba[:, 3:]], dim=1)
    return render


def stencil(rgba):
    """Black where the drawing is dark or coloured, a hole where it is light."""
    hole = ((luma(rgba) - 150) / 40).clamp(0, 1)
    return torch.cat([torch.zeros_like(rgba[:, :3]), rgba[:, 3:] * (1 - hole)], dim=1)


def outline(rgba):
    """Black where brightness or cover change, a hole elsewhere."""
    cover = rgba[:, 3:] / 255
    levels = torch.cat([luma(rgba) / 255 * cover, cover], dim=1)
    change = (F.max_pool2d(levels, 3, 1, 1) + F.max_pool2d(-levels, 3, 1, 1)).amax(1, keepdim=True)  # the largest less the smallest around
    return torch.cat([torch.zeros_like(rgba[:, :3]), 255 * (2 * change).clamp(0, 1)], dim=1)


# Further styles, made from drawings [N, 4, 64, 64] in 0..255, that the miniature of Stable Diffusion sees: a model that knew only coloured emoji could not
# be taught one more style by a word, as the real one, which has seen every style, can.
RENDERINGS = {
    "ink": toned((0, 0, 0), (255, 255, 255)), "negative": toned((255, 255, 255), (0, 0, 0)), "sepia": toned((70, 40, 10), (250, 225, 180)),
    "pastel": lambda rgba: torch.cat([rgba[:, :3] * 0.4 + 153, rgba[:, 3:]], dim=1), "shadow": toned((30, 30, 45), (60, 60, 80)),
    "blueprint": toned((15, 40, 140), (190, 215, 255)), "stencil": stencil, "outline": outline,
}


def words(name):
    """The words of a name: "four-leaf-clover" -> "four leaf clover"."""
    return name.replace("-", " ")


def drawing_of(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {words(name)}"


class Drawings:
    """The rendered sets. pixels: uint8 RGBA [N, 64, 64, 4]; table: {name: {style: row of pixels}}; trained: the names not kept out."""

    def __init__(self, path):
        try:
            with np.load(path) as content:  # allow_pickle is off
                self.pixels, names, styles = (content[key] for key in ("pixels", "names", "styles"))
        except Exception as error:  # a damaged archive makes its readers raise anything
            raise UserError(f"cannot read the drawings {path} ({error}); python -m p3_clip_textual_inversion.make_mini drawings {path} makes them") from None
        self.table = {}
        for row, (name, style) in enumerate(zip(names.tolist(), styles.tolist())):
            self.table.setdefault(name, {})[style] = row
        self.trained = [name for name in self.table if name not in KEPT_OUT]


@dataclass
class Scene:
    """One picture to compose: rows of drawings (one, or two side by side), the ground's colour, its caption, and the rendering, if any."""
    rows: tuple
    colour: str
    caption: str
    rendering: str | None = None


def vocabulary_of(drawings):
    """Every word that a caption may have, as texts."""
    return [*map(words, drawings.table), *map(words, CLIP_STYLES), *COLOURS, "a an drawing of on background in the style next to"]


def random_scene(rng, drawings, name, styles, other=None, tell_style=0.5, tell_colour=0.5, rendering=None):
    """A scene of `name` (beside `other`, if given) in one of the styles, its caption telling style and ground now and then, a rendering always."""
    names = [n for n in (name, other) if n is not None]
    common = [style for style in styles if all(style in drawings.table[n] for n in names)]
    style, colour = rng.choice(common), rng.choice(list(COLOURS))
    caption = " next to ".join(drawing_of(n) for n in names)
    if rng.random() < 0.5 and other is None:
        caption = f"a drawing of {caption}"
    if rng.random() < tell_colour:
        caption += f" on a {colour} background"
    if rendering or rng.random() < tell_style:
        caption += f" in the style of {rendering or words(str(style))}"
    return Scene(tuple(drawings.table[n][str(style)] for n in names), str(colour), caption, rendering)


def compose(drawings, scenes, generator, shift=0.08, scales=(0.75, 1.0), jitter=12, turn=0.1):
    """Pictures [B, 3, 64, 64] in -1..1 of scenes: each drawing shifted, scaled and turned a little, on its jittered ground.

    generator: of torch, on the CPU. shift: largest, as a share of the side; turn: largest, in radians; jitter: largest, in grey levels."""
    count = len(scenes)
    ground = torch.tensor([COLOURS[scene.colour] for scene in scenes], dtype=torch.float32)
    picture = (ground + uniform(generator, (count, 3), -jitter, jitter)).clamp(0, 255)[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    two = torch.tensor([len(scene.rows) == 2 for scene in scenes])
    for place in (0, 1):
        scale, angle = uniform(generator, (count,), *scales), uniform(generator, (count,), -turn, turn)
        x, y = uniform(generator, (2, count), -shift, shift)
        for pair, where in ((True, two.nonzero()[:, 0]), (False, (~two).nonzero()[:, 0])):
            if len(where) == 0 or (place == 1 and not pair):
                continue
            rgba = torch.from_numpy(drawings.pixels[[scenes[i].rows[place] for i in where]]).permute(0, 3, 1, 2).float()
            for name, render in RENDERINGS.items():
                chosen = torch.tensor([scenes[i].rendering == name for i in where])
                if chosen.any():
                    rgba[chosen] = render(rgba[chosen])
            alpha = rgba[:, 3:] / 255
            premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)
            if pair:  # half as large, each in the middle of its half; reduced first, so that sampling skips nothing
                premultiplied = F.avg_pool2d(premultiplied, 2)
                moved = place_drawing(premultiplied, 0.5 * scale[where], angle[where], 0.5 * x[where] + (place - 0.5), y[where])
            else:
                moved = place_drawing(premultiplied, scale[where], angle[where], x[where], y[where])
            picture[where] = moved[:, :3] + (1 - moved[:, 3:]) * picture[where]
    return picture / 127.5 - 1


def place_drawing(images, scale, angle, x, y):
    """Images [B, C, h, w], scaled, turned, and moved to (x, y), where -1..1 spans the picture: [B, C, 64, 64]."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, sin, -cos * x - sin * y], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)], 1)
    grid = F.affine_grid(theta, [len(images), images.shape[1], SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def uniform(generator, shape, low, high):
    return low + (high - low) * torch.rand(shape, generator=generator)
