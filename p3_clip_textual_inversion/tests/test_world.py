"""The miniature's world: scenes, their captions, and their pictures."""

import numpy as np
import pytest
import torch

from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.world import (
    COLOURS,
    KEPT_OUT,
    RENDERINGS,
    SIDE,
    SILHOUETTES,
    STYLES,
    SUBJECTS,
    UNSEEN_STYLE,
    Drawings,
    Scene,
    compose,
    random_scene,
)

SQUARES = {"red-apple": (255, 0, 0), "owl": (0, 0, 255)}


@pytest.fixture
def drawings(tmp_path):
    """A set of centred squares, half as wide as the picture, in two styles."""
    pixels = np.zeros((4, SIDE, SIDE, 4), np.uint8)
    for row, colour in enumerate(colour for colour in SQUARES.values() for _ in range(2)):
        pixels[row, 16:48, 16:48] = (*colour, 255)
    names = [name for name in SQUARES for _ in range(2)]
    np.savez(tmp_path / "a.npz", pixels=pixels, names=np.array(names), styles=np.array(["twemoji", "noto-v1"] * 2))
    return Drawings(tmp_path / "a.npz")


def still(drawings, scenes):
    return compose(drawings, scenes, torch.Generator().manual_seed(0), shift=0, scales=(1, 1), jitter=0, turn=0)


def test_a_single_drawing_stays_as_it_is(drawings):
    picture = still(drawings, [Scene((0,), "blue", "")])[0]
    expected = torch.tensor(COLOURS["blue"])[:, None, None].repeat(1, SIDE, SIDE).float()
    expected[:, 16:48, 16:48] = torch.tensor((255.0, 0, 0))[:, None, None]
    assert (picture - (expected / 127.5 - 1)).abs().max() < 1e-5


def test_two_drawings_stand_side_by_side(drawings):
    picture = (still(drawings, [Scene((0, 2), "white", "")])[0] + 1) * 127.5
    for left, colour in ((8, (255, 0, 0)), (40, (0, 0, 255))):  # 16 pixels wide, in the middle of each half
        assert (picture[:, 25:39, left + 1:left + 15] - torch.tensor(colour).float()[:, None, None]).abs().max() < 1
        assert picture[:, 25:39, left - 4].min() > 254
    assert picture[:, :20].min() > 254 and picture[:, 44:].min() > 254


def test_pictures_depend_on_the_generator_alone(drawings):
    scenes = [Scene((0, 3), "gray", ""), Scene((1,), "pink", "")] * 3
    one, two, other = (compose(drawings, scenes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (6, 3, SIDE, SIDE) and one.min() >= -1 - 1e-5 and one.max() <= 1 + 1e-5


def test_captions_tell_what_is_there(drawings):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(rng, drawings, "owl", ("twemoji",), "red-apple", tell_style=1, tell_colour=1)
        assert scene.caption == f"an owl next to a red apple on a {scene.colour} background in the style of twemoji" and scene.rows == (2, 0)
        scene = random_scene(rng, drawings, "red-apple", ("noto-v1",), tell_style=0, tell_colour=0)
        assert scene.caption in ("a red apple", "a drawing of a red apple") and scene.rows == (1,)


def test_renderings_by_hand(drawings):
    """Tones lie on the line between their ends, a stencil keeps what is dark, an outline is drawn where the square ends; captions tell."""
    scene = random_scene(np.random.default_rng(0), drawings, "owl", ("twemoji",), tell_style=0, tell_colour=0, rendering="ink")
    assert scene.caption.endswith("owl in the style of ink") and scene.rendering == "ink"
    pictures = (still(drawings, [Scene((0,), "white", "", name) for name in (None, *RENDERINGS)]) + 1) * 127.5
    by_name = dict(zip((None, *RENDERINGS), pictures))
    centres = {None: (255, 0, 0), "ink": (76.2,) * 3, "negative": (178.8,) * 3, "stencil": (0, 0, 0), "pastel": (255, 153, 153)}
    for name, colour in centres.items():
        assert (by_name[name][:, 32, 32] - torch.tensor(colour).float()).abs().max() < 0.5, name
    assert all(picture[:, 2, 2].min() > 254 for picture in pictures)  # the ground stays
    assert by_name["outline"][:, 32, 16].max() < 1 and by_name["outline"][:, 32, 32].min() > 254
    blue = still(drawings, [Scene((2,), "white", "", "stencil"), Scene((0, 2), "white", "", "ink")])
    assert (blue[0, :, 32, 32] == -1).all() and (blue[1, 0, 32, 40] + 1) * 127.5 == pytest.approx(29.07, abs=0.5)


def test_what_is_kept_out_is_disjoint():
    assert not set(SUBJECTS) & set(KEPT_OUT) and len(set(SUBJECTS)) == len(SUBJECTS) == 131
    assert len({*STYLES, SILHOUETTES, UNSEEN_STYLE}) == 7


def test_bad_drawings_end_in_one_line(tmp_path):
    for name, content in (("no.npz", None), ("bad.npz", b"x")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot read the drawings") as error:
            Drawings(tmp_path / name)
        assert "\n" not in str(error.value)
