"""The page agrees with the package: same weights, word and noise, same picture, to one grey level; same loss and gradient. And its commands run."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from p3_clip_textual_inversion import diffusion, minimal
from p3_clip_textual_inversion.clip import Grader
from p3_clip_textual_inversion.embedding import add_words, expand, initial_rows, read_embedding
from p3_clip_textual_inversion.files import MINI
from p3_clip_textual_inversion.inference import DrawConfig, generate
from p3_clip_textual_inversion.model import MINI_SD, load_stable_diffusion
from p3_clip_textual_inversion.pictures import to_uint8
from p3_clip_textual_inversion.samplers import ImageNoise

PROMPT = "a drawing of a {} on a blue background"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(minimal, "DEVICE", "cpu")


@pytest.fixture
def both():
    """(the package's parts, its rows), (the page's, its rows), each with the same word of two rows; and that word as a prompt writes it out."""
    parts, page = load_stable_diffusion(MINI_SD), minimal.load(str(MINI_SD))
    learned = add_words(parts, {"<new1>": initial_rows(parts, "bird", 2)})
    words, written = minimal.add_word(page, "<new1>", "bird", 2)
    assert written == expand("<new1>", {"<new1>": 2})
    torch.testing.assert_close(words.rows, learned.rows)
    return (parts, learned), (page, words), written


def test_photographs_of_any_name_stand_upright(both, tmp_path):
    """As a camera says in its EXIF data; .JPG is a picture, too."""
    rng, exif, parts = np.random.default_rng(0), Image.Exif(), both[1][0]
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    exif[274] = 6  # to be turned clockwise
    for name, shown, options in (("upright", picture, {}), ("lying", picture.transpose(Image.Transpose.ROTATE_90), {"exif": exif})):
        (tmp_path / name).mkdir()
        shown.save(tmp_path / name / "a.PNG", **options)
    (tmp_path / "lying" / "notes.txt").write_text("")
    upright, lying = (minimal.encode_pictures(parts, tmp_path / name).mean for name in ("upright", "lying"))
    torch.testing.assert_close(upright, lying)


def test_the_same_pictures(both):
    (parts, _), (page, _), written = both
    prompt, names = PROMPT.format(written), ["one", "two"]
    ours = np.stack(list(generate(parts, [prompt] * 2, names, DrawConfig("ddim", 6, 3.0, batch_size=2))))
    drawn = to_uint8(minimal.draw(page, ImageNoise(0, names, parts.latent_shape())(), prompt, 3.0, 6))
    assert np.abs(drawn.astype(int) - ours).max() <= 1 and ours.std() > 30


def test_the_same_loss_and_gradient(both):
    (parts, learned), (page, words), written = both
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, *parts.latent_shape(), generator=g)
    t, captions = torch.tensor([0, 400, 999]), [PROMPT.format(written)] * 3
    loss = minimal.loss(page, x0, t, eps, captions)
    ours = diffusion.loss(parts.unet, parts.alpha_bar, x0, t, eps, parts.encode_text(captions)).mean()
    for value in (loss, ours):
        value.backward()
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(words.rows.grad, learned.rows.grad, rtol=0, atol=1e-5 * learned.rows.grad.abs().max().item())


def test_the_command_learns_its_rows_and_nothing_else(tmp_path, monkeypatch):
    """Two steps, on bundled pictures: each row has moved and kept its length, and all weights are what they were, to the bit."""
    parts, draw = minimal.load(str(MINI_SD)), minimal.draw
    models = {"text": parts.text_encoder, "unet": parts.unet, "vae": parts.vae}
    before = {f"{model} {name}": tensor.clone() for model, part in models.items() for name, tensor in part.state_dict().items()}
    initial = initial_rows(load_stable_diffusion(MINI_SD), "bird", 2)
    monkeypatch.setattr(minimal, "load", lambda _: parts)
    monkeypatch.setattr(minimal, "draw", lambda *args: draw(*args, num_steps=1))
    monkeypatch.setattr(sys, "argv", ["minimal", "learn", str(MINI / "textual_inversion" / "0"), "--initial", "bird", "--vectors", "2", "--steps", "2",
                                      "--batch-size", "2", "--output", str(tmp_path / "out")])
    torch.manual_seed(0)
    minimal.main()
    after = {f"{model} {name}".replace("token_embedding.table.", "token_embedding."): tensor
             for model, part in models.items() for name, tensor in part.state_dict().items()}
    assert after.keys() - before.keys() == {next(name for name in after if name.endswith("token_embedding.rows"))}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    word, rows, _ = read_embedding(tmp_path / "out.safetensors")
    assert word == "<new1>" and ((rows - initial).abs() > 1e-5).any(dim=1).all()
    torch.testing.assert_close(rows.norm(dim=1), initial.norm(dim=1))
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (4 * 66 + 2, 68)


def test_it_classifies_as_the_package_does(tmp_path, monkeypatch, capsys):
    """One picture of each of the bundled classes."""
    source = MINI / "clip_zeroshot"
    (tmp_path / "val").mkdir()
    for path in (source / "id2label.json", *source.glob("val/*_0.png")):
        shutil.copy(path, tmp_path / path.relative_to(source))
    labels, paths, grader = json.loads((tmp_path / "id2label.json").read_text()), sorted((tmp_path / "val").iterdir()), Grader()
    texts = grader.of_texts([f"a drawing of a {label}" for label in labels.values()])
    best = (grader.of_files(paths) @ texts.T).argmax(dim=1)
    right = sum(list(labels)[i] == path.stem.split("_")[0] for i, path in zip(best, paths)) / len(paths)
    monkeypatch.setattr(sys, "argv", ["minimal", "classify", str(tmp_path), "--clip", str(MINI / "clip"), "--caption", "a drawing of a {}"])
    minimal.main()
    assert capsys.readouterr().out == f"{right:.1%} are right\n" and len(paths) == 50 and 0.5 < right < 1
