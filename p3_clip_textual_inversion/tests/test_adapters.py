"""Transduction and few-shot adaptation on features whose right answer is known, and through the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from p3_clip_textual_inversion.classification.adapters import choose_strength, tip_adapter, transduce, transductive_limits

MODULE = "p3_clip_textual_inversion.zero_shot"


@pytest.fixture
def clusters():
    """(features, truth, logits): three narrow clusters of 20 pictures; captions that lie beside them, so that many pictures are taken for another class."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(3).repeat_interleave(20)
    centres = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    features = torch.nn.functional.normalize(centres[truth] + 0.12 * torch.randn(60, 16, generator=generator), dim=-1)
    captions = torch.nn.functional.normalize(centres + 0.8 * centres.roll(1, 0) + 0.3 * torch.randn(3, 16, generator=generator), dim=-1)
    return features, truth, 10 * (features @ captions.T).double()


def share(scores, truth):
    return (scores.argmax(1) == truth).double().mean().item()


def test_clusters_that_captions_half_know_are_found(clusters, monkeypatch):
    features, truth, logits = clusters
    assert 0.5 < share(logits, truth) < 0.98 <= share(transduce(features, logits), truth)
    z = transduce(features, logits)
    assert torch.allclose(z.sum(1), torch.ones(60, dtype=torch.float64))
    monkeypatch.setattr("p3_clip_textual_inversion.classification.adapters.NEIGHBOURS", 0)  # the mixture alone
    assert share(transduce(features, logits), truth) >= 0.98
    monkeypatch.undo()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(transduce(features[order], logits[order]), z[order], atol=1e-9)  # no picture's place matters
    assert transduce(features[:1], logits[:1]).argmax() == logits[0].argmax()


def test_a_picture_goes_with_its_nearest(monkeypatch):
    """Forty pairs, of no common place: captions know one of each pair, and are wrong of its twin."""
    features = torch.eye(40).repeat_interleave(2, 0)
    features = torch.nn.functional.normalize(features + 0.02 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    truth = (torch.arange(40) % 2).repeat_interleave(2)
    logits = torch.zeros(80, 2, dtype=torch.float64).scatter_(1, truth[:, None], torch.tensor([4.0, -1.0], dtype=torch.float64).repeat(40)[:, None])
    assert share(logits, truth) == 0.5 and share(transduce(features, logits), truth) == 1
    monkeypatch.setattr("p3_clip_textual_inversion.classification.adapters.NEIGHBOURS", 0)
    assert share(transduce(features, logits), truth) < 0.9


def test_where_it_is_asked_too_much_is_measured(clusters):
    features, truth, logits = clusters
    limits = transductive_limits(features, logits, truth)
    assert limits["two_a_class"]["images"] == 6 and limits["a_fifth_of_the_classes"]["images"] == 20
    chosen = torch.tensor([0, 1, 20, 21, 40, 41])
    some, zero = features[chosen], logits[chosen]
    gain = share(transduce(some, zero), truth[chosen]) - share(zero, truth[chosen])
    assert limits["two_a_class"]["difference"] == pytest.approx(gain, abs=1e-12)


def test_labelled_pictures_add_what_the_paper_says():
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    adapted = tip_adapter(logits, torch.tensor([[0.9, 0.5, 1.0]]), torch.tensor([0, 0, 1]), alpha=2.0, beta=3.0)
    assert torch.allclose(adapted, torch.tensor([[1 + 2 * (np.exp(-0.3) + np.exp(-1.5)), 4.0]], dtype=torch.float64), atol=1e-6)


def test_labelled_pictures_are_trusted_as_far_as_they_know_each_other(clusters):
    features, truth, logits = clusters
    shots = torch.arange(60) % 20 < 4
    alpha, beta = choose_strength(features[shots], logits[shots], truth[shots])
    adapted = tip_adapter(logits, features @ features[shots].T, truth[shots], alpha, beta)
    assert alpha > 1 and share(adapted[~shots], truth[~shots]) > share(logits[~shots], truth[~shots]) + 0.02
    mixed = truth[shots][torch.randperm(12, generator=torch.Generator().manual_seed(0))]  # labels that say nothing
    perfect = 20 * torch.nn.functional.one_hot(mixed, 3).double()  # captions that say all
    assert choose_strength(features[shots], perfect, mixed)[0] <= 1
    assert choose_strength(features[[0, 20, 40]], logits[[0, 20, 40]], truth[[0, 20, 40]]) == (1.0, 5.5)  # none to try it on: the paper's


@pytest.fixture
def data(tmp_path):
    """Two classes of four pictures, plain red and plain blue, of other brightness each."""
    folder = tmp_path / "data"
    (folder / "val").mkdir(parents=True)
    (folder / "id2label.json").write_text('{"3": "dog", "5": "car"}')
    for number, colour in (("3", (1, 0, 0)), ("5", (0, 0, 1))):
        for i in range(4):
            Image.new("RGB", (32, 32), tuple((200 + 10 * i) * c for c in colour)).save(folder / "val" / f"{number}_{i}.png")
    return folder


def results_of(call, data, tiny_clip, folder, *flags):
    code, out, err = call(MODULE, "--data", data, "--model", tiny_clip, "--output", folder, *flags)
    assert code == 0, err
    return json.loads((folder / "results.json").read_text()), out


def test_the_command_with_pictures_of_ones_own(call, data, tiny_clip, tmp_path):
    plain, _ = results_of(call, data, tiny_clip, tmp_path / "plain")
    shots = tmp_path / "shots"
    shots.mkdir()
    for number, colour in (("3", (195, 0, 0)), ("5", (0, 0, 195))):
        for i in range(2):
            Image.new("RGB", (32, 32), tuple(c + i if c else 0 for c in colour)).save(shots / f"{number}_{i}.jpg", quality=95)
    results, out = results_of(call, data, tiny_clip, tmp_path / "new", "--shots", shots, "--transductive")
    (row,) = results["few_shot"]
    assert row["shots"] == 4 and row["top1"] == 1 and row["difference"] == 1 - plain["top1"] and "few-shot, 4 labelled pictures: top-1 100.00%" in out
    assert results["transductive"]["difference"] == pytest.approx(results["transductive"]["top1"] - plain["top1"])
    assert {key: results[key] for key in ("top1", "per_class")} == {key: plain[key] for key in ("top1", "per_class")}  # never in place of zero-shot
    assert {"predictions_few_shot.csv", "predictions_transductive.csv"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert not {"transductive", "few_shot"} & plain.keys()


def test_the_command_with_pictures_of_the_data(call, data, tiny_clip, tmp_path):
    results, _ = results_of(call, data, tiny_clip, tmp_path / "new", "--shots", "1", "2")
    assert [(row["shots"], row["images"]) for row in results["few_shot"]] == [(1, 6), (2, 4)] and results["few_shot"][1]["top1"] == 1
    assert all(row["lowest"] <= row["top1"] <= row["highest"] for row in results["few_shot"])


def test_wrong_shots(call, data, tiny_clip, tmp_path):
    shots = tmp_path / "shots"
    shots.mkdir()
    flags = ["--data", data, "--model", tiny_clip, "--output", tmp_path / "new", "--shots"]
    for change, given, said in ((lambda: None, [shots], "shots has no pictures"),
                                (lambda: None, ["0"], "--shots must be a folder of labelled pictures, or numbers"),
                                (lambda: None, ["4"], "--shots 4 leaves no picture to be classified"),
                                (lambda: shutil.copyfile(data / "val" / "3_1.png", shots / "5_7.png"), [shots], "it would be its own answer"),
                                (lambda: (shots / "5_7.png").rename(shots / "4_7.png"), [shots], "begins with '4', which is no class id of the data")):
        change()
        code, _, err = call(MODULE, *flags, *given)
        assert code == 1 and said in err.splitlines()[-1], err
