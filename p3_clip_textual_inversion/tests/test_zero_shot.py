"""Zero-shot classification, through the real command, with a small untrained CLIP, and its scores against closed forms."""

import csv
import json
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from p3_clip_textual_inversion import benchmark, device
from p3_clip_textual_inversion.benchmark import plain_features, rows_to_keep, write_photographs
from p3_clip_textual_inversion.classification.outcome import Data, outcome_of, score
from p3_clip_textual_inversion.classification.plots import choose, draw_confusion, similarity_order
from p3_clip_textual_inversion.clip import image_features, load_clip, load_pictures, text_classifier
from p3_clip_textual_inversion.data import read_data
from p3_clip_textual_inversion.files import ROOT, UserError

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


def outcome(logits, truth, **options):
    return outcome_of(torch.tensor(logits, dtype=torch.float64), torch.tensor(truth), **options)


def test_scores():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]]).log().tolist()
    result = score(outcome(logits, [0, 1, 2, 0]), torch.tensor([0, 1, 2, 0]), ["a", "b", "c"])
    assert result["top1"] == 0.5 and result["top5"] == 1 and result["per_class"] == {"a": 0.5, "b": 0.0, "c": 1.0}
    assert result["mean_per_class_recall"] == 0.5 and result["images"] == 4
    assert {(c["truth"], c["predicted"], c["count"]) for c in result["confused"]} == {("b", "a", 1), ("a", "b", 1)}


def test_a_sigmoid_says_nothing_of_other_classes():
    one = outcome([[1.0, -1.0], [-3.0, -2.0]], [0, 1], sigmoid=True)
    assert one.probability.tolist() == [[0.731059, 0.268941], [0.047426, 0.119203]] and one.rank.tolist() == [1, 1]


@pytest.fixture
def results(call, tiny_clip, data, tmp_path):
    """Of the command with three sets of captions: (results, rows of the CSV, folder)."""
    (tmp_path / "mine.txt").write_text("\ufeffa {}, drawn\n\na {} on a hill\n")
    code, out, err = call(MODULE, "--data", data, "--model", tiny_clip, "--output", tmp_path / "out", "--batch-size", 2,
                          "--templates", "photo", "course", tmp_path / "mine.txt")
    assert code == 0 and "top-1" in out, err
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        return json.loads((tmp_path / "out" / "results.json").read_text()), list(csv.DictReader(file)), tmp_path / "out"


def test_everything_follows_from_the_csv(results):
    """By arithmetic that is not the project's own."""
    results, rows, _ = results
    ranks, count = np.array([int(row["rank"]) for row in rows]), len(rows)
    assert [row["file"] for row in rows] == ["0_0.png", "0_1.png", "12_0.png", "12_1.png", "7_0.png", "7_1.png", "7_2.png"] and results["images"] == count
    assert all((row["predicted_1"] == row["label"]) == (row["rank"] == "1") for row in rows)
    assert all(row[f"predicted_{row['rank']}"] == row["label"] for row in rows)
    assert results["top1"] == sum(ranks == 1) / count and results["top5"] == 1
    labels = np.array([row["label"] for row in rows])
    per_class = {label: sum(ranks[labels == label] == 1) / sum(labels == label) for label in ("dog", "bus", "red apple")}
    assert results["per_class"] == per_class and results["mean_per_class_recall"] == pytest.approx(np.mean(list(per_class.values())), abs=1e-12)
    p, n = results["top1"], count  # Wilson's interval: where the true share lies 1.96 of its own deviations from the one seen
    for bound in results["intervals"]["top1"]:
        assert n * (p - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound), abs=1e-9)
    pairs = Counter((row["label"], row["predicted_1"]) for row in rows if row["rank"] != "1")
    assert {(pair["truth"], pair["predicted"]): pair["count"] for pair in results["confused"]} == pairs
    for column, key in (("probability_1", "ece"), ("calibrated", "ece_calibrated")):
        sure = np.array([float(row[column]) for row in rows])
        bins = np.digitize(sure, np.linspace(0, 1, 16), right=True)
        error = sum(abs(sum(sure[bins == b]) - sum(ranks[bins == b] == 1)) for b in range(1, 16)) / count
        assert results[key] == pytest.approx(error, abs=1e-12)
    assert results["temperature"] == pytest.approx(np.mean([float(t) for _, t in sorted({(row["fold"], row["temperature"]) for row in rows})]))
    assert sum(float(rows[0][f"probability_{i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-5)


def test_sets_of_captions_are_compared_on_the_same_pictures(results):
    results, _, _ = results
    sets, single = results["template_sets"], results["single_templates"]
    assert [(row["templates"].rpartition("/")[2], row["captions"]) for row in sets] == [("photo", 1), ("course", 1), ("mine.txt", 2)]
    assert sets[0]["top1"] == results["top1"] and sets[0]["difference"] == 0 and sets[0]["mcnemar_p"] == 1
    assert all(row["top1"] - results["top1"] == pytest.approx(row["difference"]) for row in sets)
    assert single["captions"] == 4 and single["worst"]["top1"] <= single["mean"] <= single["best"]["top1"] and 0 <= single["chosen_on_other_half"] <= 1
    assert results["templates"] == ["a photo of a {}"]


def test_pictures_of_the_results(results):
    _, _, folder = results
    for name in ("examples", "confusion", "calibration", "retrieval"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 60 and len(image.convert("L").getcolors()) > 3


def test_several_models_in_one_table(call, tiny_clip, data, tmp_path):
    other = shutil.copytree(tiny_clip, tmp_path / "other")
    code, out, err = call(MODULE, "--data", data, "--model", tiny_clip, "--model", other, "--output", tmp_path / "out")
    assert code == 0 and out.count("+0.00% (+0.0% to +0.0%), p 1") == 1 and "wrote models.json and, in a folder for each model, results.json" in out, err
    first, second = json.loads((tmp_path / "out" / "models.json").read_text())
    assert first["model"] == tiny_clip.name and second["model"] == "other" and first["top1"] == second["top1"] and second["against_first"]["difference"] == 0
    for folder in (tiny_clip.name, "other"):
        assert json.loads((tmp_path / "out" / folder / "results.json").read_text())["top1"] == first["top1"]


def test_what_was_read_once_is_not_read_again(call, tiny_clip, data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    arguments = [MODULE, "--data", data, "--model", clip, "--output", tmp_path / "out"]

    def read():
        code, _, err = call(*arguments)
        assert code == 0, err
        text = (tmp_path / "out" / "results.json").read_text()
        content = json.loads(text, parse_float=lambda number: round(float(number), 4))  # batches of 7 and 8 round differently
        return content.pop("pictures_read"), {key: value for key, value in content.items() if "second" not in key}

    assert read()[0] == 7
    with monkeypatch.context() as patch:
        patch.setattr("p3_clip_textual_inversion.clip.load_clip", lambda *_: pytest.fail("the model was loaded"))
        again, first = read()
    assert again == 0
    Image.new("RGB", (40, 50), "red").save(data / "val" / "7_1.png")  # a changed picture, an added one
    shutil.copyfile(data / "val" / "0_0.png", data / "val" / "0_9.png")
    assert read()[0] == 1
    state = load_file(clip / "open_clip_model.safetensors")
    state["visual.proj"] *= -1
    save_file(state, clip / "open_clip_model.safetensors")  # another model at the same path
    read_again, other = read()
    assert read_again == 7 and other["per_class"] != first["per_class"]
    kept = sorted((tmp_path / "cache" / "p3_clip").glob("*.safetensors"))
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:200])  # damaged
    assert read() == (7, other)
    arguments.append("--no-cache")  # then the copy counts, too
    assert read() == (8, other)


def test_a_cache_that_cannot_be_written_stops_nothing(call, tiny_clip, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = call(MODULE, "--data", data, "--model", tiny_clip, "--output", tmp_path / "out")
    assert code == 0 and "note: features are not kept" in err


def test_two_classes_of_one_name_stay_two(call, tiny_clip, data, tmp_path):
    """No caption tells them apart: the first is taken, its pictures are right and the other's wrong, and nothing is merged."""
    (data / "id2label.json").write_text('{"0": "dog", "7": "dog", "12": "bus"}')
    code, _, err = call(MODULE, "--data", data, "--model", tiny_clip, "--output", tmp_path)
    assert code == 0 and "note: 2 classes are called 'dog'" in err, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["per_class"]) == ["dog (0)", "dog (7)", "bus"] and results["per_class"]["dog (7)"] == 0
    assert all(pair["truth"] != pair["predicted"] for pair in results["confused"])
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["rank"] == "1" for row in rows) / len(rows) == results["top1"]
    both = [row for row in rows if row["predicted_1"] == "dog (0)"]
    assert all(row["predicted_2"] == "dog (7)" and row["probability_1"] == row["probability_2"] for row in both)


def test_pictures_of_every_type_count_and_what_is_none_is_named(call, tiny_clip, data, tmp_path):
    picture = Image.open(data / "val" / "0_0.png")
    for name in ("0_7.jpg", "0_8.WEBP", "12_5.bmp"):
        picture.save(data / "val" / name)
    (data / "val" / "Thumbs.db").write_bytes(b"\0")
    (data / "val" / ".DS_Store").write_bytes(b"\0")
    code, _, err = call(MODULE, "--data", data, "--model", tiny_clip, "--output", tmp_path)
    assert code == 0 and f"note: left out of {data / 'val'}: Thumbs.db" in err and "DS_Store" not in err
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 10


def test_examples_are_chosen_by_how_sure_they_are():
    """Three surest, two least sure, no class twice."""
    confidence, truth = torch.tensor([0.9, 0.95, 0.1, 0.5, 0.6, 0.7, 0.2]), torch.tensor([0, 0, 1, 2, 3, 4, 2])
    assert choose(confidence, truth, range(7)) == [(1, "surest"), (5, "surest"), (4, "surest"), (2, "least sure"), (6, "least sure")]
    assert choose(confidence, truth, [3]) == [(3, "surest")] and choose(confidence, truth, []) == []


def test_similar_classes_stand_beside_each_other():
    angles = torch.tensor([0.0, 2.0, 0.1, 2.1, 1.0, 0.2])
    order = similarity_order(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert [angles[k].item() for k in order] in (sorted(angles.tolist()), sorted(angles.tolist())[::-1])
    assert similarity_order(torch.ones(1, 2)) == [0] and sorted(similarity_order(torch.ones(3, 2))) == [0, 1, 2]


def test_the_miniature_is_known_wherever_it_lies(call, data, tmp_path):
    """It is asked about drawings, which it has seen, not about photographs."""
    copy = shutil.copytree(ROOT / "hw2_data" / "mini" / "clip", tmp_path / "ViT-B-32")
    code, _, err = call(MODULE, "--data", data, "--model", copy, "--output", tmp_path / "out", "--no-cache")
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


def test_pictures_are_prepared_as_open_clip_does_to_the_last_bit_and_encoded_alike(tiny_clip, tmp_path):
    """Also those of the benchmark, whose plain way is open_clip's own code."""
    clip, transform, _ = load_clip(tiny_clip)
    paths = write_photographs(tmp_path, 3)
    Image.open(paths[0]).resize((31, 70)).save(tmp_path / "a.png")
    Image.open(paths[1]).convert("L").save(tmp_path / "b.png")
    paths += [tmp_path / "a.png", tmp_path / "b.png"]
    assert torch.equal(torch.cat(list(load_pictures(paths, transform, 2))), torch.stack([transform(Image.open(path)) for path in paths]))
    cpu = torch.device("cpu")
    expected = plain_features(clip, transform, paths, cpu, torch.float32)
    assert torch.allclose(image_features(clip, load_pictures(paths, transform, 2), cpu, torch.float32), expected, atol=1e-5)


def test_rows_of_another_machine_are_not_mixed_in(tmp_path):
    machine, path = {"device": "a", "date": "today"}, tmp_path / "b.json"
    assert rows_to_keep(path, machine) == {}
    path.write_text('{"machine": {"device": "a", "date": "yesterday"}, "rows": {"x": 1}}')
    assert rows_to_keep(path, machine) == {"x": 1}
    for content, said in (('{"machine": {"device": "b", "date": "today"}, "rows": {}}', "on another machine"), ('{"machine": 3}', "is no benchmark's")):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            rows_to_keep(path, machine)


@pytest.mark.parametrize("fast, rows", [((), 7), (("bf16",), 13)])
def test_what_a_machine_is_slow_in_is_not_measured(fast, rows, tmp_path, monkeypatch, capsys):
    """Where bf16 is emulated it would take hours."""
    row = SimpleNamespace(returncode=0, stdout='{"steps_per_second": 1}')
    monkeypatch.setattr(device, "fast_dtypes", lambda _: fast)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **options: row)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device=cpu", f"--output={tmp_path}/b.json"])
    benchmark.main()
    measured = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(measured) == rows and any(name.endswith("bf16") for name in measured) == ("bf16" in fast)
    assert ("note: left out, as cpu computes them slower than fp32: " in capsys.readouterr().err) == ("bf16" not in fast)


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
    with pytest.raises(UserError, match="has no pictures"):
        read_data(data)


@pytest.mark.parametrize("flags, message", [
    (["--model", "ViT-Z-99"], "ViT-Z-99"),
    (["--model", "ViT-B-32", "--pretrained", "no-such-tag"], "no-such-tag"),
    (["--model", "ViT-B-32"], "--pretrained"), (["--model", "none/ViT-L-14.pt"], "download_weights.sh ViT-L-14 fetches hw2_data/weights/ViT-L-14.pt"),
    (["--data", "none"], "no such folder of labelled pictures: none; bash scripts/download_data.sh"),
    (["--template", "a picture"], "must have {} once"), (["--template", "a {} {x}"], "must have {} once"),
    (["--templates", "imagenet8"], "--templates imagenet8 is neither plain, photo, course"),
    (["--templates", "plain", "--template", "a {}"], "not both"),
    (["--pretrained", "a", "--pretrained", "b"], "1 models and 2 --pretrained"),
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


def test_names_stand_at_their_rows_and_columns(tmp_path):
    """The name with much ink is beside the row, and above the column, of its class."""
    names, truth = ["i", "i i", "WWWWWWWWWWWW"], torch.tensor([0, 1, 2])
    directions = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    data = Data([], ["0", "1", "2"], names, names, torch.arange(3), truth)
    draw_confusion(data, outcome_of(5 * torch.eye(3, dtype=torch.float64), truth), directions, tmp_path / "c.png")
    pixels = 255 - np.asarray(Image.open(tmp_path / "c.png").convert("L")).astype(int)
    cell, place = 15, similarity_order(directions).index(2)
    margin = pixels.shape[0] - 10 - 3 * cell
    columns = [pixels[:margin - 2, margin + i * cell + 2:margin + (i + 1) * cell - 1].sum() for i in range(3)]
    rows = [pixels[margin + i * cell + 2:margin + (i + 1) * cell - 1, 40:margin - 2].sum() for i in range(3)]
    assert np.argmax(columns) == np.argmax(rows) == place and place != 1
