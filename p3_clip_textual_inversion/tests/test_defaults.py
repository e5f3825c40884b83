"""Which settings a model gets, by what it is; the judge of its pictures; and the words that belong to it."""

import json
import os
import re
import shutil
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from p3_clip_textual_inversion import embedding
from p3_clip_textual_inversion.clip import check_clip
from p3_clip_textual_inversion.defaults import MINIATURE, ROWS, SD_V1, report_of, row_of
from p3_clip_textual_inversion.embedding import check_models, find_words, install, installed_folder, model_name, models_of, read_embedding, save_embedding
from p3_clip_textual_inversion.evaluate import judge_of
from p3_clip_textual_inversion.experiments.fullsize import original_layout, write_checkpoint
from p3_clip_textual_inversion.experiments.several import METHODS, check_runs
from p3_clip_textual_inversion.files import ROOT, UserError, fingerprint
from p3_clip_textual_inversion.formats import identity
from p3_clip_textual_inversion.formats.identity import identify, weights_fingerprint
from p3_clip_textual_inversion.miniature.world import STYLES, words
from p3_clip_textual_inversion.model import MINI_SD, load_stable_diffusion
from p3_clip_textual_inversion.pictures import save_image
from p3_clip_textual_inversion.train import pull_of_step

PACKAGE = "p3_clip_textual_inversion"


def test_a_model_is_known_in_every_form_and_place(tiny_sd, tmp_path):
    """A copy elsewhere, one in half precision, one that has learned words in its table, a .ckpt and a .safetensors in the original layout."""
    known = identify(tiny_sd)
    copy, half, longer = (shutil.copytree(tiny_sd, tmp_path / name) for name in ("copy", "half", "longer"))
    for part, file in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        path = half / part / f"{file}.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path.with_name(f"{file}.fp16.safetensors"))
        path.unlink()
    assert identify(copy) == identify(half) == known and re.fullmatch("[0-9a-f]{12}-[0-9a-f]{12}", str(known))
    parts = load_stable_diffusion(tiny_sd)
    layout = original_layout(parts.unet, parts.vae, parts.text_encoder, torch.float16)
    write_checkpoint(tmp_path / "model.ckpt", layout)
    save_file({name: tensor.contiguous() for name, tensor in layout.items()}, tmp_path / "model.safetensors")
    for name in ("model.ckpt", "model.safetensors"):
        one = identify(tmp_path / name)
        assert str(one) == str(known) and row_of(one.side) is SD_V1  # a file in that layout is of 512 pixels
    path = longer / "text_encoder" / "model.safetensors"
    table = {name: tensor for name, tensor in load_file(path).items() if name.endswith("token_embedding.weight")}
    (name, rows), = table.items()
    save_file(load_file(path) | {name: rows + 0.01}, path)
    assert identify(longer).words != known.words and identify(longer).unet == known.unet


def test_a_name_on_the_hub_is_known_by_its_files(tiny_sd, tmp_path, monkeypatch):
    class Absent(identity.huggingface_hub.errors.EntryNotFoundError):
        def __init__(self, name):
            Exception.__init__(self, f"404: {name}")

    def answer(repository, name):
        if not (there / name).is_file():
            raise Absent(name)
        asked.append((repository, name))
        return str(there / name)

    asked, there = [], shutil.copytree(tiny_sd, tmp_path / "sd")
    monkeypatch.setattr(identity.huggingface_hub, "hf_hub_download", answer)
    assert identify("owner/model") == identify(tiny_sd) and {repository for repository, _ in asked} == {"owner/model"}
    assert identify("owner/Model_V5.1_noVAE") == identify(tiny_sd)
    before, weights = weights_fingerprint("owner/model"), there / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)  # the same name has got other weights
    assert weights_fingerprint("owner/model") != before
    monkeypatch.setattr(identity.huggingface_hub, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(UserError, match=r"cannot load Stable Diffusion from owner/model: no network; without internet, give a file or a folder$"):
        identify("owner/model")


def test_a_folder_of_the_hubs_cache_is_told_where_its_files_lie(tmp_path):
    """What people find as ~/.cache/huggingface/hub/models--CompVis--stable-diffusion-v1-4."""
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    for check in (identify, check_clip):
        with pytest.raises(UserError, match=re.escape(f"; give {snapshot}, where the hub's cache has it")):
            check(snapshot.parent.parent)


def test_of_a_large_file_little_is_read(tmp_path, monkeypatch):
    """Of a .safetensors the two tensors that are asked for; the other gigabytes stay on the disk."""
    save_file({f"{identity.TOKEN_TABLE[0]}": torch.ones(3, 2), identity.FIRST_CONVOLUTION[0]: torch.ones(2, 4, 3, 3), "x.weight": torch.ones(5)},
              tmp_path / "a.safetensors")
    asked, real = [], identity.safe_open

    class Spy:
        def __init__(self, *arguments):
            self.file = real(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            asked.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(identity, "safe_open", Spy)
    identify(tmp_path / "a.safetensors")
    assert sorted(asked) == sorted([identity.TOKEN_TABLE[0], identity.FIRST_CONVOLUTION[0]])


def test_tokens_that_someone_added_make_no_other_model(monkeypatch, tiny_sd, tmp_path):
    known = identify(tiny_sd)
    path = next((tiny_sd / "text_encoder").glob("*.safetensors"))
    name, table = next((name, tensor) for name, tensor in load_file(path).items() if name.endswith("token_embedding.weight"))
    monkeypatch.setattr(identity, "VOCABULARY", len(table))
    more = shutil.copytree(tiny_sd, tmp_path / "more")
    save_file(load_file(path) | {name: torch.cat([table, torch.ones(1, table.shape[1])])}, more / "text_encoder" / path.name)
    assert identify(more) == known


def test_a_copy_of_the_miniature_gets_the_miniatures_settings(call, concepts_json, tiny_sd, tmp_path):
    """As a model of the course's size gets Stable Diffusion's, wherever either lies; told, and overridden by flags."""
    moved = shutil.copytree(tiny_sd, tmp_path / "sd-v1-4")
    code, out, err = call(f"{PACKAGE}.train", concepts_json, "--checkpoint", moved, "--output", tmp_path / "run", "--concepts", 1, "--steps=1",
                          "--batch-size=1", "--crops=1", "--sample-every=0", "--dtype=fp32")
    assert code == 0, err
    assert f"the miniature (miniature-{identify(moved)}), 64 pixels: steps 1 (by flag), batch-size 1 (by flag), lr 0.005, vectors 4, min-snr-gamma 0.5" in out
    _, rows, settings = read_embedding(tmp_path / "run" / "new2.safetensors")
    assert len(rows) == MINIATURE.learning.vectors and float(settings["pull"]) == MINIATURE.learning.style_pull
    assert row_of(identify(MINI_SD).side) is MINIATURE and row_of(512) is row_of(768) is SD_V1


@pytest.mark.parametrize("module", ["train", "inference", "experiments.several", "experiments.compare", "figures"])
def test_help_tells_what_each_model_gets(call, module):
    code, out, _ = call(f"{PACKAGE}.{module}", "--help")
    out = " ".join(out.split())
    group, flag = ("learning", "lr") if module == "train" else ("drawing", "guidance_weight")
    small, real = (getattr(getattr(row, group), flag) for row in (MINIATURE, SD_V1))
    assert code == 0 and f"(default: the miniature {small}, Stable Diffusion v1 {real})" in out


@pytest.mark.parametrize("module", ["train", "experiments.several"])
def test_what_the_real_model_wants_is_told_where_it_is_missing(call, monkeypatch, tiny_sd, tmp_path, module):
    """The course's concepts, which are downloaded, and the checkpoint."""
    monkeypatch.setattr(f"{PACKAGE}.{'train' if module == 'train' else 'inference'}.row_of", lambda _: replace(
        SD_V1, input=tmp_path / "no.json", several=replace(SD_V1.several, input=tmp_path / "no.json")))
    code, _, err = call(f"{PACKAGE}.{module}", "--checkpoint", tiny_sd)
    assert code == 1 and f"{tmp_path / 'no.json'} is not there: bash scripts/download_data.sh fetches it" in err
    code, _, err = call(f"{PACKAGE}.{module}", "--checkpoint", "sd-v1-4.ckpt")
    assert code == 1 and "bash scripts/download_weights.sh fetches sd-v1-4.ckpt" in err


def test_the_rows_differ_where_the_models_do():
    """No number that was measured on emoji reaches the real model, which has the published ones."""
    small, real = MINIATURE.learning, SD_V1.learning
    assert (real.steps, real.batch_size, real.lr, real.vectors, real.min_snr_gamma, real.style_pull, real.prior) == (3000, 4, 4 * 5e-4, 0, 5.0, 0.0, 200)
    assert all(getattr(small, name) != getattr(real, name) for name in vars(small))
    assert not any(flag.startswith("--lr") and float(flag.split("=")[1]) > 8e-5 for name in ("custom", "custom_apart") for flag in SD_V1.several.runs[name][1])
    assert real.lr_projections <= 8e-5
    assert MINIATURE.several.other_styles == tuple(map(words, STYLES)) and (SD_V1.judge, SD_V1.judge_weights) == ("ViT-B-32-quickgelu", "openai")
    for row in ROWS:
        assert row.several.ordinary not in row.ordinary and len(set(row.ordinary)) == len(row.ordinary)  # CLIP tells names apart, and the prior draws others
        assert set(row.templates) == {"object", "style"} and all("{}" in template for group in row.templates.values() for template in group)


def test_each_way_to_learn_has_settings_of_its_own(call, concepts_json, tiny_sd, tmp_path):
    """Custom Diffusion's published rates are a twelfth of textual inversion's; flags of another way do nothing, which is said."""
    assert (SD_V1.custom.steps, SD_V1.custom.lr, SD_V1.custom.pull) == (500, 1e-5 * SD_V1.custom.batch_size, 0.0)
    assert SD_V1.learning.lr_projections == SD_V1.custom.lr
    tiny = [concepts_json, "--checkpoint", tiny_sd, "--concepts", 1, "--steps=1", "--crops=1", "--vectors=1", "--sample-every=0", "--dtype=fp32"]
    code, out, err = call(f"{PACKAGE}.train", *tiny, "--output", tmp_path / "plain", "--batch-size=1", "--lr-lora=1", "--prior=7", "--pivot=0.5")
    assert code == 0 and "lr 0.005" in out and "prior" not in out and "lr-projections" not in out, err
    assert "note: --lr-lora does nothing without --lora\n" in err and "note: --prior does nothing without --custom-diffusion or --lora\n" in err
    code, out, err = call(f"{PACKAGE}.train", *tiny, "--output", tmp_path / "custom", "--custom-diffusion", "--prior=1", "--lr-lora=1", "--validate-every=9")
    assert code == 0 and "batch-size 8, lr 0.003, vectors 1 (by flag), min-snr-gamma 5.0" in out and "prior 1 (by flag)" in out, out + err
    assert "note: --lr-lora does nothing without --lora\n" in err and "--prior does nothing" not in err
    assert float(read_embedding(tmp_path / "custom" / "new2.safetensors")[2]["pull"]) == 0.0
    save_embedding(tmp_path / "custom" / "new1.safetensors", "<new1>", torch.ones(1, 32))
    drawing = [concepts_json, tmp_path / "out", tiny_sd, "--embeddings", tmp_path / "custom", "--num-images=1", "--steps=1", "--dtype=fp32"]
    code, _, err = call(f"{PACKAGE}.inference", *drawing)
    assert code == 0 and "<new2> learned together with projections (--custom-diffusion): without them" in err, err
    code, _, err = call(f"{PACKAGE}.inference", *drawing, "--overwrite", "--projections", tmp_path / "custom" / "1" / "projections.safetensors")
    assert code == 0 and "learned together with projections" not in err, err


def test_plain_captions_are_the_last():
    assert [row.templates[kind][-1].format("cat") for row in ROWS for kind in ("object", "style")] == [
        "a drawing of a cat", "a drawing of a thing in the style of cat", "a photo of a cat", "a painting in the style of cat"]


def test_a_judge_that_has_weights_of_its_own_takes_no_others(tiny_clip, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(b"weights")
    for name in (tiny_clip, tmp_path / "ViT-B-32.pt"):
        with pytest.raises(UserError, match=r"has weights of its own; leave --pretrained openai out"):
            check_clip(str(name), "openai")


def test_one_pretrained_is_for_all_that_are_named(call, tiny_clip, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(f"{PACKAGE}.zero_shot.classify_all", lambda args, data, models, pretrained, *_: asked.append(pretrained))
    monkeypatch.setattr(f"{PACKAGE}.zero_shot.load_data", lambda _: None)
    code, _, err = call(f"{PACKAGE}.zero_shot", "--output", tmp_path / "out", "--model", tiny_clip, "--model", "ViT-B-32", "--pretrained", "openai")
    assert code == 0 and asked == [[None, "openai"]], err
    code, _, err = call(f"{PACKAGE}.zero_shot", "--output", tmp_path / "out", "--model", tiny_clip, "--pretrained", "openai")
    assert code == 1 and "has weights of its own; leave --pretrained openai out" in err


@pytest.mark.parametrize("made, side, expected", [("sd_v1-0123456789ab-0123456789ab", 128, SD_V1), ("miniature-0123456789ab-0123456789ab", 256, MINIATURE),
                                                  (None, 128, MINIATURE), (None, 512, SD_V1)])
def test_the_judge_is_of_the_model_that_drew(call, concepts_json, tmp_path, monkeypatch, made, side, expected):
    """Whatever size it drew in; of other programs' pictures the size tells."""
    asked = []
    monkeypatch.setattr(f"{PACKAGE}.evaluate.judge_of", lambda row, *_: asked.append(row) or (_ for _ in ()).throw(UserError("stop here")))
    for concept, k in (("0", 0), ("0", 1), ("1", 0)):
        prompt, word = [("a <new1> on a hill", "<new1>"), ("two <new1>", "<new1>"), ("a house in the style of <new2>", "<new2>")][int(concept) * 2 + k]
        path = tmp_path / "out" / concept / str(k) / f"source{concept}_prompt{k}_0.png"
        path.parent.mkdir(parents=True)
        told = made and {"program": f"{PACKAGE}.inference", "settings": {}, "made_of": {"model": made}, "of": {"prompt": prompt, "token": word}}
        save_image(np.zeros((side, side, 3), np.uint8), path, told)
    code, _, err = call(f"{PACKAGE}.evaluate", tmp_path / "out", concepts_json, "--num-images=1")
    assert code == 1 and "stop here" in err and asked == [expected], err


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_pull_is_of_a_run_however_many_steps_it_has(decay):
    for pull in (0.0, 0.3, 0.55, 1.0):
        left = []
        for steps in (1, 150, 3000):
            strengths = [min(1, (steps - at) / max(decay * steps, 1)) for at in range(steps)]
            left.append(np.prod([1 - pull_of_step(pull, strength, sum(strengths)) for strength in strengths]))
        assert left == pytest.approx([1 - pull] * 3, abs=1e-9)


class Missing:
    def __init__(self, *_):
        raise UserError("cannot load the CLIP ViT-B-32-quickgelu openai: no network")


def test_real_pictures_are_not_judged_by_emoji(call, concepts_json, tmp_path, monkeypatch):
    """Pictures of 512 pixels want ViT-B/32; where it is missing that is said, and how to get it."""
    for concept, k in (("0", 0), ("0", 1), ("1", 0)):
        (tmp_path / "out" / concept / str(k)).mkdir(parents=True)
        Image.new("RGB", (512, 512)).save(tmp_path / "out" / concept / str(k) / f"source{concept}_prompt{k}_0.png")
    monkeypatch.setattr(f"{PACKAGE}.evaluate.Grader", Missing)
    code, _, err = call(f"{PACKAGE}.evaluate", tmp_path / "out", concepts_json, "--num-images=1")
    assert code == 1 and "CLIP ViT-B/32 by OpenAI, is not here: bash scripts/download_weights.sh ViT-B-32" in err and err.count("\n") == 1


def test_the_judge_of_each_row(tiny_clip, monkeypatch, tmp_path, capsys):
    asked = []

    class Spy:
        def __init__(self, name, weights, *_):
            asked.append((name, weights))
            self.clip = types.SimpleNamespace(visual=types.SimpleNamespace(image_size=(64, 64)))

    monkeypatch.setattr(f"{PACKAGE}.evaluate.Grader", Spy)
    monkeypatch.setattr(f"{PACKAGE}.evaluate.WEIGHTS", tmp_path)
    unasked = types.SimpleNamespace(model=None, pretrained=None)
    judge_of(MINIATURE, unasked)
    judge_of(SD_V1, unasked)
    (tmp_path / "ViT-B-32.pt").write_bytes(b"x")
    judge_of(SD_V1, unasked)
    assert asked == [(MINIATURE.judge, None), ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32-quickgelu", str(tmp_path / "ViT-B-32.pt"))]
    capsys.readouterr()
    judge_of(SD_V1, types.SimpleNamespace(model=str(tiny_clip), pretrained=None))
    assert "its scores say next to nothing of photographs" in capsys.readouterr().out


@pytest.mark.parametrize("row", ROWS)
def test_what_a_method_needs_is_told(row, concepts_json, tmp_path, capsys):
    args = types.SimpleNamespace(row=row, input=concepts_json, checkpoint="c", runs=tmp_path)
    (tmp_path / "apart").mkdir()
    methods = check_runs(args)
    assert methods and {METHODS[method][0] for method in methods} == {"apart"}
    said = capsys.readouterr().err
    for name, (steps, flags) in row.several.runs.items():
        line = (f"it is made by: bash scripts/p3_train.sh {concepts_json} --checkpoint c --output {tmp_path / name} --sample-every 0 "
                f"--steps {' '.join([str(steps * (2 if '--joint' in flags else 1)), *flags])}\n")
        assert (line in said) == (name != "apart")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "INSTALLED", tmp_path / "embeddings")
    monkeypatch.setattr(embedding, "ROOT", tmp_path)
    return tmp_path / "embeddings"


def test_words_are_found_by_their_model(call, concepts_json, tiny_sd, tmp_path, installed):
    """The grader's call: INPUT OUT CKPT, with the words that were learned for that model, wherever it lies now. None: how to learn them."""
    drawing = [concepts_json, tmp_path / "out", tiny_sd, "--num-images=1", "--steps=1", "--dtype=fp32"]
    code, _, err = call(f"{PACKAGE}.inference", *drawing)
    learning = f"learn them with: bash scripts/p3_train.sh {concepts_json} --checkpoint {tiny_sd}"
    assert code == 1 and "no words are installed for this model" in err and learning in err
    name = model_name(MINIATURE, identify(tiny_sd))
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    for i in (1, 2):
        save_embedding(run / f"new{i}.safetensors", f"<new{i}>", torch.full((1, 32), float(i)), {"model": name})
    code, _, err = call(f"{PACKAGE}.inference", *drawing)
    assert code == 1 and f"{run} has some" in err and "scripts/install.sh" in err
    assert [path.parent for path in install(run)] == [installed / name[:-13]] * 2
    drawing[2] = shutil.copytree(tiny_sd, tmp_path / "elsewhere")
    code, out, err = call(f"{PACKAGE}.inference", *drawing)
    assert code == 0 and f"words: <new1>, <new2> of {installed_folder(name)}" in out and "note:" not in out, err


def test_the_report_is_of_the_bundled_model_alone(tmp_path):
    """What is measured on another model, or on other concepts, does not replace what the report tells."""
    own = MINIATURE.several.input
    assert report_of(None, own, own, str(MINI_SD), MINI_SD, tmp_path) == ROOT / "report"
    assert {report_of(None, *others, tmp_path) for others in ((own, own, tmp_path, MINI_SD), (tmp_path, own, MINI_SD, MINI_SD))} == {tmp_path / "report"}
    assert report_of(tmp_path / "x", own, own, MINI_SD, MINI_SD, tmp_path) == tmp_path / "x"


def test_words_of_another_model_are_told(tmp_path):
    for i, model in enumerate(["sd_v1-0123456789ab-0123456789ab", "sd_v1-0123456789ab-ffffffffffff", "sd_v1-ffffffffffff-0123456789ab", "32836059 bytes"]):
        save_embedding(tmp_path / f"{i}.safetensors", f"<new{i}>", torch.ones(1, 8), {"model": model})
    notes = check_models(models_of(tmp_path), [f"<new{i}>" for i in range(4)], "sd_v1-0123456789ab-0123456789ab")
    assert len(notes) == 2 and "<new1>" in notes[0] and "another UNet of the same text encoder" in notes[0]
    assert "<new2>" in notes[1] and "was learned with another model" in notes[1]
    assert check_models(models_of(tmp_path), ["<new0>"], "sd_v1-ffffffffffff-0123456789ab")
    assert not check_models(models_of(tmp_path), ["<new3>"], "sd_v1-ffffffffffff-0123456789ab")


def test_installing_keeps_what_was_there(installed, tmp_path):
    name = "sd_v1-0123456789ab-0123456789ab"
    path = tmp_path / "new1.safetensors"
    for value in (1.0, 2.0, 2.0, 3.0):
        save_embedding(path, "<new1>", torch.full((1, 8), value), {"model": name} if value > 1 else {})
        target, = install(path, name)
        assert read_embedding(target)[1].eq(value).all()
    assert sorted(read_embedding(p)[1].max().item() for p in (target.parent / "replaced").iterdir()) == [1.0, 2.0]
    assert list(models_of(target.parent).values()) == [("<new1>", name)]  # what was replaced is not read
    save_embedding(path, "<new1>", torch.ones(1, 8))
    with pytest.raises(UserError, match="does not tell which model <new1> was learned with; give that by --checkpoint"):
        install(path)
    with pytest.raises(UserError, match="has no words"):
        install(tmp_path / "embeddings")
    with pytest.raises(UserError, match="no words are installed"):
        find_words("sd_v1-aaaaaaaaaaaa-aaaaaaaaaaaa", "x")


def test_bundled_words_tell_their_model():
    name = model_name(MINIATURE, identify(MINI_SD))
    assert {model for _, model in models_of(installed_folder(name)).values()} == {name}


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: (folder / "unet" / "config.json").write_text("{"), r"unet/config\.json: it is not JSON"),
    (lambda folder: (folder / "unet" / "config.json").write_text("{}"), "does not tell the size of its pictures"),
    (lambda folder: (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": 3})), "does not tell the size of its pictures"),
    (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder has no model.safetensors or"),
    (lambda folder: next((folder / "unet").glob("*.safetensors")).write_bytes(b"x"), "cannot be read as a checkpoint"),
])  # fmt: skip
def test_models_that_cannot_be_known_end_in_one_line(tiny_sd, tmp_path, spoil, said):
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    spoil(folder)
    with pytest.raises(UserError, match=said) as error:
        identify(folder)
    assert "\n" not in str(error.value)


def test_a_large_checkpoint_is_read_again_only_when_it_is_another(tmp_path, monkeypatch):
    """Also when the other one has its name, size and time; and when what was kept is damaged."""
    path, read = tmp_path / "a.ckpt", []
    monkeypatch.setattr(identity, "LARGE", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "fingerprint", lambda *paths: read.append(paths) or fingerprint(*paths))
    path.write_bytes(b"weights")
    before = weights_fingerprint(path)
    assert weights_fingerprint(path) == before == fingerprint(path) and len(read) == 1
    time = path.stat().st_mtime_ns
    path.write_bytes(b"Weights")
    os.utime(path, ns=(time, time))
    assert weights_fingerprint(path) == fingerprint(path) != before and len(read) == 2
    (tmp_path / "cache" / "p3_clip" / "weights.json").write_text("[")
    assert weights_fingerprint(path) == weights_fingerprint(path) == fingerprint(path) and len(read) == 3


@pytest.mark.parametrize("command", ["zero_shot", "inference", "train", "evaluate", "figures", "experiments.compare", "experiments.several",
                                     "benchmark", "experiments.fullsize"])
def test_help_tells_of_each_flag_and_its_default_once(call, command):
    code, out, _ = call(f"p3_clip_textual_inversion.{command}", "--help")
    flags = re.split(r"\n  (?=\S)", out.partition("options:")[2])
    assert not code and len(flags) > 2 and all(len(re.split(r"\s{2,}", flag.strip(), maxsplit=1)) == 2 for flag in flags[1:]), out
    assert all(flag.count("(default:") <= 1 for flag in flags) and "default: None" not in out and "default: False" not in out
