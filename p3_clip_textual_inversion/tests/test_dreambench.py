"""The field's benchmarks of subjects: what is read, what is measured, and one run from pictures to the table."""

import importlib
import json
import shutil
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from p3_clip_textual_inversion.experiments import dino, dreambench, subjects
from p3_clip_textual_inversion.files import MINI, UserError
from p3_clip_textual_inversion.inference import DrawConfig, generate

BENCH = MINI / "dreambench"


@pytest.fixture
def bench(tmp_path):
    return shutil.copytree(BENCH, tmp_path / "repository" / "dataset").parent


def test_the_miniature_reads_as_dreambench_does(bench):
    name, singles, pairs = subjects.read_benchmark(bench)  # the repository, in which it is dataset/
    assert (name, len(singles), len(pairs)) == ("DreamBench", 10, 10)
    cat, bus = singles[0], next(s for s in singles if s.name == "bus")
    assert cat.noun == "cat face" and cat.token == "<cat>" and len(cat.prompts) == 10 == len(set(cat.prompts))
    assert "a {} next to a banana" in cat.prompts and "a {} next to a banana" not in bus.prompts  # live or object
    assert pairs[0].name == "cat+dog" and pairs[0].prompts[0] == "a {0} next to a {1}"


def test_two_columns_are_dreambenchs_own(bench):
    path = bench / "dataset" / subjects.DREAMBENCH
    path.write_text("Classes\n\nsubject_name,class\ncat,cat\nbus,toy\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n'a red {0} {1}'.format(unique_token, "
                    "class_token)\n]\n\nLive Subject Prompts\n\nprompt_list = [\n'a {0} {1} in a chef outfit'.format(unique_token, class_token),\n]\n")
    (bench / "dataset" / subjects.PAIRS).unlink()
    found = subjects.read_benchmark(bench)[1]
    assert [(s.noun, s.prompts) for s in found] == [("cat", ("a {} in a chef outfit",)), ("toy", ("a red {}",))]


def test_customconcept101_reads(bench):
    folder = (bench / "dataset").rename(bench / "customconcept101")
    (folder / subjects.DREAMBENCH).unlink()
    entries = [{"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": f"./{name}", "prompt_filename": "prompts/one.txt"}
               for name in ("cat", "dog")]
    (folder / subjects.SINGLES).write_text(json.dumps(entries))
    (folder / "prompts" / "one.txt").write_text("{} floating in a pool. \nA pair of {} on a table.\n\n")
    (folder / subjects.PAIRS).write_text(json.dumps([[*entries, {"prompt_filename_compose": "prompts/pair.txt"}]]))
    (folder / "prompts" / "pair.txt").write_text("{0} and {1}.\nA photo of {0} at dawn with {0} sleeping.")  # as one of the published ones is
    name, singles, pairs = subjects.read_benchmark(bench)
    assert name == "CustomConcept101" and singles[0].prompts == ("{} floating in a pool.", "A pair of {} on a table.")
    assert pairs[0].nouns == ("cat", "cat") and len(pairs[0].prompts) == 2
    (folder / "prompts" / "one.txt").unlink()
    with pytest.raises(UserError, match=r"one\.txt is not there"):
        subjects.read_benchmark(bench)


@pytest.mark.parametrize(("old", "new", "told"), [
    ("cat,cat face,live", "cat,cat face,alive", "line 4, is cat,cat face,alive; expected subject_name,class"),
    ("cat,cat face,live", "../cat,cat face,live", "names a subject ../cat"),
    ("bus,bus,object", "tram,bus,object", "tram is not there, of which prompts_and_classes.txt tells"),
    ("dog,dog face,live", "cat,dog face,live", "names a subject twice"),
    ("Live Subject Prompts", "Object Prompts", "0 of live subjects"),
    ("'a {0} {1} next to a fox'.format(unique_token, class_token)", "__import__('os').system('true')", "expected 'a {0} {1} in the jungle'"),
    ("a {0} {1} next to a fox", "a {0.__class__} {1} next to a fox", "expected a text with {}"),
    ("a {0} {1} next to a fox", "a {0} {1} next to a {0.__class__}", "expected a text with {}"),
])
def test_a_malformed_class_file_is_told(bench, old, new, told):
    path = bench / "dataset" / subjects.DREAMBENCH
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        subjects.read_benchmark(bench)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_first_prompts_are_far_apart():
    for count in range(1, 30):
        assert sorted(subjects.spread(range(count))) == list(range(count))
    assert subjects.spread(range(25))[:4] == (0, 11, 22, 8)


def test_metrics_are_mean_cosines():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    references = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    assert torch.allclose(dreambench.cosines(features, references), torch.tensor([1.8, 0.6 + 0.8 + 0.96]) / 3)
    assert dreambench.among(references) == pytest.approx((0 + 0.8 + 0.6) / 3)  # different ones only
    assert dreambench.among(references[:1]) is None
    assert dreambench.telling({"a": features[:1].repeat(2, 1), "b": torch.tensor([[0.0, 1.0], [0.9, 0.4359]])}) == 0.75
    summary = dreambench.summary_of({"a": {"clip_i": 0.2, "dino": None}, "b": {"clip_i": 0.6}})
    assert summary["clip_i"]["mean"] == pytest.approx(0.4) and summary["clip_i"]["interval"] == [0.2, 0.6] and "dino" not in summary


class Judge:
    """Sees in a file's name an angle; reads it in a text too."""

    def of_files(self, paths):
        return torch.stack([self.direction(path.stem) for path in paths])

    def of_texts(self, texts):
        return torch.stack([self.direction(text) for text in texts])

    @staticmethod
    def direction(text):
        angle = torch.deg2rad(torch.tensor(float(text)))
        return torch.stack([angle.cos(), angle.sin()])


def test_a_pair_is_compared_with_both_and_a_text_with_its_own(tmp_path):
    a, b = (subjects.Subject(name, "cat", tmp_path, ()) for name in "ab")
    task = dreambench.Task((a, b), ("cat", "cat"), (), 1, tmp_path)
    files = {task: [(tmp_path / "30.png", "60"), (tmp_path / "90.png", "90")]}
    references = {"clip_i": {"a": Judge().of_texts(["0"]), "b": Judge().of_texts(["90"])}}
    scores = dreambench.scores_of([task], files.get, {"clip_i": Judge()}, references)["a+b"]
    cosine = np.sqrt(0.75)  # of 30 degrees
    assert scores["clip_i"] == pytest.approx(((cosine + 0) / 2 + (0.5 + 1) / 2) / 2) and scores["clip_t"] == pytest.approx((cosine + 1) / 2)


@pytest.fixture
def tiny_dino(tmp_path, monkeypatch):
    """(a model of DINO's shape, but tiny, which read_dino then takes for it, its file)"""
    torch.manual_seed(0)

    def make(*_, **__):
        return timm.models.VisionTransformer(img_size=224, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=0, dynamic_img_size=False)

    model = make().eval()
    monkeypatch.setattr(dino.timm, "create_model", make)
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    return model, tmp_path / "dino.safetensors"


def test_dino_sees_by_its_class_token(tiny_dino, tmp_path):
    model, path = tiny_dino
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (260, 300, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    seen = dino.read_dino(path).of_files([tmp_path / "picture.png"])
    x = dino.PREPARE(picture)[None]
    cut = np.asarray(picture.resize((295, 256), Image.Resampling.BICUBIC).crop((36, 16, 260, 240))) / 255
    assert np.allclose(x[0].permute(1, 2, 0), (cut - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225), atol=1e-5)
    with torch.inference_mode():
        token = model.forward_features(x)[:, 0]
    assert torch.allclose(seen, token / token.norm(), atol=1e-5)


def test_dino_that_is_missing_or_another_is_told(tiny_dino, tmp_path, monkeypatch):
    save_file({"cls_token": torch.zeros(1, 1, 16)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit the network: missing pos_embed"):
        dino.read_dino(tmp_path / "other.safetensors")
    monkeypatch.setattr(dino.huggingface_hub, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(UserError, match=r"cannot be fetched .no network.*--dino FILE, or do without by --dino none") as error:
        dino.read_dino()
    assert "at all" not in str(error.value)  # one line of it


def test_the_bundled_stand_in_is_named_as_one():
    from p3_clip_textual_inversion.clip import Grader

    eye = dino.stand_in(Grader())
    assert eye.key == "stand_in" and "stands in for DINO" in eye.name
    assert eye.of_files(sorted((BENCH / "cat").glob("*.png"))[:2]).shape == (2, 320)


def test_a_missing_picture_of_a_classs_name_is_drawn_in_its_batch(tiny_sd, tmp_path, monkeypatch):
    """And those beside it, which are there, stay."""
    args = types.SimpleNamespace(checkpoint=str(tiny_sd), output=tmp_path, num_images=1, overwrite=False)
    texts, asked = ["a cat", "a dog", "a bus"], []
    monkeypatch.setattr(dreambench, "generate", lambda parts, prompts, *rest, **options: asked.append(prompts) or generate(parts, prompts, *rest, **options))

    def drawn():
        dreambench.draw_plain(args, DrawConfig(num_steps=1, batch_size=2), torch.device("cpu"), "model", texts)
        paths = [dreambench.plain_path(tmp_path / "class_names", text, 0) for text in texts]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before = drawn()
    missing = next(iter(before))
    missing.unlink()
    after = drawn()
    assert asked == [texts, texts[:2]] and after.pop(missing)[0] == before.pop(missing)[0] and after == before


def test_from_pictures_to_the_table_and_again(call, tiny_sd, tiny_clip, tmp_path, monkeypatch):
    called = []

    def here(command, **_):  # in this process, which has imported everything
        module, arguments = command[2], command[3:]
        called.append((module.rpartition(".")[2], " ".join(arguments)))
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(dreambench, "subprocess", types.SimpleNamespace(run=here))
    line = [BENCH, tmp_path / "out", tiny_sd, "--model", tiny_clip, "--subjects", "cat", "dog", "--prompts", 1, "--num-images", 1, "--steps", 1,
            "--device", "cpu", "--learn", "--steps 1 --batch-size 1 --crops 1 --vectors 1 --validate-every 100"]
    code, out, err = call(dreambench.__name__, *line)
    assert code == 0, err
    assert [module for module, _ in called] == ["train", "inference", "inference"] and "2 subjects, 2 to learn; 6 pictures, 6 to draw" in out
    assert all(" --device cpu --dtype auto" in arguments for _, arguments in called) and " --kind object " in called[0][1]
    assert [" --seed 0 " in arguments for _, arguments in called] == [name != "train" for name, _ in called]  # the seed is of the drawing's noise
    assert ["--regions auto" in arguments for _, arguments in called] == [False, False, True]
    results = json.loads((tmp_path / "out/report/results/p3_dreambench.json").read_text())
    learned = next(row for way, row in results["summary"]["subjects"].items() if way.startswith("learned"))
    assert learned["clip_i"]["of"] == 2 and "dino" not in learned and results["judges"]["subjects"] is None
    assert "DreamBooth, Imagen" in out and "not comparable" in out and (tmp_path / "out/report/figures/p3_dreambench.png").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png") if "report" not in path.parts}
    code, out, err = call(dreambench.__name__, *[argument for argument in line if argument != "dog"])
    assert code == 0 and len(before) == 6 and "1 subjects, 0 to learn; 2 pictures, 0 to draw: all is there" in out, err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    called.clear()
    code, _, err = call(dreambench.__name__, *line, "--regions", "none")  # by words alone: a prompts.json would have regions unasked
    assert code == 0 and [arguments.split(" --regions ")[1] for _, arguments in called if "--regions" in arguments] == ["none"], err
    code, _, err = call(dreambench.__name__, *line, "--steps", 2)
    assert code == 1 and "was made otherwise" in err
    code, _, err = call(dreambench.__name__, *line, "--steps", 2, "--overwrite")
    assert code == 0, err
    code, _, err = call(dreambench.__name__, *line[:-2], "--learn=--custom-diffusion")
    assert code == 1 and "--learn --custom-diffusion learns projections for each subject" in err


@pytest.mark.parametrize("flags, steps, batch_size", [
    ("", 300, 16), ("--lora", 400, 16), ("--lora 4 --steps=7", 7, 16), ("--batch-size 3 --custom-diffusion", 500, 3)])
def test_what_learning_takes_is_told_of_the_way_that_is_chosen(flags, steps, batch_size):
    learned = dreambench.learning_of(flags, dreambench.MINIATURE)
    assert (learned.steps, learned.batch_size) == (steps, batch_size)
