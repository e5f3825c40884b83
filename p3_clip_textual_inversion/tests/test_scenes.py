"""The miniature's world: scenes by chance and by words, their captions, and their pictures."""

import dataclasses

import numpy as np
import open_clip
import pytest
import torch

from p3_clip_textual_inversion.files import MINI, UserError
from p3_clip_textual_inversion.miniature.drawings import CONCEPTS, examples
from p3_clip_textual_inversion.miniature.painting import compose
from p3_clip_textual_inversion.miniature.scores import halves, main_colour
from p3_clip_textual_inversion.miniature.words import looks_of
from p3_clip_textual_inversion.miniature.world import (
    COLOURS,
    GROUNDS,
    KEPT_OUT,
    PATTERNS,
    RENDERINGS,
    SIDE,
    SILHOUETTES,
    STYLES,
    SUBJECTS,
    UNSEEN_STYLE,
    Captioner,
    Drawings,
    captions,
    exchanged,
    make_scenes,
    plural,
    sample,
)

NAMES = ("red-apple", "owl", "bus", "maple-leaf", "dog-face", "tractor", "automobile", "tulip", "banana", "key", "star", "fox", "cow-face", "penguin")
STILL = {"shift": 0.0, "jitter": 0, "turn": 0.0}


@pytest.fixture
def drawings(tmp_path):
    """Grey squares, half as wide as the picture, in all the sets."""
    jobs = [(name, style) for name in NAMES for style in (*STYLES, SILHOUETTES, UNSEEN_STYLE)]
    pixels = np.zeros((len(jobs), SIDE, SIDE, 4), np.uint8)
    pixels[:, 16:48, 16:48] = (128, 128, 128, 255)
    np.savez(tmp_path / "a.npz", pixels=pixels, names=np.array([name for name, _ in jobs]), styles=np.array([style for _, style in jobs]))
    return Drawings(tmp_path / "a.npz")


def pictures_of(drawings, *entries, **options):
    """In 0..255."""
    scenes = make_scenes(drawings, [{"style": "twemoji", "ground": "white"} | entry for entry in entries])
    return (compose(drawings, scenes, torch.Generator().manual_seed(0), **STILL | options) + 1) * 127.5


def test_captions_and_their_tokens_are_the_same(drawings):
    """A caption is written as tokens without being a text; the tokenizer reads the text alike. All phrases occur."""
    tokenizer = open_clip.SimpleTokenizer(str(MINI / "clip" / "bpe.txt.gz"), context_length=64)
    scenes = sample(drawings, 400, torch.Generator().manual_seed(0), rendered=0.3)
    texts = captions(drawings, scenes)
    tokens = Captioner(drawings, tokenizer.encode, tokenizer.sot_token_id, tokenizer.eot_token_id, 64)(scenes, 0)
    assert torch.equal(tokens, tokenizer(texts))
    joined = " / ".join(texts)
    for phrase in (" striped ", " teal ", "two", "three", "above", "below", "next to", "on the left", "an orange", "an owl", "maple leaves",
                   "in the style of outline"):
        assert phrase in joined
    assert "  " not in joined and not any(f"{colour} red apple" in joined for colour in COLOURS)


def test_a_scene_by_words_has_its_caption(drawings):
    entries = [{"names": ["owl", "bus"], "hues": ["teal", None], "patterns": [None, "striped"], "sizes": [None, "small"], "relation": "above"},
               {"names": ["dog-face"], "number": 3, "hues": ["orange"], "opening": True, "tell_style": True}, {"names": ["fox"], "place": "at the top"}]
    scenes = make_scenes(drawings, [entry | {"style": "noto-v1", "ground": "orange"} for entry in entries])
    assert captions(drawings, scenes) == [
        "a teal owl above a small striped bus on an orange background",
        "a drawing of three orange dog faces on an orange background in the style of noto v1", "a fox at the top on an orange background"]
    assert [plural(name) for name in ("maple-leaf", "wolf", "glasses", "butterfly", "blowfish", "peach")] == [
        "maple leaves", "wolves", "glasses", "butterflies", "blowfish", "peaches"]


def test_what_is_told_is_drawn(drawings):
    """Where a subject stands, how large and in which colour, by hand."""
    plain, teal = pictures_of(drawings, {"names": ["owl"]}, {"names": ["owl"], "hues": ["teal"]}, spread=(1.0, 1.0))
    assert (plain[:, 20:44, 20:44] - 128).abs().max() < 1 and plain[:, :14].min() > 254
    assert (teal[:, 20:44, 20:44] - torch.tensor(COLOURS["teal"])[:, None, None]).abs().max() < 2  # its mean brightness becomes the colour itself
    small, large = ((part < 250).all(0).sum().item() for part in pictures_of(drawings, *({"names": ["owl"], "sizes": [size]} for size in ("small", "large"))))
    assert 0 < 4 * small < large
    places = pictures_of(drawings, *({"names": ["owl"], "place": place} for place in ("on the left", "on the right", "at the top", "at the bottom")))
    dark = (places < 250).all(1).float()
    assert [bool(d[:, :32].sum() > d[:, 32:].sum()) for d in dark[:2]] == [True, False]
    assert [bool(d[:32].sum() > d[32:].sum()) for d in dark[2:]] == [True, False]
    three = pictures_of(drawings, {"names": ["owl"], "number": 3})[0]
    assert all((corner < 250).any() for corner in (three[:, :32, :32], three[:, :32, 32:], three[:, 32:]))


@pytest.mark.parametrize(("relation", "first", "second"), [("next to", (32, 16), (32, 48)), ("above", (16, 32), (48, 32)), ("below", (48, 32), (16, 32))])
def test_two_subjects_have_their_own_looks_and_places(drawings, relation, first, second):
    picture = pictures_of(drawings, {"names": ["owl", "bus"], "hues": ["red", "blue"], "relation": relation})[0]
    for (y, x), colour in ((first, "red"), (second, "blue")):
        assert (picture[:, y, x] - torch.tensor(COLOURS[colour])).abs().max() < 3


def test_patterns_have_two_tones_inside_the_drawing_only(drawings):
    for pattern in PATTERNS:
        picture = pictures_of(drawings, {"names": ["owl"], "patterns": [pattern]}, spread=(1.0, 1.0))[0]
        inner = picture[0, 18:46, 18:46]
        assert 0.1 < (inner > 200).float().mean() < 0.6 and 0.3 < ((inner - 128).abs() < 20).float().mean() < 0.9, pattern
        assert picture[:, :14].min() > 254


def test_renderings(drawings):
    centres = {"ink": (128,) * 3, "negative": (127,) * 3, "pastel": (204,) * 3, "stencil": (0,) * 3, "outline": (255,) * 3, "sepia": (160, 133, 95)}
    pictures = pictures_of(drawings, *({"names": ["owl"], "rendering": name} for name in RENDERINGS), spread=(1.0, 1.0))
    for name, picture in zip(RENDERINGS, pictures):
        if name in centres:
            assert (picture[:, 32, 32] - torch.tensor(centres[name])).abs().max() < 2, name
    assert pictures[RENDERINGS.index("outline")][:, 32, 14:18].min() < 60


def test_pictures_depend_on_the_generator_alone(drawings):
    scenes = sample(drawings, 12, torch.Generator().manual_seed(3), rendered=0.3)
    one, two, other = (compose(drawings, scenes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (12, 3, SIDE, SIDE) and one.isfinite().all() and one.abs().max() <= 1 + 1e-5


def test_hard_negatives_are_untrue_and_nearly_the_same(drawings):
    """Another caption each; where attributes or subjects change places, it has the very same words."""
    generator = torch.Generator().manual_seed(0)
    scenes = sample(drawings, 300, generator, several=(0.2, 0.8, 0.0))
    other, valid = exchanged(scenes, generator)
    true, untrue = captions(drawings, scenes), captions(drawings, other)
    assert valid.float().mean() > 0.9 and all(a != b for a, b, ok in zip(true, untrue, valid) if ok)
    same_words = [sorted(a.replace(" an ", " a ").split()) == sorted(b.replace(" an ", " a ").split()) for a, b, ok in zip(true, untrue, valid.tolist()) if ok]
    assert np.mean(same_words) > 0.3
    assert all(abs(len(a.split()) - len(b.split())) <= 1 for a, b, ok in zip(true, untrue, valid.tolist()) if ok)


def test_the_pixel_measure_finds_the_colours_of_both_halves(drawings):
    """On every pair of colours and every ground: what is asked of drawn pictures is not asked in vain."""
    names = list(COLOURS)
    entries = [{"names": ["owl", "bus"], "hues": [a, b], "ground": ground} for ground in list(GROUNDS)[::3] for a in names for b in names if a != b]
    scenes = make_scenes(drawings, [{"style": "twemoji"} | entry for entry in entries])
    found = [main_colour(half) for half in halves(compose(drawings, scenes, torch.Generator().manual_seed(0)))]
    right = torch.stack([found[k] == torch.tensor([names.index(entry["hues"][k]) for entry in entries]) for k in (0, 1)]).all(0)
    assert right.float().mean() > 0.97


def test_examples_differ_and_leave_only_the_concept_to_the_word(drawings):
    for look in (CONCEPTS[0], CONCEPTS[1], CONCEPTS[3]):
        entries, texts = examples(dataclasses.replace(look), np.random.default_rng(0), drawings)
        assert len(entries) == len(set(texts)) == 5 and all(text.count(look.token) == 1 for text in texts)
        told = " ".join(texts)
        for word in (look.hue, look.pattern, look.name and look.name.split("-")[0]):
            assert not word or (f" {word} {look.token}" not in told and f"{word} face" not in told)
        assert len({entry["ground"] for entry in entries}) == 5
        assert not any(word in told for word in ("left", "right", "next to"))  # learning also flips pictures


def test_concepts_by_seed(drawings):
    one, two, other = (looks_of("instances", drawings, seed, 3) for seed in (0, 0, 1))
    assert one == two and one != other and len({look.token for look in one}) == 3
    assert all(look.hue and look.pattern and look.style in STYLES for look in one)
    assert all(look.style == UNSEEN_STYLE and look.hue is None for look in looks_of("unseen", drawings, 0, 3))
    assert not {look.name for look in one} & {look.name for look in CONCEPTS}


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
