"""Regions: what a prompt's words tell, what a cross-attention does in a box, and that pictures with them are still what their settings say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from p3_clip_textual_inversion import inference
from p3_clip_textual_inversion.diffusion import Guided, make_alpha_bar
from p3_clip_textual_inversion.embedding import save_embedding
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.inference import DrawConfig, encoded, generate, guidance_and_noise
from p3_clip_textual_inversion.model import load_stable_diffusion
from p3_clip_textual_inversion.places import AUTO, LEARNED, PLACES, arranged, check_regions, plan, read_regions, regions_of
from p3_clip_textual_inversion.provenance import read_made
from p3_clip_textual_inversion.regions import WATCHED, Bounded, Regional, cover, plans_of, regional, texts_of

PACKAGE = "p3_clip_textual_inversion"
A, B = "<new1> <new1>_1", "<new3>"
LEFT, RIGHT, TOP, BOTTOM = PLACES.values()


@pytest.mark.parametrize("prompt, expected", [
    (f"a {A} next to a {B}", [(f"a {A}", LEFT), (f"a {B}", RIGHT)]),
    (f"a photo of a {A} beside a cat on a hill in the style of <new2>", [(f"a {A}", LEFT), ("a cat", RIGHT)]),
    (f"A {A} on the right and a {B} on the left.", [(f"A {A}", RIGHT), (f"a {B}", LEFT)]),
    (f"a {A} to the right of a {B} at the beach", [(f"a {A}", RIGHT), (f"a {B}", LEFT)]),
    (f"a {A} below a house", [(f"a {A}", BOTTOM), ("a house", TOP)]),
    (f"a cat next to a dog next to a {A}, oil", [("a cat", (0, 0, 1 / 3, 1)), ("a dog", (1 / 3, 0, 2 / 3, 1)), (f"a {A}", (2 / 3, 0, 1, 1))]),
    (f"a {A} and a {B} in a garden with trees and flowers", [(f"a {A}", None), (f"a {B}", None)]),
    (f"a {A}, a {B}, and a <new2> at sea", [(f"a {A}", None), (f"a {B}", None), ("a <new2>", None)]),
    (f"a {A} & {B}", [(f"a {A}", None), (B, None)]), (f"a cat, and a {A}", [("a cat", None), (f"a {A}", None)]),
    (f"a {A} dog and a {B} cat on a hill", [(f"a {A} dog", None), (f"a {B} cat", None)]), (f"{A} dog and a cat", [(f"{A} dog", None), ("a cat", None)]),
    (f"a {A} on the left of a {B}", [(f"a {A}", LEFT), (f"a {B}", RIGHT)]), (f"a {A} on the right of a cat", [(f"a {A}", RIGHT), ("a cat", LEFT)]),
    (f"a {A} on top of a car", [(f"a {A}", TOP), ("a car", BOTTOM)]),
    (f"a {A} beside a {B} near a forest", [(f"a {A}", LEFT), (f"a {B}", RIGHT)]), (f"a {A} and a {B} side by side", [(f"a {A}", None), (f"a {B}", None)]),
    (f"a {A} and a {B} sitting beside it", [(f"a {A}", None), (f"a {B}", None)]), (f"a {A} sitting next to a {B}", [(f"a {A}", LEFT), (f"a {B}", RIGHT)]),
    (f"a {A} next to a painting", [(f"a {A}", LEFT), ("a painting", RIGHT)]),
    (f"A {A} wearing {B}.", []), (f"A {A} in a {B}", []), (f"a {A} chasing a {B}", []), (f"a {A} with a {B} in <new2> style", []),  # no halves of a picture
    (f"a {A} on a beach, a boat next to a tree, a {B}", []), (f"a black and white {A}", []), (f"a red apple on the left and a {A}", []),
    (f"a {A} on a hill", []), (f"a {A} on the left", []), ("a house in the style of <new2>", []), (f"a photo of {A} in style of <new2>", []),
    (f"A {A} on the left and a {B} on the right in a <new2> <new2>_1 style", [(f"A {A}", LEFT), (f"a {B}", RIGHT)]), ("bread and butter", [])])
def test_what_the_words_of_a_prompt_tell(prompt, expected):
    found = plan(prompt, AUTO, [A, B, "<new2>"])
    assert [(thing, box) for _, box, _, thing in found] == [(thing, box and pytest.approx(box)) for thing, box in expected]
    assert all(region.before + region.thing == prompt[:len(region.before + region.thing)] for region in found)


@pytest.mark.parametrize("prompt, things", [
    (f"a {A} next to a {B}", [f"a {A}", f"a {B}"]), (f"A {A} on the right and a {B} on the left.", [f"A {A}", f"a {B}"]),
    (f"a {A} and a {B} on a hill", [f"a {A}", f"a {B}"]), (f"a {A} beside a lake", []), (f"A {A} under a tree.", []),
    (f"a {A} on top of a wooden floor", []), (f"a {A} next to a cat", []), ("a cat next to a dog", [])])
def test_scenery_has_no_region_where_nobody_asked(prompt, things):
    assert [thing for *_, thing in plan(prompt, LEARNED, [A, B])] == things


def test_each_region_is_told_of_its_thing_in_every_place():
    told = [text for text, *_ in plan(f"a photo of a {A} next to a cat on a hill in the style of <new2>", AUTO, [A, "<new2>"])]
    assert told == [f"a photo of a {A} next to a {A} on a hill in the style of <new2>", "a photo of a cat next to a cat on a hill in the style of <new2>"]
    boxes = (("<new1>", (0, 0, 0.5, 1)), ("<new1>", (0.5, 0, 1, 1)), ("hat", (0, 0, 1, 0.2)), ("dog", (0, 0, 1, 1)))
    assert [(box, thing) for _, box, _, thing in plan("a <new1> and a <new1> under the hat of dogs", boxes)] == [
        ((0, 0, 0.5, 1), "a <new1>"), ((0.5, 0, 1, 1), "a <new1>"), ((0, 0, 1, 0.2), "the hat")]  # a name twice: in turn; "dog" is no word of it


@pytest.mark.parametrize("names, told", [
    (["cat", "dog"], ["a black cat next to a cat", "a black dog next to a dog"]),
    (["black cat", "dog"], ["a black cat next to a black cat", "a dog next to a dog"]),
    (["cat", "black cat"], ["a black cat next to a dog"]), (["dog"], ["a black cat next to a dog"])])
def test_a_thing_keeps_one_article_wherever_it_is_told(names, told):
    found = plan("a black cat next to a dog", [(name, LEFT) for name in names])
    assert [text for text, *_ in found] == told
    if len(names) > len(told):  # what has no place of its own is not passed over in silence
        with pytest.raises(UserError, match="'cat' is in none of the prompts"):
            check_regions([(name, LEFT) for name in names], ["a black cat next to a dog"])


def test_what_the_flag_says():
    assert read_regions(None) == read_regions(["none"]) == () and read_regions(["auto"]) == AUTO and regions_of(read_regions(["learned"])) == LEARNED
    found = read_regions(["<new1>=0,0.2,0.5,1", "a=b=0.5,0,1,1"])
    assert found == (("<new1>", (0, 0.2, 0.5, 1)), ("a=b", (0.5, 0, 1, 1)))
    assert regions_of(json.loads(json.dumps(found))) == found
    check_regions(found[:1], ["a <new1>"])
    with pytest.raises(UserError, match="'new1' is in none of the prompts"):
        check_regions([("new1", LEFT)], ["a <new1>"])  # part of a word is no word


def test_things_are_arranged_as_they_lie():
    assert arranged([(0.8, 0.5), (0.2, 0.6)]) == [RIGHT, LEFT] and arranged([(0.5, 0.1), (0.6, 0.9)]) == [TOP, BOTTOM]
    assert arranged([(0.5, 0), (0.9, 0), (0.1, 0)])[1] == pytest.approx((2 / 3, 0, 1, 1))


def test_the_share_of_a_place_that_lies_in_a_box():
    assert torch.equal(cover((0, 0, 0.5, 1), 2), torch.tensor([1.0, 0, 1, 0]))
    assert torch.allclose(cover((0.25, 0, 1, 0.5), 1), torch.tensor([0.375]))  # at the coarsest layer: its area
    assert torch.allclose(cover((0.25, 0.5, 1, 1), 4).view(4, 4), torch.tensor([[0.0] * 4] * 2 + [[0, 1, 1, 1]] * 2))


def test_attention_is_bounded_by_hand():
    """The layer gives back what it reads: 1 of the whole prompt; of regions 10 and 100, where they are, and shared where both are."""
    def stock(attn, hidden, text, *_):
        return text.mean((1, 2))[:, None, None].expand(len(hidden), hidden.shape[1], 1).clone()

    hidden, text = torch.zeros(4, 4, 1), torch.ones(4, 3, 5)  # two pictures and their unconditional halves, 2x2 places
    turns = [(torch.tensor([0, 1]), torch.stack([torch.full((3, 5), 10.0)] * 2), [LEFT, (0, 0, 1, 1)]),
             (torch.tensor([1]), torch.full((1, 3, 5), 100.0), [RIGHT])]
    out = Bounded(stock, turns)(None, hidden, text)[..., 0]
    assert torch.equal(out, torch.tensor([[10.0, 1, 10, 1], [10, 55, 10, 55], [1, 1, 1, 1], [1, 1, 1, 1]]))


@pytest.fixture(scope="module")
def parts(tiny_sd):
    parts = load_stable_diffusion(tiny_sd)
    for name, module in parts.unet.named_modules():  # untrained layers next to ignore what they read
        if name.endswith(("attn2.to_v", "attn2.to_q", "attn2.to_k")):
            module.weight.data.mul_(8)
    return parts


PROMPTS = ["a dog next to a red car", "a cat on the hill", "a red car and a dog", "two houses below a river"]


def pictures(parts, batch_size, prompts=PROMPTS, **options):
    config = DrawConfig(**{"num_steps": 3, "guidance_weight": 2.0, "batch_size": batch_size} | options)
    return list(generate(parts, prompts, [str(PROMPTS.index(prompt)) for prompt in prompts], config, plans_of(prompts, config, {"dog": 1})))


def test_pictures_with_regions_do_not_depend_on_their_batch(parts):
    """Of prompts with told places, with none to tell, watched, and of other numbers of things, beside each other."""
    alone, together = pictures(parts, 1, regions=AUTO), pictures(parts, 4, regions=AUTO)
    plain = pictures(parts, 4)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(alone, together))
    changed = [np.abs(a.astype(int) - b).max() for a, b in zip(together, plain)]
    assert changed[1] == 0 and min(changed[0], changed[2], changed[3]) > 1, changed


def test_without_regions_nothing_is_touched(parts):
    assert regional(parts, [(), ()], {}) is Guided and plans_of(PROMPTS, DrawConfig(), {}) == {}
    stock = [module.processor for name, module in parts.unet.named_modules() if name.endswith("attn2")]
    pictures(parts, 4, regions=AUTO)
    assert stock == [module.processor for name, module in parts.unet.named_modules() if name.endswith("attn2")]  # and put back


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_that_begin_late_are_watched_at_the_first(parts, steps):
    """DDIM's four leading steps begin at t = 751, where none is watched otherwise."""
    drawn, plain = (pictures(parts, 4, regions=regions, sampler="ddim", num_steps=steps) for regions in (AUTO, ()))
    assert len(drawn) == len(PROMPTS) and (steps == 1 or (drawn[2] != plain[2]).any())


def test_the_attention_of_the_first_steps_places_what_no_word_does(parts, monkeypatch):
    config = DrawConfig(regions=AUTO, guidance_weight=2.0)
    plans = plans_of(PROMPTS, config, {"dog": 1})
    with torch.inference_mode():
        hidden = encoded(parts, [*PROMPTS, *texts_of(plans)])
        cond = torch.stack([hidden[prompt] for prompt in PROMPTS])
        model, noise = guidance_and_noise(parts, cond, "abcd", config, regional(parts, [plans.get(prompt, ()) for prompt in PROMPTS], hidden))
        x = noise()
        model.eps(x, int(1000 * WATCHED) + 1)
        seen = [len(point) for thing in model.points for point in thing]
        assert seen == [0, 0, 16, 16, 0, 0] and [rows.tolist() for rows, *_ in model.turns] == [[0, 3], [0, 3]]  # each layer; none is placed yet
        assert parts.tokenizer.convert_ids_to_tokens(parts.tokens(PROMPTS[2:3])[0][model.tokens[2][1]]) == ["a</w>", "dog</w>"]
        model.points[2] = [[(0.1, 0.9)], [(0.2, 0.1)]]
        model.eps(x, int(1000 * WATCHED) - 1)
    assert [box for _, box, _ in model.pictures[2]] == [BOTTOM, TOP] and model.turns[0][0].tolist() == [0, 2, 3]


def test_a_guidance_interval_and_a_negative_prompt(echo, parts):
    states = [torch.full((1, 3, 5), value) for value in (1.0, 0.5)]
    model = Guided(echo, make_alpha_bar(), *states, 3.0, interval=(0.1, 0.5))
    x = torch.zeros(1, 4, 8, 8)
    assert [model.eps(x, t).mean().item() for t in (99, 100, 500, 501)] == [1.0, 2.5, 2.5, 1.0]
    assert Guided(echo, make_alpha_bar(), *states, 3.0).eps(x, 999).mean() == 2.5
    config = DrawConfig(guidance_weight=2.0, negative_prompt="a cat")
    model, _ = guidance_and_noise(parts, parts.encode_text(["a dog"]), "a", config)
    assert torch.equal(model.both[1:], parts.encode_text(["a cat"]))
    text = torch.zeros(1, 3, 5)
    bounded = Regional(echo, make_alpha_bar(), *states, 3.0, interval=(0.1, 0.5), pictures=[[(text[0], LEFT, [1])]])
    assert bounded.eps(x, 700).mean() == 1.0


@pytest.mark.parametrize("flags, told", [
    ([], {}), (["--negative-prompt", "a <new2> cat"], {"negative_prompt": "a <new2> cat"}),
    (["--guidance-interval", "0.2", "0.9"], {"guidance_interval": [0.2, 0.9]}),
    (["--regions", "auto"], {"regions": "auto"}), (["--regions", "hill=0,0.5,1,1", "<new1>=0,0,0.5,1"],
                                                  {"regions": [["hill", [0, 0.5, 1, 1]], ["<new1>", [0, 0, 0.5, 1]]]})])
def test_pictures_tell_what_moved_them_and_are_drawn_again(call, concepts_json, tiny_sd, tmp_path, flags, told):
    content = json.loads(concepts_json.read_text())
    content["0"]["prompt"] = ["a <new1> on a hill", "a <new1> and a car"]
    concepts_json.write_text(json.dumps(content))
    (tmp_path / "words").mkdir()
    for i in (1, 2):
        save_embedding(tmp_path / "words" / f"{i}.safetensors", f"<new{i}>", torch.randn(2, 32, generator=torch.Generator().manual_seed(i)))
    code, out, err = call(f"{PACKAGE}.inference", concepts_json, tmp_path / "out", tiny_sd, "--embeddings", tmp_path / "words", "--num-images=1", "--steps=2",
                          "--dtype=fp32", *flags)
    assert code == 0, err
    picture = tmp_path / "out" / "0" / "1" / "source0_prompt1_0.png"
    made = read_made(picture)
    assert {name: value for name, value in made["settings"].items() if name in inference.OPTIONAL} == told
    assert set(made["of"]["words"]) == ({"<new1>", "<new2>"} if "negative_prompt" in told else {"<new1>"})
    assert ("regions of 'a <new1> and a car': " in out) == ("regions" in told)
    code, out, err = call(f"{PACKAGE}.redraw", picture, "--output", tmp_path / "again.png")
    assert code == 0 and "byte for byte" in out, out + err


def test_what_a_picture_tells_is_checked():
    told = DrawConfig(regions=(("a", LEFT),)).told()
    assert DrawConfig.of_told(json.loads(json.dumps(told)), 3) == DrawConfig(regions=(("a", LEFT),), batch_size=3)
    assert DrawConfig.of_told(DrawConfig().told(), 8) == replace(DrawConfig(), batch_size=8)
    for name, value in (("regions", [["a", [0, 0, 2, 1]]]), ("regions", 3), ("guidance_interval", [1, 0]), ("dtype", "fp5")):
        with pytest.raises((UserError, LookupError, TypeError, ValueError)):
            DrawConfig.of_told(told | {name: value}, 1)
