"""Which subjects stand where: by hand, with colours in the place of CLIP's features."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

from p3_clip_textual_inversion.miniature.together import CORNERS, Judge, compositions, cut_out, make_sets, pasted
from p3_clip_textual_inversion.places import strips

COLOURS = ("red", "lime", "blue", "yellow")  # the last is of the first's kind


@pytest.fixture
def judge():
    def of_pictures(pictures):  # the middle's colour
        rgb = torch.tensor([picture.getpixel((picture.width // 2, picture.height // 2)) for picture in pictures]).float()
        return torch.nn.functional.normalize(rgb - 100, dim=1)
    kinds = {"a drawing of a rose": "red", "a drawing of a leaf": "lime", "a drawing of a whale": "blue"}
    grader = types.SimpleNamespace(of_pictures=of_pictures, of_texts=lambda texts: of_pictures([Image.new("RGB", (8, 8), kinds[text]) for text in texts]))
    subjects = [types.SimpleNamespace(noun=noun) for noun in ("rose", "leaf", "whale", "rose")]
    return Judge(grader, subjects, [[Image.new("RGB", (64, 64), colour)] for colour in COLOURS], "drawing")


@pytest.mark.parametrize("boxes", [strips(2, 0), strips(2, 1), strips(3, 0), CORNERS])
def test_all_are_found_in_their_places_only(judge, boxes):
    pictures = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    own = list(range(len(boxes)))
    turned = own[::-1]
    made = [pasted([pictures[i] for i in chosen], boxes) for chosen in (own, turned, [*own[:-1], own[0]])]
    squares = cut_out(made[:1], boxes)
    assert {square.size for square in squares} == {(squares[0].width,) * 2} and squares[0].width <= 0.56 * 64
    sets = torch.tensor([own] * 3)
    assert judge.both(made, sets, boxes)["looks"].tolist() == judge.both(made, sets, boxes)["kinds"].tolist() == [True, False, False]
    assert judge.both(made, sets, None)["looks"].tolist() == [True, True, False]


def test_looks_are_more_than_the_kind(judge):
    yellow, lime = (Image.new("RGB", (64, 64), colour) for colour in ("yellow", "lime"))
    judge.texts[0] = judge.examples[3]  # CLIP takes yellow for a rose
    found = judge.both([pasted([yellow, lime], strips(2, 0))] * 2, torch.tensor([[0, 1], [3, 1]]), strips(2, 0))
    assert found["kinds"].tolist() == [True, True] and found["looks"].tolist() == [False, True]


def test_sets_have_different_kinds_and_wrong_pictures_one_other():
    subjects = [types.SimpleNamespace(noun=noun) for noun in ("rose", "leaf", "whale", "rose")]
    sets = make_sets(subjects, 20, 3, 0)
    assert sets.shape == (20, 3) and all(len({subjects[i].noun for i in own}) == 3 for own in sets.tolist()) and sets.equal(make_sets(subjects, 20, 3, 0))
    examples = [[Image.new("RGB", (64, 64), colour)] for colour in COLOURS]
    for right, wrong in zip(*compositions(examples, sets, CORNERS, np.random.default_rng(0))):
        squares = zip(cut_out([right], CORNERS), cut_out([wrong], CORNERS))
        assert sum(a.getpixel((17, 17)) != b.getpixel((17, 17)) for a, b in squares) == 1
