"""Bad calls of P3's commands, files that are none, and runs that are killed or crowded: one line, or whole files."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from p3_clip_textual_inversion.clip import load_pictures
from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.custom_diffusion import read_projections, weights_of
from p3_clip_textual_inversion.data import read_data
from p3_clip_textual_inversion.diffusion import make_alpha_bar
from p3_clip_textual_inversion.embedding import check_files, read_embedding, save_embedding
from p3_clip_textual_inversion.figures import read_run
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.checkpoint import read_checkpoint
from p3_clip_textual_inversion.formats.words import own_words
from p3_clip_textual_inversion.inference import DrawConfig
from p3_clip_textual_inversion.model import load_stable_diffusion
from p3_clip_textual_inversion.pictures import read_pictures
from p3_clip_textual_inversion.samplers import SAMPLERS, leading
from p3_clip_textual_inversion.state import load_state

from .tools import check_crowded_and_killed, check_same, quick

PACKAGE = "p3_clip_textual_inversion"


@pytest.fixture
def places(tmp_path, concepts_json):
    """A file, an empty folder, words, a run that is none, drawings, and data of one class."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    for folder in ("words", "run"):
        (tmp_path / folder).mkdir()
        for i in (1, 2):
            save_embedding(tmp_path / folder / f"{i}.safetensors", f"<new{i}>", torch.ones(1, 32))
    for concept, prompt in (("0", 0), ("0", 1), ("1", 0)):
        (tmp_path / "out" / concept / str(prompt)).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / "out" / concept / str(prompt) / f"source{concept}_prompt{prompt}_0.png")
    (tmp_path / "data" / "val").mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "data" / "val" / "0_1.png")
    (tmp_path / "data" / "id2label.json").write_text('{"0": "dog"}')
    shutil.copytree(tmp_path / "data", tmp_path / "damaged")
    (tmp_path / "damaged" / "id2label.json").write_text('{"0": "dog", "1": "cat"}')
    shutil.copyfile(tmp_path / "data" / "val" / "0_1.png", tmp_path / "damaged" / "val" / "1_1.png")
    shutil.copytree(tmp_path / "damaged", tmp_path / "two")
    (tmp_path / "damaged" / "val" / "0_1.png").write_bytes((tmp_path / "data" / "val" / "0_1.png").read_bytes()[:60])
    return tmp_path


ARGUMENTS = {
    "inference": ["{t}/concepts/input.json", "{t}/new", "{sd}", "--embeddings={t}/words", "--num-images=1", "--steps=1"],
    "evaluate": ["{t}/out", "{t}/concepts/input.json", "--model={clip}", "--num-images=1"],
    "zero_shot": ["--data={t}/data", "--model={clip}", "--output={t}/new"],
    "figures": ["--runs={t}/run", "--input={t}/concepts/input.json", "--checkpoint={sd}", "--output={t}/new"],
    "experiments.several": ["{t}/concepts/input.json", "--checkpoint={sd}", "--runs={t}/new", "--report={t}/new"],
    "experiments.fullsize": [], "benchmark": [], "miniature.scores": ["--drawings={t}/no"], "miniature.drawings": ["concepts", "{t}/no"],
    "experiments.compare": ["--learned={t}/words", "--input={t}/concepts/input.json", "--checkpoint={sd}", "--model={clip}", "--output={t}/new",
                            "--num-images=1"],
    "train": ["{t}/concepts/input.json", "--checkpoint={sd}", "--output={t}/new", "--steps=1", "--batch-size=1", "--sample-every=0", "--side=64"],
}


@pytest.mark.parametrize("module, arguments, said", [
    ("train", ["--vectors=80"], "--vectors must be at most 73, not 80"),
    ("train", ["--vectors=1000000000"], "--vectors must be at most 73, not 1000000000"),
    ("train", ["--vectors=21"], "<new1> has 21 vectors, but a prompt of this model holds 24 tokens in all; expected at most 20"),
    ("train", ["--vectors=20"], "the model reads 24 tokens, and <new1> comes after them, or not whole, in"),
    ("train", ["--crops=1000000000"], "--crops must be at most 1000, not 1000000000"),
    ("train", ["--prior=1000000000", "--custom-diffusion"], "--prior must be at most 100000, not 1000000000"),
    ("train", ["--batch-size=1000000000"], "--batch-size must be at most 1,000,000, not 1,000,000,000"),
    ("train", ["--steps=1000000000"], "--steps must be at most 10000000, not 1000000000"),
    ("train", ["--lr=1e38"], "a number is too large to compute with (value cannot be converted to type float without overflow); try a smaller --lr"),
    ("inference", ["--guidance-weight=nan"], "--guidance-weight must be a finite number, not nan"),
    ("inference", ["--side=0"], "--side must be at least 1, not 0"),
    ("inference", ["--side=7"], "pictures of 7 pixels do not fit this model"),
    ("inference", ["--device=meta"], "the device 'meta' cannot be used"),
    ("inference", ["--num-images=0"], "--num-images must be between 1 and 1000000, not 0"),
    ("inference", ["--num-images=1000000000"], "--num-images must be between 1 and 1000000, not 1000000000"),
    ("inference", ["--embeddings={t}/file"], "{t}/file cannot be read as a learned word: it is a text"),
    ("inference", ["--projections={t}/no"], "no such projections: {t}/no"),
    ("evaluate", ["--num-images=0"], "--num-images must be between 1 and 1000000, not 0"),
    ("evaluate", ["--model={t}/file"], "{t}/file cannot be read as a checkpoint: it is a text"),
    ("evaluate", ["--report={t}/file"], "cannot write into folder {t}/file"),
    ("zero_shot", ["--data={t}/file"], "no such folder of labelled pictures: {t}/file"),
    ("zero_shot", ["--output={t}/file"], "cannot write into folder {t}/file"),
    ("zero_shot", ["--model={t}/empty"], "no such CLIP: {t}/empty"),
    ("figures", ["--runs={t}/no"], "{t}/no has no embeddings"),
    ("figures", [], "{t}/run/0 is not a finished run of scripts/p3_train.sh"),
    ("figures", ["--output={t}/file", "--input={t}/no"], "cannot read {t}/no"),
    ("experiments.several", ["--num-images=0"], "--num-images must be between 1 and 1000000, not 0"),
    ("experiments.several", ["--ordinary-pictures={t}/file"], "no such folder of labelled pictures: {t}/file"),
    ("experiments.several", ["--ordinary-pictures={t}/damaged"], "cannot read the picture {t}/damaged/val/0_1.png"),
    ("experiments.several", ["--ordinary-pictures={t}/data"], "{t}/data needs pictures of at least two classes"),
    ("experiments.several", ["--report={t}/file"], "cannot write into folder {t}/file/results"),
    ("experiments.several", ["--ordinary-pictures={t}/two"],
     "{t}/new has none of the trainings that are compared; the first is made by: bash scripts/p3_train.sh"),
    ("inference", ["--regions", "left"], "--regions 'left' is no region; expected auto alone, or a thing of the prompt and its box, as in '<new1>="),
    ("inference", ["--regions", "<new1>=0,0,0.5"], "--regions '<new1>=0,0,0.5' is no region"),
    ("inference", ["--regions", "auto", "<new1>=0,0,1,1"], "--regions 'auto' is no region"),
    ("inference", ["--regions", "<new1>=0,0,1.5,1"], "the box 0,0,1.5,1 of '<new1>' is none in shares of the picture"),
    ("inference", ["--regions", "<new1>=0.5,0,0.5,1"], "the box 0.5,0,0.5,1 of '<new1>' is none in shares of the picture"),
    ("inference", ["--regions", "<new1>=nan,0,1,1"], "the box nan,0,1,1 of '<new1>' is none in shares of the picture"),
    ("inference", ["--regions", "<new7>=0,0,1,1"], "--regions: '<new7>' is in none of the prompts, such as 'a <new1> on a hill'"),
    ("inference", ["--guidance-interval", "0.5", "0.2"], "--guidance-interval must be two numbers with 0 <= low <= high <= 1, not 0.5 0.2"),
    ("experiments.fullsize", ["{t}/file/x.ckpt"], "cannot write into folder {t}/file"),
    ("benchmark", ["--output={t}/file/x.json"], "cannot write into folder {t}/file"),
    ("benchmark", ["--output={t}/empty"], "cannot write the file {t}/empty: it is a folder"),
    ("benchmark", ["--steps=0"], "--steps must be at least 1, not 0"),
    ("benchmark", ["--batch-size=0"], "--batch-size must be at least 1, not 0"),
    ("benchmark", ["--images=-1"], "--images must be at least 1, not -1"),
    ("benchmark", ["--device=abacus"], "the device 'abacus' cannot be used"),
    ("experiments.compare", ["--num-images=0"], "--num-images must be between 1 and 1000000, not 0"),
    ("experiments.compare", ["--learned={t}/no"], "{t}/no has no embeddings"),
    ("miniature.scores", ["--pictures=0"], "--pictures must be at least 1, not 0"),
    ("miniature.scores", [], "cannot read the drawings {t}/no"),
    ("miniature.drawings", ["--seed=-1"], "--seed must be at least 0, not -1"),
    ("zero_shot", ["--templates={t}/file"], "the caption 'no folder' must have {{}} once"),
])
def test_bad_calls_end_in_one_line(call, places, tiny_sd, tiny_clip, module, arguments, said):
    code, _, err = call(f"{PACKAGE}.{module}", *(a.format(t=places, sd=tiny_sd, clip=tiny_clip) for a in ARGUMENTS[module] + arguments))
    lines = err.strip().splitlines()
    assert code == 1 and lines[-1].startswith("error: ") and said.format(t=places) in lines[-1], err
    assert len(lines) == 1 or "--side=7" in arguments
    assert not [path for path in (places / "new").rglob("*") if path.is_file()]


def test_pictures_that_are_not_finite_are_refused(call, places, tiny_sd):
    arguments = [a.format(t=places, sd=tiny_sd) for a in ARGUMENTS["inference"]]
    code, _, err = call(f"{PACKAGE}.inference", *arguments, "--guidance-weight=1e39")
    assert code == 1 and err.strip().splitlines()[-1].startswith("error: a picture of 'a <new1> on a hill' is not finite; try --dtype fp32 or"), err
    assert not list(places.glob("new/**/*.png"))


def test_pass_marks_that_cannot_be_written_are_said_before_anything_is_drawn(call, places, tiny_sd, tiny_clip, monkeypatch):
    monkeypatch.setattr(f"{PACKAGE}.experiments.compare.writable_file", lambda path: (_ for _ in ()).throw(UserError(f"cannot write the file {path}")))
    monkeypatch.setattr(f"{PACKAGE}.experiments.compare.score_way", lambda *_: pytest.fail("long work started"))
    arguments = [a.format(t=places, sd=tiny_sd, clip=tiny_clip) for a in ARGUMENTS["experiments.compare"]]
    code, _, err = call(f"{PACKAGE}.experiments.compare", *arguments, "--write-baselines")
    assert code == 1 and err == f"error: cannot write the file {places / 'concepts' / 'input.json'}\n"


def test_styles_alone_are_refused_before_anything_is_trained(call, places, tiny_sd, tiny_clip):
    content = json.loads((places / "concepts" / "input.json").read_text())
    (places / "concepts" / "styles.json").write_text(json.dumps({"1": content["1"]}))
    arguments = [a.format(t=places, sd=tiny_sd, clip=tiny_clip) for a in ARGUMENTS["experiments.several"][1:]]
    code, _, err = call(f"{PACKAGE}.experiments.several", places / "concepts" / "styles.json", *arguments, "--model", tiny_clip,
                        "--ordinary-pictures", places / "data")
    assert code == 1 and "has no subject, only styles" in err, err


def test_a_model_that_has_the_word_already(call, places, tiny_sd):
    """As trainings leave it that write their word into the model."""
    shutil.copytree(tiny_sd, places / "sd")
    parts = load_stable_diffusion(places / "sd")
    parts.tokenizer.add_tokens(["<new1>"])
    parts.text_encoder.resize_token_embeddings(len(parts.tokenizer))
    parts.tokenizer.save_pretrained(places / "sd" / "tokenizer")
    parts.text_encoder.save_pretrained(places / "sd" / "text_encoder")
    (rows,) = own_words(places / "sd").values()
    assert rows.equal(parts.text_encoder.get_input_embeddings().weight[-1:].float()) and own_words(tiny_sd) == {}
    path = places / "concepts" / "input.json"
    path.write_text(json.dumps({"0": json.loads(path.read_text())["0"]}))
    arguments = [a.format(t=places, sd=places / "sd") for a in ARGUMENTS["inference"]]
    pictures = {}
    one = ["--embeddings", f"<new1>={places / 'words' / '1.safetensors'}"]
    for name, flags in (("given", ["--embeddings", places / "words"]), ("named", one), ("own", []), ("again", ["--embeddings", places / "rows"])):
        if name == "again":
            save_embedding(places / "rows" / "new1.safetensors", "<new1>", rows) if (places / "rows").mkdir() is None else None
        code, out, err = call(f"{PACKAGE}.inference", arguments[0], places / name, *[a for a in arguments[2:] if not a.startswith("--embeddings")], *flags)
        assert code == 0, err
        pictures[name] = (places / name / "0" / "0" / "source0_prompt0_0.png")
    given, named, own, again = (np.asarray(Image.open(path)) for path in pictures.values())
    assert (own == again).all() and (own != given).any() and (named == given).all()
    code, out, err = call(f"{PACKAGE}.redraw", pictures["own"], "--output", places / "redrawn.png")
    assert code == 0 and "byte for byte" in out, out + err
    code, _, err = call(f"{PACKAGE}.train", *(a.format(t=places, sd=places / "sd") for a in ARGUMENTS["train"]))
    assert code == 0 and (places / "new" / "new1.safetensors").is_file(), err


@pytest.mark.parametrize("changed, said", [
    ({"src_image": ["cat2", "dog6"], "token_name": ["<cat2>", "<dog6>"], "prompt": "A <cat2> on the right and a <dog6> on the left."},
     r"prompts\.json of the challenge of several concepts"),
    ({"token_name": "two words", "prompt": ["two words"]}, "must be one word without spaces"),
    ({"token_name": "<a>\n<b>", "prompt": ["<a>\n<b>"]}, "must be one word without spaces"),
    ({"prompt": ["a <new1> \ud800"]}, "cannot read"), ({"src_image": "\udfff"}, "cannot read"),
    ({"baseline": [[10**400, 1]]}, "baseline must be a pair"), ({"baseline": [[float("nan"), 1]]}, "NaN is no number of JSON")])
def test_wrong_concepts(tmp_path, changed, said):
    entry = {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1>"]} | changed
    (tmp_path / "input.json").write_text(json.dumps({"0": entry}))
    with pytest.raises(UserError, match=said) as error:
        read_concepts(tmp_path / "input.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["a\0b", "a\nb", "\ud800", ".."])
def test_concepts_that_are_no_folders_are_refused(tmp_path, number):
    (tmp_path / "input.json").write_text(json.dumps({number: {"token_name": "<new1>", "prompt": ["a <new1>"]}}))
    with pytest.raises(UserError, match=r"input\.json") as error:
        read_concepts(tmp_path / "input.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", ["[" * 100_000, '{"0": "\\ud800"}', '{"0": null}'])
def test_wrong_labels(places, labels):
    (places / "data" / "id2label.json").write_text(labels)
    with pytest.raises(UserError, match=r"id2label\.json"):
        read_data(places / "data")


def test_labels_are_shown_as_they_are(call, places, tiny_clip):
    """Not as mathematics, which charts write between two dollar signs, and which this would not be."""
    (places / "data" / "id2label.json").write_text('{"0": "$a_$ {b} 数字"}')
    code, _, err = call(f"{PACKAGE}.zero_shot", *(a.format(t=places, clip=tiny_clip) for a in ARGUMENTS["zero_shot"]))
    assert code == 0 and (places / "new" / "examples.png").is_file(), err


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"#\none\n", mtime=0), gzip.compress(b"#\na b\n", mtime=0)[:-9]])
def test_a_damaged_vocabulary_is_named(call, places, tiny_clip, content):
    folder = shutil.copytree(tiny_clip, places / "clip")
    (folder / "bpe.txt.gz").write_bytes(content)
    code, _, err = call(f"{PACKAGE}.zero_shot", "--data", places / "data", "--model", folder, "--output", places / "new")
    assert code == 1 and err.startswith("error: ") and "bpe.txt.gz" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("change", [{"beta_start": None}, {"beta_end": "x"}, {"num_train_timesteps": -1}, {"num_train_timesteps": 10}, {}])
def test_a_damaged_schedule_is_named(tiny_sd, tmp_path, change):
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | change
    if not change:
        del config["beta_start"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the schedule of .*sd lacks or garbles"):
        load_stable_diffusion(folder)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("num_steps", [1, 999, 1000])
def test_as_many_steps_as_are_allowed(sampler, num_steps):
    alpha_bar, x = make_alpha_bar(), torch.ones(1, 4, 2, 2)
    asked = [state.t for state in DrawConfig(sampler, num_steps).states(lambda x, t: (x, torch.zeros_like(x)), alpha_bar, lambda: x)]
    assert len(asked) == len(set(asked)) == num_steps and asked == sorted(asked, reverse=True) and 0 <= asked[-1] <= asked[0] <= 999
    assert leading(alpha_bar, 50).t[::49] == (981, 1)


def test_tensors_of_other_kinds(tmp_path):
    save_file({"<new1>": torch.ones(1, 8).to(torch.float8_e4m3fn)}, tmp_path / "eight_bits.safetensors")
    assert read_embedding(tmp_path / "eight_bits.safetensors")[1].eq(1).all()
    for word in ("two words", "a\nb"):
        save_file({word: torch.ones(1, 8)}, tmp_path / "word.safetensors")
        with pytest.raises(UserError, match=r"word\.safetensors names its word") as error:
            read_embedding(tmp_path / "word.safetensors")
        assert "\n" not in str(error.value)
    torch.save({"state_dict": {"a": torch.ones(2, device="meta"), "b": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt holds a as a tensor that is not dense"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("history", ["3", "[3]", '[{"step": 1}]', "[" * 100_000, "{"])
def test_a_run_of_something_else_is_refused(tmp_path, history):
    save_file({"000000": torch.zeros(1, 8)}, tmp_path / "snapshots.safetensors")
    (tmp_path / "history.json").write_text(history)
    with pytest.raises(UserError, match=r"is not a finished run of scripts/p3_train\.sh"):
        read_run(tmp_path)


def test_figures_of_a_word_that_was_not_learned(call, places, tiny_sd):
    path = places / "concepts" / "input.json"
    path.write_text(path.read_text().replace("<new2>", "<new7>"))
    code, _, err = call(f"{PACKAGE}.figures", *(a.format(t=places, sd=tiny_sd) for a in ARGUMENTS["figures"]))
    assert code == 1 and "run has no embedding of <new7> (only <new1>, <new2> (2.safetensors))" in err


@pytest.mark.parametrize("words, said", [(("<new1>", "<a:b>", "<ab>"), "their files would be new1.safetensors, ab.safetensors, ab.safetensors"),
                                         (("<A>", "<a>"), "must differ in more than"), (("<new1>", "<>"), "'<>' gives its file no name"),
                                         (("<.a>",), "gives its file no name")])
def test_words_whose_files_would_clash_are_refused(words, said):
    check_files(["<new1>", "<new2>"])
    with pytest.raises(UserError, match=re.escape(said)):
        check_files(words)


def test_training_refuses_words_whose_files_would_clash_before_it_loads_a_model(call, places, tiny_sd, monkeypatch):
    monkeypatch.setattr(f"{PACKAGE}.train.load_stable_diffusion", lambda *_: pytest.fail("long work started"))
    path = places / "concepts" / "input.json"
    path.write_text(path.read_text().replace("<new2>", "<new:1>"))
    code, _, err = call(f"{PACKAGE}.train", path, "--checkpoint", tiny_sd, "--output", places / "new")
    assert code == 1 and "must differ in more than" in err and err.count("\n") == 1, err


def test_half_written_files_of_a_killed_run_are_not_counted_or_read(call, places, tiny_clip, tiny_sd):
    for path in (places / "out" / "0" / "0" / ".source0_prompt0_0.png.partx.png", places / "data" / "val" / ".0_2.png", places / "words" / ".1.safetensors"):
        path.write_bytes(b"half")
    for module in ("evaluate", "zero_shot", "inference"):
        code, _, err = call(f"{PACKAGE}.{module}", *(a.format(t=places, sd=tiny_sd, clip=tiny_clip) for a in ARGUMENTS[module]))
        assert code == 0, err


@pytest.mark.parametrize("content", [3, {}, {"settings": None}, {"settings": [1]}, {"settings": {"lr": 1}}])
def test_a_state_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt (is not a training state|belongs to a run with other settings)"):
        load_state(tmp_path / "state.pt", {"lr": 2})


@pytest.fixture(scope="module")
def unet(tiny_sd):
    return load_stable_diffusion(tiny_sd).unet


@quick
@given(length=st.integers(0, 4000), changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6))
def test_damaged_projections(tmp_path, unet, length, changes):
    content = bytearray(save(weights_of(unet)))
    content = content[:length] if length < 2000 else content
    for position, value in changes:
        if content:
            content[position % min(len(content), 4000)] = value  # where its header is
    (tmp_path / "a.safetensors").write_bytes(content)
    try:
        assert read_projections(tmp_path / "a.safetensors", unet).keys() >= weights_of(unet).keys()
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("error", [RuntimeError, OverflowError, NotImplementedError])
def test_whatever_a_decoder_raises_names_the_picture(places, monkeypatch, error):
    """As those of damaged AVIF, Spider and DDS do, which a file called .png may hold."""
    def fail(*_, **__):
        raise error("damaged")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match=r"has no readable picture \(not 0_1\.png\)"):
        read_pictures(places / "data" / "val")
    with pytest.raises(UserError, match=r"cannot read the picture .*0_1\.png"):
        list(load_pictures([places / "data" / "val" / "0_1.png"], lambda picture: picture, 1))


def test_crowded_and_killed_runs_leave_the_pictures_of_one_run(call, command, one_thread, places, tiny_sd):
    """And the next run adds those that the killed one lacks."""
    def arguments(output):
        return [places / "concepts" / "input.json", output, tiny_sd, "--embeddings", places / "words", "--num-images=1", "--steps=1", "--dtype=fp32",
                "--batch-size=1"]

    alone, killed = check_crowded_and_killed(arguments, places, call, command, count=3, killed_at=2)
    assert call("inference", *arguments(killed))[0] == 0
    check_same(killed, alone, 3)
