"""The later challenge's prompts.json, from its photographs to its score; and words of other models under the same tokens."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from p3_clip_textual_inversion.clip import Grader
from p3_clip_textual_inversion.concepts import concepts_of, read_concepts, read_entries
from p3_clip_textual_inversion.data import example_pictures
from p3_clip_textual_inversion.defaults import MINIATURE
from p3_clip_textual_inversion.embedding import installed_folder, model_name, save_embedding
from p3_clip_textual_inversion.evaluate import as_graders_read
from p3_clip_textual_inversion.experiments import both, finders
from p3_clip_textual_inversion.experiments.finders import BothFinder
from p3_clip_textual_inversion.files import MINI, ROOT, UserError
from p3_clip_textual_inversion.formats.identity import identify
from p3_clip_textual_inversion.formats.words import gather
from p3_clip_textual_inversion.model import MINI_SD
from p3_clip_textual_inversion.pictures import read_picture

PACKAGE = "p3_clip_textual_inversion"
ENTRIES = {  # as the challenge writes them
    "0": {"src_image": ["cat2", "dog6"], "token_name": ["<cat2>", "<dog6>"], "prompt": "A <cat2> on the right and a <dog6> on the left.",
          "prompt_4_clip_eval": "A cat on the right and a dog on the left."},
    "1": {"src_image": ["dog", "pet_cat1", "dog6"], "token_name": ["<dog>", "<pet_cat1>", "<dog6>"],
          "prompt": "A <dog>, a <pet_cat1> and a <dog6> near a forest.", "prompt_4_clip_eval": "A dog, a pet cat and a hound near a forest."},
    "2": {"src_image": ["cat2", "wearable_glasses", "watercolor"], "token_name": ["<cat2>", "<wearable_glasses>", "<watercolor>"],
          "prompt": "A <cat2> wearing <wearable_glasses> in a <watercolor> style.", "prompt_4_clip_eval": "Glasses on a cat, painted."}}


def test_examples_are_graded_as_the_graders_read_them(tmp_path, capsys):
    """`convert("RGB")`: no turn by EXIF, and under transparency what the file hides there."""
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "b.jpg", exif=exif)
    Image.new("RGB", (40, 30), "lime").save(tmp_path / "c.png")
    hidden, turned, plain = as_graders_read(tmp_path)
    assert hidden.getpixel((0, 0)) == (255, 0, 0) and turned.size == (40, 30) and plain.getpixel((0, 0)) == (0, 255, 0)
    assert "a.png, b.jpg are graded as the course's graders read" in capsys.readouterr().err
    (tmp_path / "a.png").unlink(), (tmp_path / "b.jpg").unlink()
    assert len(as_graders_read(tmp_path)) == 1 and "graders" not in capsys.readouterr().err


def written(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "prompts.json").write_text(json.dumps(content))
    return folder / "prompts.json"


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    """The first entry, with its photographs: JPEG, PNG with alpha, one of many pixels, and what a Mac leaves."""
    path = written(tmp_path_factory.mktemp("challenge") / "data", {"0": ENTRIES["0"]})
    rng = np.random.default_rng(0)
    for name in ("cat2", "dog6"):
        folder = path.parent / "concept_image" / name
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (90, 70, 3), np.uint8)).save(folder / "00.jpg")
        Image.fromarray(rng.integers(0, 256, (60, 70, 4), np.uint8)).save(folder / "01.png")
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    Image.new("RGB", (4000, 1000), "teal").save(path.parent / "concept_image" / "cat2" / "02.JPG")
    (path.parent / "concept_image" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return path


def test_each_concept_is_read_once_with_its_words_and_kind(tmp_path):
    path = written(tmp_path, ENTRIES)
    told = {concept.number: (concept.token, concept.src_image, concept.kind, len(concept.prompts)) for concept in concepts_of(path)}
    assert told == {"cat2": ("<cat2>", "cat", "object", 2), "dog6": ("<dog6>", "dog", "object", 2), "dog": ("<dog>", "dog", "object", 1),
                    "pet_cat1": ("<pet_cat1>", "pet cat", "object", 1), "wearable_glasses": ("<wearable_glasses>", "wearable glasses", "object", 1),
                    "watercolor": ("<watercolor>", "watercolor", "style", 1)}  # the last entry's two prompts differ in more: the folders' names stand in
    assert concepts_of(path)[0].folder == tmp_path / "concept_image" / "cat2"
    assert [entry.picture(0, 3) for entry in read_entries(path)] == ["0/03.png", "1/03.png", "2/03.png"]
    assert [concept.number for concept in concepts_of(path, ["watercolor", "dog"])] == ["dog", "watercolor"]
    with pytest.raises(UserError, match="p3_train, p3_infer and p3_grade read"):
        read_concepts(path)


@pytest.mark.parametrize("changed, said", [
    ({"src_image": "cat2"}, "src_image must be a list of texts"), ({"token_name": "<cat2>"}, "token_name must be a list of texts"),
    ({"src_image": []}, "src_image must be a list"), ({"token_name": ["<cat2>", 3]}, "token_name must be a list"),
    ({"src_image": ["cat2"]}, "has 1 in src_image, but 2 in token_name"), ({"token_name": ["<cat2>", "<cat2>"]}, "'<cat2>' twice"),
    ({"src_image": ["cat2", "../dog6"]}, r"src_image must do as a folder's, which '\.\./dog6' does not"), ({"src_image": None}, "src_image must be a list"),
    ({"prompt": []}, "has 0 texts in prompt; expected one"), ({"prompt": ["a <cat2> <dog6>"] * 2}, "has 2 texts in prompt; expected one"),
    ({"prompt": None}, "prompt must be a text"), ({"prompt": " "}, "prompt must be a text"), ({"prompt": "a <cat2>"}, "'<dog6>' is not in the prompt"),
    ({"prompt_4_clip_eval": 3}, "prompt_4_clip_eval must be a text"), ({"prompt_4_clip_eval": ["a", "b"]}, "has 2 texts in prompt_4_clip_eval"),
    ({"prompt": "a <cat2> and a <dog6> and a <cow>"}, "the prompt has <cow>, which token_name does not have"),
    ({"token_name": ["<cat2>", "two words"], "prompt": "<cat2> two words"}, "must be one word without spaces"),
    ({"token_name": ["<cat2>", "<dog>"], "prompt": "<cat2> <dog>"}, "expected one word for each"),
    ({"src_image": ["dog6", "cat2"]}, "expected one word for each"),
    ({"src_image": "a", "token_name": "<a>", "prompt": ["<a>"], "prompt_4_clip_eval": ["a"]}, "as texts in all, or as lists in all")])
def test_a_wrong_field_is_one_line(tmp_path, changed, said):
    content = copy.deepcopy(ENTRIES)
    content["0"] |= changed
    with pytest.raises(UserError, match=said) as caught:
        read_entries(written(tmp_path, content))
    assert "\n" not in str(caught.value) and "prompts.json" in str(caught.value)


def test_one_prompt_in_a_list_and_none_for_the_judge(tmp_path):
    listed = ENTRIES["0"] | {"prompt": [ENTRIES["0"]["prompt"]], "prompt_4_clip_eval": [" A Cat on the  right and a dog on the left"]}
    entry, = read_entries(written(tmp_path, {"0": listed}))
    assert entry.prompts == [ENTRIES["0"]["prompt"]] and [concept.src_image for concept in entry.concepts] == ["Cat", "dog"]
    without = {name: value for name, value in ENTRIES["1"].items() if name != "prompt_4_clip_eval"}
    assert read_entries(written(tmp_path, {"0": without}))[0].eval_prompts == ["A dog, a pet cat and a dog near a forest."]


def test_photographs_to_score(call, challenge, tiny_sd, tiny_clip, tmp_path):
    """Words are learned, pictures drawn and graded: by the score as it is defined, written out here."""
    words, out = tmp_path / "words", tmp_path / "out"
    code, said, err = call(f"{PACKAGE}.train", challenge, "--checkpoint", tiny_sd, "--output", words, "--steps=1", "--batch-size=2", "--crops=1",
                           "--sample-every=0", "--vectors=1", "--validate-every=1")
    assert code == 0 and "<cat2> (object) begins as 'cat'" in said and sorted(path.name for path in words.glob("*.safetensors")) == [
        "cat2.safetensors", "dog6.safetensors"], err
    (words / "dog6.safetensors").rename(tmp_path / "kept.safetensors")
    draw = ("inference", challenge, out, tiny_sd, "--embeddings", words, "--num-images=3", "--steps=1", "--overwrite")
    code, _, err = call(f"{PACKAGE}.{draw[0]}", *draw[1:])
    assert code == 1 and "has no embedding of <dog6> (only <cat2>); learn it with bash scripts/p3_train.sh" in err and "--concepts dog6" in err
    (tmp_path / "kept.safetensors").rename(words / "dog6.safetensors")
    code, said, err = call(f"{PACKAGE}.{draw[0]}", *draw[1:])
    assert code == 0 and sorted(path.name for path in (out / "0").iterdir()) == ["00.png", "01.png", "02.png"], err
    (out / "0" / "Thumbs.db").write_bytes(b"no picture")
    code, said, err = call(f"{PACKAGE}.evaluate", out, challenge, "--model", tiny_clip)
    assert code == 0 and "left out of" in err and "Thumbs.db" in err, err
    grade, grader = json.loads((tmp_path / "out_grade" / "grade.json").read_text()), Grader(tiny_clip)
    references = torch.cat([grader.of_pictures(as_graders_read(challenge.parent / "concept_image" / name)) for name in ("cat2", "dog6")])
    features = grader.of_pictures([read_picture(out / "0" / f"{i:02d}.png") for i in range(3)])
    image = (100 * features @ references.T).mean(1)  # over all five photographs alike, three of them the cat's
    text = 100 * features @ grader.of_texts([ENTRIES["0"]["prompt_4_clip_eval"]])[0]
    best = int((image + 2.2 * text).argmax())
    assert [grade["image_score"], grade["text_score"]] == pytest.approx([image[best].item(), text[best].item()], abs=1e-3)
    assert grade["prompts"][0]["best"] == [f"{best:02d}.png"] and "mean of 1 entries" in said
    (out / "0" / "01.png").unlink()
    assert call(f"{PACKAGE}.evaluate", out, challenge, "--model", tiny_clip)[0] == 1  # its run was to draw three


def test_without_photographs_nothing_begins(call, challenge, tiny_sd, tmp_path):
    path = written(tmp_path, {"0": ENTRIES["0"]})
    for made, said in ((None, "cat2"), ("cat2", "has no")):
        if made:
            (tmp_path / "concept_image" / made).mkdir(parents=True)
        for module, arguments in (("train", (path, "--checkpoint", tiny_sd, "--output", tmp_path / "words")), ("evaluate", (tmp_path / "out", path))):
            code, _, err = call(f"{PACKAGE}.{module}", *arguments)
            assert code == 1 and err.count("\n") == 1 and "concept_image" in err and said in err, err
    code, _, err = call(f"{PACKAGE}.inference", challenge, challenge.parent / "concept_image", tiny_sd)
    assert code == 1 and "is the folder of the example pictures" in err


def test_words_of_other_models_are_told_and_left_out(tmp_path, capsys):
    save_file({"<cat2>": torch.ones(1, 1024)}, tmp_path / "cat2_sd2.safetensors")
    save_file({"<cat2>": torch.ones(1, 768)}, tmp_path / "xl.safetensors")
    save_file({"<cat2>": torch.ones(1, 1280)}, tmp_path / "xl_2.safetensors")
    for sources in ([tmp_path], sorted(tmp_path.iterdir())):
        with pytest.raises(UserError, match=r"no embedding of <cat2> .*learned with another model") as caught:
            gather(sources, ["<cat2>"], (), 768)
        assert "\n" not in str(caught.value)
    capsys.readouterr()
    save_embedding(tmp_path / "own.safetensors", "<cat2>", torch.zeros(1, 768))
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "kohya_xl.safetensors")
    for sources in ([tmp_path], sorted(tmp_path.iterdir())):
        found, _, origin = gather(sources, ["<cat2>"], (), 768)
        err = capsys.readouterr().err
        assert found["<cat2>"].eq(0).all() and origin["<cat2>"][0].name == "own.safetensors"
        for said in ("Stable Diffusion 2: its vectors have 1024 numbers", "768 of its numbers are here, 1,280 in xl_2", "two text encoders",
                     "second text encoder of Stable Diffusion XL"):
            assert said in err, said


def test_the_bundled_challenge_has_its_words_and_pictures():
    path = MINI / "challenge" / "prompts.json"
    entries, concepts = read_entries(path), concepts_of(path)
    assert len(entries) == 4 and [concept.kind for concept in concepts] == ["object", "object", "style"]
    assert any(" above " in entry.prompts[0] for entry in entries) and not any("." in entry.prompts[0] for entry in entries)  # which it never saw
    assert all(len(example_pictures(concept.folder)) == 5 for concept in concepts)
    words = gather([installed_folder(model_name(MINIATURE, identify(MINI_SD)))], [concept.token for concept in concepts])[0]
    assert [len(rows) > 0 for rows in words.values()] == [True] * 3


def test_the_command_that_validates_the_score_of_both(call, tiny_clip, tmp_path, monkeypatch):
    """Every kind of picture is made of the other half's classes, and counted; what the bundled CLIP reaches stands in the committed file."""
    (tmp_path / "val").mkdir()
    rng = np.random.default_rng(0)
    for name in (f"{c}_{i}.png" for c in range(12) for i in range(6)):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "val" / name)
    (tmp_path / "id2label.json").write_text(json.dumps({str(c): f"thing {c}" for c in range(12)}))
    monkeypatch.setattr(both, "PICTURES", dict.fromkeys(both.PICTURES, 2))
    code, out, err = call(f"{PACKAGE}.experiments.both", "--data", tmp_path, "--model", tiny_clip, "--output", tmp_path / "both.json", "--pairs=2")
    assert code == 0 and "wanted at most 5 %" in out, err
    row = json.loads((tmp_path / "both.json").read_text())
    assert row["accepted"]["pictures"] == 4 and row["wrongly_accepted"]["pictures"] == 4 * 8 and set(row["kinds"]) == set(both.PICTURES)
    for picture in (tmp_path / "val").glob("1*_*.png"):
        picture.unlink()
    code, _, err = call(f"{PACKAGE}.experiments.both", "--data", tmp_path)
    assert code == 1 and err.count("\n") == 1 and "expected at least 12" in err
    measured = json.loads((ROOT / "report" / "results" / "p3_both.json").read_text())
    assert measured["accepted"]["share"] >= 0.95 and measured["wrongly_accepted"]["share"] <= 0.05


def test_the_threshold_lets_few_wrong_ones_in():
    wrong = torch.linspace(0, 1, 1001)
    assert (wrong > both.level_of(wrong)).float().mean() == pytest.approx(both.WRONG, abs=2e-3)


def test_what_lies_between_two_things_is_neither(monkeypatch):
    """By hand, in a space of five directions: A, B, see-through mixtures, halves, and other things, near the last."""
    finder, a, b = BothFinder.__new__(BothFinder), *torch.eye(5)[:2]
    finder.middle, finder.whiten, finder.views = torch.zeros(5), torch.eye(5), [torch.eye(5)[i:i + 1] for i in range(4)]
    finder.others = torch.tensor([[0.1, 0.1, 0, 0, 0.9], [-0.1, 0, 0, 0, 0.9], [0, -0.1, 0, 0, 0.9]])
    between, halved = (a + b) / 2**0.5, (a + b) / 2 + torch.eye(5)[3] * 0.7
    views = {"beside": (a, b, between, between), "above": (between, between, b, a), "one": (a,) * 4, "blend": (between,) * 4, "chimera": (halved,) * 4,
             "side by side, not opposite": (a, between, b, between)}
    monkeypatch.setattr(finder, "features", lambda _: torch.stack([view for four in views.values() for view in four]))
    monkeypatch.setattr(finders, "places", lambda picture: [picture] * 4)
    score = dict(zip(views, finder.scores(list(views)).tolist()))
    assert min(score["beside"], score["above"]) > 5 and max(score[kind] for kind in views if kind not in ("beside", "above")) <= finder.NEAR + 1e-5
