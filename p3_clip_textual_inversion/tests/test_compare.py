"""Learned words beside initial and untrained ones."""

import json

import pytest
import torch

from p3_clip_textual_inversion.clip import Grader
from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.data import example_pictures
from p3_clip_textual_inversion.embedding import save_embedding
from p3_clip_textual_inversion.experiments.compare import rest_of, summary_of


@pytest.mark.parametrize("prompt, rest", [
    ("a drawing of a <new1> on a blue background", "a drawing of on a blue background"), ("a <new1> next to a red apple", "next to a red apple"),
    ("an apple in the style of <new1>", "an apple in the style of"), ("the <new1>", ""), ("<new1> and <new1>", "and")])
def test_the_rest_of_a_prompt(prompt, rest):
    assert rest_of(prompt, "<new1>") == rest


def test_the_summary_of_a_prompt():
    rows = {way: {"image": value, "text": 2 * value, "rest": 0.0} for way, value in (
        ("initial words", 1.0), ("untrained (0)", 2.0), ("untrained (1)", 6.0), ("learned (a)", 9.0), ("learned (b)", 5.0), ("learned (c)", 7.0))}
    summary = summary_of("p", rows)
    assert summary["prompt"] == "p" and summary["image"] == {"initial": 1.0, "untrained": 4.0, "untrained_lowest": 2.0, "untrained_highest": 6.0,
                                                             "learned": 7.0, "lowest": 5.0, "highest": 9.0}
    assert summary["text"]["learned"] == 14.0


def test_the_command(call, tmp_path, concepts_json, tiny_sd, tiny_clip):
    """Equal words give equal scores, other ones others; pass marks are what the initial words' best pictures get."""
    for folder, value in (("a", 1.0), ("b", 1.0), ("c", -2.0)):
        (tmp_path / folder).mkdir()
        for word in ("new1", "new2"):
            save_embedding(tmp_path / folder / f"{word}.safetensors", f"<{word}>", torch.full((2, 32), value))
    code, _, err = call("p3_clip_textual_inversion.experiments.compare", "--input", concepts_json, "--learned", *(tmp_path / folder for folder in "abc"),
                        "--checkpoint", tiny_sd, "--model", tiny_clip, "--num-images=2", "--steps=2", "--dtype=fp32", "--guidance-weight=6.5",
                        "--output", tmp_path, "--write-baselines")
    assert code == 0, err
    result = json.loads((tmp_path / "results" / "p3_compare.json").read_text())
    a, b, c = (result["ways"][f"learned ({tmp_path / folder})"] for folder in "abc")
    assert a == b != c and len(a) == len(result["summary"]) == 3
    images = {way: rows[0]["image"] for way, rows in result["ways"].items() if way.startswith("untrained")}
    assert len(set(images.values())) == 3  # of three different words
    assert result["summary"][0]["image"]["untrained"] == pytest.approx(sum(images.values()) / 3)
    assert (tmp_path / "figures" / "p3_compare.png").is_file()

    features = Grader(tiny_clip).of_pictures(example_pictures(concepts_json.parent / "1"))
    among = sum(100 * float(features[i] @ features[j]) for i in range(3) for j in range(3) if i != j) / 6
    assert result["examples_among_themselves"]["1"] == pytest.approx(among, abs=1e-3)
    mark = read_concepts(concepts_json)[1].baseline[0]
    assert mark[0] == pytest.approx(result["ways"]["initial words"][2]["image"], abs=0.01)  # of two pictures, both are among the best five
