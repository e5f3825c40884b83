"""Several concepts: joint training, Custom Diffusion and its merging, and the score."""

import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.custom_diffusion import merge, read_projections, save_projections, set_projections, weights_of
from p3_clip_textual_inversion.embedding import file_of, initial_rows, save_embedding
from p3_clip_textual_inversion.experiments import several
from p3_clip_textual_inversion.experiments.finders import half_crops, most_typical_last, paste_side_by_side
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.words import gather
from p3_clip_textual_inversion.inference import DrawConfig, generate
from p3_clip_textual_inversion.measures import drift, wilson
from p3_clip_textual_inversion.model import load_stable_diffusion

PACKAGE = "p3_clip_textual_inversion"


def test_joint_custom_diffusion_trains_every_word_and_every_projection(call, concepts_json, tiny_sd, tmp_path):
    """A published implementation never moves the last concept."""
    arguments = [concepts_json, "--checkpoint", tiny_sd, "--output", tmp_path, "--joint", "--custom-diffusion", "--steps=6", "--batch-size=4", "--crops=2",
                 "--sample-every=0", "--dtype=fp32", "--prior=2", "--vectors=1", "--lr-projections=1e-3", "--norm=free"]
    code, out, err = call(f"{PACKAGE}.train", *arguments)
    assert code == 0 and f" --projections {tmp_path / '0+1' / 'projections.safetensors'}\n" in out, err
    parts, learned = load_stable_diffusion(tiny_sd), gather([tmp_path], [])[0]
    for word, source in (("<new1>", "dog"), ("<new2>", "red car")):
        assert (learned[word] - initial_rows(parts, source, 1)).abs().max() > 1e-3
    before, after = weights_of(parts.unet), load_file(tmp_path / "0+1" / "projections.safetensors")
    assert before.keys() == after.keys() and len(after) == 2 * 16
    assert all((before[name] - after[name]).abs().max() > 1e-5 for name in before)
    everything_else = {name: tensor.clone() for name, tensor in parts.unet.state_dict().items() if name not in after}
    set_projections(parts.unet, read_projections(tmp_path / "0+1" / "projections.safetensors", parts.unet))
    assert torch.equal(parts.unet.state_dict()[next(iter(after))], after[next(iter(after))])
    assert all(torch.equal(parts.unet.state_dict()[name], tensor) for name, tensor in everything_else.items())
    written = (tmp_path / "0+1" / "projections.safetensors").read_bytes()
    (tmp_path / "0+1" / "projections.safetensors").unlink()  # killed before it was written
    assert call(f"{PACKAGE}.train", *arguments)[0] == 0 and (tmp_path / "0+1" / "projections.safetensors").read_bytes() == written


def test_projections_that_do_not_fit_are_named(tiny_sd, tmp_path):
    unet = load_stable_diffusion(tiny_sd).unet
    weights = weights_of(unet)
    name = next(iter(weights))
    for wrong in ({k: v for k, v in weights.items() if k != name}, weights | {name: torch.zeros(2, 2)}):
        save_projections(tmp_path / "wrong.safetensors", wrong)
        with pytest.raises(UserError, match="does not fit this model"):
            read_projections(tmp_path / "wrong.safetensors", unet)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(UserError, match="cannot be read as a file of projections: it is a text"):
        read_projections(tmp_path / "text.safetensors", unet)


def test_merge_keeps_every_concept_and_stays_nearest():
    """W C' = V holds exactly, and no other W with W C' = V is nearer to W0 on the ordinary captions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def distance(M):
        return ((M - base["w"]) @ regular.T).norm()

    base, regular = {"w": draw(6, 12)}, draw(40, 12) * torch.linspace(0.2, 2, 12)
    tuned, targets = [{"w": base["w"] + 0.3 * draw(6, 12)} for _ in range(2)], [draw(2, 12), draw(3, 12)]
    W = merge(base, tuned, targets, regular, ridge=0)["w"]
    for weights, target in zip(tuned, targets):
        assert torch.allclose(W @ target.T, weights["w"] @ target.T, atol=1e-4)
    C = torch.cat(targets)
    free = torch.eye(12) - torch.linalg.pinv(C) @ C  # directions that no target has
    for _ in range(20):
        assert distance(W + 0.1 * draw(6, 12) @ free) >= distance(W) - 1e-4
    assert torch.allclose(merge(base, [base, base], targets, regular)["w"], base["w"], atol=1e-5)


def test_ordinary_pictures_that_stay_have_not_drifted():
    grader = types.SimpleNamespace(of_pictures=lambda pictures: torch.stack([torch.tensor([1.0, 0.0]) for _ in pictures]))
    pictures = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20)]
    assert drift(pictures, pictures, grader) == {"grey_levels": 0.0, "clip_cosine": 100.0}
    assert drift([picture + 3 for picture in pictures], pictures, grader)["grey_levels"] == 3


def test_pictures_side_by_side():
    pasted = paste_side_by_side(Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"), 64)
    left, right = (np.asarray(crop) for crop in half_crops(pasted))
    assert left[:, :30, 0].min() == 255 and right[2:-4, -30:, 2].min() == 255
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    assert {color for _, color in paste_side_by_side(wide, wide, 64).crop((0, 16, 64, 48)).getcolors()} == {(0, 0, 255)}  # its middle, not squeezed


def test_interval_of_a_share():
    low, high = wilson(30, 50)
    assert (round(low, 3), round(high, 3)) == (0.462, 0.724)  # Wilson's, by hand
    assert wilson(0, 50)[0] == pytest.approx(0, abs=1e-9) and wilson(50, 50)[1] == pytest.approx(1)


def test_missing_pictures_are_drawn_in_the_batches_that_they_belong_to(concepts_json, tiny_sd, tmp_path, monkeypatch):
    """The last bits of a picture depend on those beside it."""
    concepts = read_concepts(concepts_json)
    (tmp_path / "apart").mkdir()
    for concept in concepts:
        save_embedding(file_of(tmp_path / "apart", concept.token), concept.token, torch.ones(1, 32), {})
    args = types.SimpleNamespace(runs=tmp_path, checkpoint=str(tiny_sd), ordinary_prompts=["a cat", "a dog"], num_images=3, overwrite=False)
    prompts, asked = [("a <new1> next to a cat", ("0",))], []

    def watched(parts, texts, noises, *rest):
        asked.append(list(noises))
        yield from generate(parts, texts, noises, *rest)

    monkeypatch.setattr(several, "generate", watched)

    def drawn():
        config = DrawConfig(num_steps=1, batch_size=3)
        found = several.draw_method("words learned apart", args, concepts, prompts, "model", torch.device("cpu"), config, tqdm(disable=True))
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for paths in found for path in paths}

    before = drawn()
    missing = list(before)[3]
    missing.unlink()
    after = drawn()
    assert asked == [["a cat", "a dog", *(f"{prompts[0][0]}/{i}" for i in range(3))], [f"{prompts[0][0]}/{i}" for i in (1, 2)]]
    assert after.pop(missing)[0] == before.pop(missing)[0] and after == before


def test_the_examples_kept_to_set_and_to_try_are_the_most_typical():
    """By hand: of four directions in a plane the two in the middle have the largest mean cosine to all."""
    angles = dict(zip("abcd", (0.0, 0.5, 0.7, 2.0)))
    grader = types.SimpleNamespace(of_pictures=lambda names: torch.tensor([[np.cos(angles[name]), np.sin(angles[name])] for name in names]))
    assert most_typical_last(grader, list("bdca")) == ["d", "a", "b", "c"]
