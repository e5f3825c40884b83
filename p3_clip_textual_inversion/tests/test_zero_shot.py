"""Zero-shot classification, through the real command, with a small untrained CLIP, and its scores against closed forms."""

import csv
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from p3_clip_textual_inversion.clip import image_features, load_clip, load_pictures, text_classifier
from p3_clip_textual_inversion.data import read_data
from p3_clip_textual_inversion.files import ROOT, UserError
from p3_clip_textual_inversion.zero_shot import score

MODULE = "p3_clip_textual_inversion.zero_shot"


@pytest.fixture
def data(tmp_path):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    (folder / "val").mkdir(parents=True)
    labels = {"0": "dog", "7": "red apple", "12": "bus"}
    (folder / "id2label.json").write_text(json.dumps(labels))
    for number in labels:
        for i in range(2 + int(number) % 2):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "val" / f"{number}_{i}.png")
    return folder


def test_scores():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]])
    result = score(probabilities, torch.tensor([0, 1, 2, 0]), ["a", "b", "c"])
    assert result["top1"] == 0.5 and result["top5"] == 1 and result["per_class"] == {"a": 0.5, "b": 0.0, "c": 1.0}
    assert {(c["truth"], c["predicted"], c["count"]) for c in result["confused"]} == {("b", "a", 1), ("a", "b", 1)}


def test_the_command(command, tiny_clip, data, tmp_path):
    code, out, err = command(MODULE, "--data", data, "--model", tiny_clip, "--output", tmp_path / "out", "--batch-size", 2)
    assert code == 0 and "top-1" in out, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["images"] == 7 and results["classes"] == 3 and results["top5"] == 1 and results["templates"] == ["a photo of a {}"]
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["0_0.png", "0_1.png", "12_0.png", "12_1.png", "7_0.png", "7_1.png", "7_2.png"]
    assert np.mean([row["rank"] == "1" for row in rows]) == pytest.approx(results["top1"])
    assert all((row["predicted_1"] == row["label"]) == (row["rank"] == "1") for row in rows)
    assert sum(float(rows[0][f"probability_{i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-3)
    with Image.open(tmp_path / "out" / "examples.png") as image:
        assert image.width > 500


def test_the_miniature_is_known_by_any_path(call, data, tmp_path, monkeypatch):
    """It is asked about drawings, which it has seen, not about photographs."""
    monkeypatch.chdir(ROOT)
    code, _, err = call(MODULE, "--data", data, "--model", "hw2_data/mini/../mini/clip", "--output", tmp_path / "out")
    assert code == 0 and json.loads((tmp_path / "out" / "results.json").read_text())["templates"] == ["a drawing of a {}"], err


def test_features_are_those_of_open_clip_whatever_the_batch(tiny_clip, data):
    clip, transform, tokenizer = load_clip(tiny_clip)
    paths, _, labels = read_data(data)
    device = torch.device("cpu")
    expected = torch.nn.functional.normalize(clip.encode_image(torch.stack([transform(Image.open(path)) for path in paths])), dim=-1)
    for batch_size in (1, 3, 100):
        batches = load_pictures(paths, transform, batch_size)
        assert torch.allclose(image_features(clip, batches, device, torch.float32), expected, atol=1e-5)
    one = text_classifier(clip, tokenizer, list(labels.values()), ["a {}"], device)
    assert torch.allclose(one, torch.nn.functional.normalize(clip.encode_text(tokenizer(["a dog", "a red apple", "a bus"])), dim=-1), atol=1e-5)
    other, both = (text_classifier(clip, tokenizer, list(labels.values()), templates, device) for templates in (["the {}"], ["a {}", "the {}"]))
    assert torch.allclose(both, torch.nn.functional.normalize(one + other, dim=-1), atol=1e-5)


def test_bad_data_ends_in_one_line(data):
    labels = data / "id2label.json"
    good = labels.read_text()
    for content, message in (("{", "cannot read"), ("[]", "must be an object"), ('{"0": 1}', "must be an object"), ('{"0": "dog"}', "no class id")):
        labels.write_text(content)
        with pytest.raises(UserError, match=message):
            read_data(data)
    labels.write_text(good)
    path = data / "val" / "7_0.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the picture .*7_0\.png"):
        list(load_pictures(read_data(data)[0], lambda image: torch.zeros(1), 4))
    for path in (data / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no \.png files"):
        read_data(data)


@pytest.mark.parametrize("flags, message", [
    (["--model", "ViT-Z-99"], "ViT-Z-99"),
    (["--model", "ViT-B-32", "--pretrained", "no-such-tag"], "no-such-tag"),
    (["--model", "ViT-B-32"], "--pretrained"),
    (["--template", "a picture"], "must have {} once"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--output", "/dev/null/out"], "/dev/null/out"),
])  # fmt: skip
def test_bad_calls_end_in_one_line(call, data, tiny_clip, tmp_path, flags, message):
    code, _, err = call(MODULE, "--data", data, "--model", tiny_clip, "--output", tmp_path, *flags)
    assert code != 0 and err.startswith("error: ") and err.strip().count("\n") == 0 and message in err, err


def test_the_activation_is_that_of_the_weights(monkeypatch):
    """OpenAI's were trained with QuickGELU."""
    calls = []
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, **options: calls.append(options) or (torch.nn.Identity(), None, None))
    load_clip("ViT-B-32", "openai")
    load_clip("ViT-B-32-quickgelu", "openai")
    assert calls[0]["force_quick_gelu"] and calls[1]["force_quick_gelu"]
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": False})
    with pytest.raises(UserError, match="trained with GELU; use ViT-B-32"):
        load_clip("ViT-B-32-quickgelu", "metaclip_400m")
