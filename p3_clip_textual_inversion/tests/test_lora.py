"""LoRA with pivotal tuning: learning, resuming, files of three formats, merging, drawing, what does not fit."""

import itertools
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from p3_clip_textual_inversion import inference, state, train, training
from p3_clip_textual_inversion.defaults import MINIATURE
from p3_clip_textual_inversion.embedding import check_files, file_of, install, read_embedding, save_embedding
from p3_clip_textual_inversion.experiments import compare, several
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.words import word_files
from p3_clip_textual_inversion.inference import DrawConfig
from p3_clip_textual_inversion.lora import TARGETS, Added, fit, free_directions, keep_free, lora_file, read_lora
from p3_clip_textual_inversion.model import load_stable_diffusion
from p3_clip_textual_inversion.provenance import RECORD, read_made

PACKAGE = "p3_clip_textual_inversion"
WIDTH = 32


@pytest.fixture(scope="module")
def places(tiny_sd, tmp_path_factory):
    """A folder with an input.json of two concepts, `whole` (the first one's word and weights, learned at once) and `stopped` (likewise, broken off after the
    pivot and continued), and the state at the pivot."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "0").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)).save(folder / "0" / "0.png")
    content = {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1> on a hill"]},
               "1": {"src_image": "car", "token_name": "<new2>", "prompt": ["a <new2>"]}}
    (folder / "input.json").write_text(json.dumps(content))

    def learn(output):
        flags = ["--lora=2", "--lr-lora=1e-2", "--steps=4", "--pivot=0.5", "--save-every=2", "--batch-size=2", "--crops=1", "--vectors=1", "--prior=1",
                 "--sample-every=0", "--validate-every=2", "--dtype=fp32", "--concepts=0"]
        AcceleratorState._reset_state(True)  # of another test file's training, perhaps with another number format
        patch.setattr(sys, "argv", ["train", *map(str, [folder / "input.json", "--checkpoint", tiny_sd, "--output", output, *flags])])
        train.main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DrawConfig", lambda **settings: DrawConfig(**settings | {"num_steps": 1}))
        falling = itertools.count(100, -1)
        patch.setattr(training.Validation, "__call__", lambda *_: {"validation": float(next(falling))})  # so that the last state is kept
        learn(folder / "whole")
        write, saved = torch.save, []

        with patch.context() as inner:
            inner.setattr(torch, "save", lambda content, path: (write(content, path), saved.append(torch.load(path)["trained"])))
            inner.setattr(state, "refuse_nonfinite", lambda step, *_: step == 3 and (_ for _ in ()).throw(KeyboardInterrupt))
            inner.setattr(train, "LOG_EVERY", 1)
            with pytest.raises(KeyboardInterrupt):
                learn(folder / "stopped")
        learn(folder / "stopped")
    return types.SimpleNamespace(folder=folder, at_pivot=saved[0])


def loaded(tiny_sd, path):
    """(Stable Diffusion, `Added` with the weights of a file put in)"""
    parts = load_stable_diffusion(tiny_sd)
    added = Added({"it": fit(path, read_lora(path)[0], parts)})
    added.use(["it"])
    return parts, added


def test_the_word_learns_alone_then_the_weights_learn_too_and_a_stopped_run_ends_with_the_same(places):
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for name, tensor in places.at_pivot.items() if "lora_B" in name)
    whole, stopped = (load_file(lora_file(file_of(places.folder / run, "<new1>"))) for run in ("whole", "stopped"))
    assert len(whole) == 2 * len(TARGETS) * 16 and whole.keys() == stopped.keys()
    assert all(tensor.abs().max() > 1e-3 for name, tensor in whole.items() if "lora_B" in name)
    assert all(torch.allclose(whole[name], stopped[name], atol=1e-6) for name in whole)
    words = [read_embedding(file_of(places.folder / run, "<new1>"))[1] for run in ("whole", "stopped")]
    assert torch.allclose(*words, atol=1e-6)


def test_three_programs_draw_the_same(places, tiny_sd):
    """Our reader on both files, and diffusers on both, give one and the same network."""
    ours, kohya = lora_file(file_of(places.folder / "whole", "<new1>")), places.folder / "whole" / "0" / "new1_lora_kohya.safetensors"
    torch.manual_seed(0)
    given = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 7, WIDTH)
    with torch.no_grad():
        results = [loaded(tiny_sd, path)[0].unet(*given).sample for path in (ours, kohya)]
        plain = load_stable_diffusion(tiny_sd).unet(*given).sample
        for path in (ours, kohya):
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
            results.append(pipeline.unet(*given).sample)
    assert (results[0] - plain).abs().max() > 1e-3
    assert all(torch.allclose(results[0], other, atol=1e-5) for other in results[1:])


def test_weights_come_off_again_bit_for_bit_and_several_add_up(places, tiny_sd):
    path = lora_file(file_of(places.folder / "whole", "<new1>"))
    parts, plain = load_stable_diffusion(tiny_sd), load_stable_diffusion(tiny_sd).unet.state_dict()
    factors = fit(path, read_lora(path)[0], parts)
    added, module = Added({"a": factors, "b": factors}, scale=0.5), parts.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    content = load_file(path)
    product = content[f"unet.{name.replace('weight', 'lora_B.weight')}"] @ content[f"unet.{name.replace('weight', 'lora_A.weight')}"]
    for sets, times in ((["a"], 0.5), (["a", "b"], 1.0), (["b"], 0.5)):
        added.use(sets)
        assert torch.allclose(module.weight, plain[name] + times * product, atol=1e-6)
    added.use([])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in parts.unet.state_dict().items())


def test_several_sums_what_learned_apart_and_leaves_it_in_the_model(places, tiny_sd, tmp_path):
    """As other programs have it: also for prompts without a word."""
    folder, concepts = tmp_path / "lora_apart", [types.SimpleNamespace(token=f"<new{i}>", number=str(i)) for i in (1, 3)]
    folder.mkdir()
    rows, metadata = read_embedding(file_of(places.folder / "whole", "<new1>"))[1:]
    for concept in concepts:
        save_embedding(file_of(folder, concept.token), concept.token, rows, metadata)
        shutil.copy(lora_file(file_of(places.folder / "whole", "<new1>")), lora_file(file_of(folder, concept.token)))
    args = types.SimpleNamespace(runs=tmp_path, checkpoint=str(tiny_sd))
    parts, counts, made_of = several.prepare("LoRA, apart, summed", args, concepts, "miniature-0-0", torch.device("cpu"), DrawConfig(num_steps=1))
    assert counts == {"<new1>": 1, "<new3>": 1} and len(made_of["projections"]) == 2
    name, content = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", load_file(lora_file(file_of(folder, "<new3>")))
    product = content[f"unet.{name}.lora_B.weight"] @ content[f"unet.{name}.lora_A.weight"]
    assert product.abs().max() > 1e-4
    before = load_stable_diffusion(tiny_sd).unet.get_submodule(name).weight
    assert torch.allclose(parts.unet.get_submodule(name).weight, before + 2 * product, atol=1e-6)


def test_pictures_know_their_weights_and_only_prompts_with_the_word_get_them(call, places, tiny_sd, tmp_path, monkeypatch):
    save_file({"<new2>": torch.full((1, WIDTH), 0.1)}, tmp_path / "new2.safetensors")
    flags = ["--num-images=2", "--steps=2", "--dtype=fp32", "--batch-size=2"]

    def infer(output, *more):
        code, out, err = call(f"{PACKAGE}.inference", places.folder / "input.json", tmp_path / output, tiny_sd, "--embeddings", places.folder / "whole",
                              "--embeddings", tmp_path / "new2.safetensors", *flags, *more)
        assert code == 0, err
        return [(tmp_path / output / number / "0" / f"source{number}_prompt0_1.png") for number in "01"], out

    (with_it, other), out = infer("a")
    assert f"weights of low rank: {lora_file(file_of(places.folder / 'whole', '<new1>'))}\n" in out
    (without, same), out = infer("b", "--lora-scale=0")
    assert "low rank" not in out and with_it.read_bytes() != without.read_bytes()
    pixels = [np.asarray(Image.open(path)) for path in (with_it, without, other, same)]
    assert not np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[2], pixels[3])
    made = [read_made(path)["of"].get("lora") for path in (with_it, without, other)]
    assert list(made[0]) == ["<new1>"] and made[0]["<new1>"].startswith("1 x ") and made[1:] == [None, {}]
    code, out, err = call(f"{PACKAGE}.redraw", with_it, "--output", tmp_path / "again.png")
    assert code == 0 and "byte for byte" in out, err
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    weights = record["where"].pop("lora")["<new1>"]
    (tmp_path / "a" / RECORD).write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)  # where the weights are looked for that no record tells of
    code, out, err = call(f"{PACKAGE}.redraw", with_it, "--output", tmp_path / "again.png")
    assert code == 1 and "the LoRA <new1>_lora.safetensors is no longer there" in err, err
    shutil.copy(weights, "<new1>_lora.safetensors")
    code, out, err = call(f"{PACKAGE}.redraw", with_it, "--output", tmp_path / "again.png")
    assert code == 0 and "byte for byte" in out, err
    (given, _), _ = infer("c", "--lora", places.folder / "whole" / "0" / "new1_lora_kohya.safetensors", "--lora-scale=0.5")
    assert list(read_made(given)["of"]["lora"]) == ["<new1>", "new1_lora_kohya.safetensors"]
    assert np.abs(np.asarray(Image.open(given)).astype(int) - pixels[0]).max() <= 1  # half of each makes one


def test_missing_pictures_of_two_runs_of_the_same_weights_are_not_drawn_together(call, places, tiny_sd, tmp_path, monkeypatch):
    """Where the pictures between them, of other weights, are there: the last bits of a picture depend on those beside it."""
    content = {"0": {"token_name": "<new2>", "prompt": ["a <new2> and a <new1>", "a <new2>", "a <new1> and a <new2>"]}}
    (tmp_path / "input.json").write_text(json.dumps(content))
    save_file({"<new2>": torch.full((1, WIDTH), 0.1)}, tmp_path / "new2.safetensors")
    drawn, generate_share = [], inference.generate_share
    monkeypatch.setattr(inference, "generate_share", lambda parts, texts, names, *rest: drawn.append(names) or generate_share(parts, texts, names, *rest))

    def infer():
        code, _, err = call(f"{PACKAGE}.inference", tmp_path / "input.json", tmp_path / "out", tiny_sd, "--embeddings", places.folder / "whole",
                            "--embeddings", tmp_path / "new2.safetensors", "--num-images=2", "--steps=1", "--batch-size=3")
        assert code == 0, err
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}

    before = infer()
    for prompt in (0, 2):
        (tmp_path / "out" / "0" / str(prompt) / f"source0_prompt{prompt}_1.png").unlink()
    assert infer() == before and [len(names) for names in drawn] == [2, 2, 2, 2, 2] and drawn[3:] == [drawn[0], drawn[2]]


def test_weights_do_not_hear_what_ordinary_prompts_say(tiny_sd):
    """A cut to the free directions answers an ordinary caption, also one of words that were not asked for, with next to nothing, other states fully."""
    parts = load_stable_diffusion(tiny_sd)
    free = free_directions(parts, ("a drawing of a {}",), 0.99)
    assert torch.allclose(free @ free, free, atol=1e-5) and 0 < round(free.trace().item()) < WIDTH
    assert free_directions(parts, ("a drawing of a {}",), 0) is None
    generator = torch.Generator().manual_seed(0)
    weights = {"x.lora_A.weight": torch.randn(4, WIDTH, generator=generator), "x.lora_B.weight": torch.randn(4, WIDTH, generator=generator)}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    keep_free(weights, free)
    with torch.no_grad():
        hidden = parts.encode_text(["a red car near the river", "two houses"]).flatten(0, 1)
        heard, all_of_it = ((hidden @ of["x.lora_A.weight"].T).norm() for of in (weights, before))
    assert heard < 0.25 * all_of_it
    assert torch.equal(weights["x.lora_B.weight"], before["x.lora_B.weight"])
    assert torch.allclose(weights["x.lora_A.weight"] @ free, before["x.lora_A.weight"] @ free, atol=1e-5)


def test_compare_draws_with_the_weights_and_tells_how_ordinary_prompts_move(call, places, tiny_sd, tiny_clip, tmp_path):
    """The same word with its weights and without differs, and so do ordinary prompts while the weights are in the model."""
    content = json.loads((places.folder / "input.json").read_text())
    (places.folder / "one.json").write_text(json.dumps({"0": content["0"]}))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(places.folder / "whole" / "new1.safetensors", alone)
    code, out, err = call(f"{PACKAGE}.experiments.compare", "--learned", places.folder / "whole", alone, "--input", places.folder / "one.json",
                          "--checkpoint", tiny_sd, "--model", tiny_clip, "--num-images=2", "--steps=1", "--dtype=fp32", "--output", tmp_path / "report")
    assert code == 0 and "in the model: moved by <new1> " in out and "without them it shows less" in err, err
    results = json.loads((tmp_path / "report" / "results" / "p3_compare.json").read_text())
    scores = {way: rows[0]["image"] for way, rows in results["ways"].items() if way.startswith("learned")}
    assert len(set(scores.values())) == 2
    assert list(results["drift"]) == [f"learned ({places.folder / 'whole'})"] and results["drift"].popitem()[1]["<new1>"]["grey_levels"] > 0


def test_how_far_prompts_move_with_one_runs_weights_does_not_depend_on_anothers(places, tiny_sd, monkeypatch):
    monkeypatch.setattr(compare, "drift", lambda pictures, originals, _: float(np.abs(np.stack(pictures).astype(int) - np.stack(originals)).mean()))
    file = lora_file(file_of(places.folder / "whole", "<new1>"))
    runs = {"a": {"<new1>": file}, "b": {"<new1>": file}, "jointly": {"<new1>": file, "<new3>": file}}
    moved = compare.drifts_of(str(tiny_sd), MINIATURE, runs, DrawConfig(num_steps=1), torch.device("cpu"), None)
    assert moved["a"] == moved["b"] and moved["a"]["<new1>"] > 0
    assert moved["jointly"]["<new1> + <new3>"] == moved["a"]["<new1>"]  # what learned together counts once, as in drawing


def layer(width=WIDTH, name="unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", rank=2):
    return {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(64, rank)}


A, B = layer()
WRONG = {
    "SD 2": (layer(1024), "for another model, Stable Diffusion 2: its cross-attention reads 1,024 numbers a token, this model's 32"),
    "SD XL": (layer(2048), "for another model, Stable Diffusion XL"),
    "SD XL by its encoder": ({f"lora_te2_x.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}, "for another model, Stable Diffusion XL"),
    "another layer": (layer() | layer(name="unet.no.such"), "it has weights for unet.no.such, which this model has not"),
    "another width": ({A: torch.ones(2, WIDTH), B: torch.ones(65, 2)}, r"is for \(65, 32\), this model has \(64, 32\)"),
    "half": ({A: torch.ones(2, WIDTH)}, "has only down of unet.mid_block"),
    "ranks": ({A: torch.ones(2, WIDTH), B: torch.ones(64, 3)}, "expected .out, rank. and .rank, in."),
    "not finite": ({A: torch.full((2, WIDTH), torch.nan), B: torch.ones(64, 2)}, "not finite"),
    "integers": ({A: torch.ones(2, WIDTH, dtype=torch.int64), B: torch.ones(64, 2)}, "as int64; expected floating point"),
    "alpha": (layer() | {A.replace("lora_A.weight", "alpha"): torch.tensor(torch.inf)}, "no number as alpha"),
    "twice": (layer() | layer(name="lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"), "a layer twice"),
    "DoRA": (layer() | {A.replace("lora_A.weight", "dora_scale"): torch.ones(64)}, "of DoRA, which is not read here"),
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "of LoHa, which is not read here"),
    "more": (layer() | {"unet.conv_in.bias": torch.ones(3)}, "also has unet.conv_in.bias"),
    "a word": ({"<new1>": torch.ones(1, WIDTH)}, "is no LoRA"),
}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 48, 64, 64), cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8)
    return types.SimpleNamespace(unet=unet, text_encoder=torch.nn.Sequential())


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_in_one_line(case, model, tmp_path):
    content, message = WRONG[case]
    save_file(content, tmp_path / "it.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        fit(tmp_path / "it.safetensors", read_lora(tmp_path / "it.safetensors")[0], model)
    assert "\n" not in str(caught.value) and str(tmp_path / "it.safetensors") in str(caught.value)


@pytest.mark.parametrize(("told", "result"), [({"unet.r": 2, "unet.lora_alpha": 4}, 2.0), ({}, 1.0), ({"unet.use_rslora": True}, "use_rslora True"),
                                              ({"unet.alpha_pattern": {"to_k": 1}}, "alpha_pattern")])
def test_what_diffusers_tells_of_alpha_is_obeyed_or_refused(told, result, tmp_path):
    save_file(layer(), tmp_path / "it.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    if isinstance(result, float):
        assert [factors.scale for factors in read_lora(tmp_path / "it.safetensors")[0].values()] == [result]
    else:
        with pytest.raises(UserError, match=f"{result}.*not obeyed"):
            read_lora(tmp_path / "it.safetensors")


def test_a_damaged_header_is_one_line(tmp_path):
    save_file(layer(), tmp_path / "it.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="damaged lora_adapter_metadata"):
        read_lora(tmp_path / "it.safetensors")


def test_older_names_and_pickles_are_read(model, tmp_path):
    base = "mid_block.attentions.0.transformer_blocks.0.attn2"
    older = {f"{base}.processor.to_out_lora.{part}.weight": tensor for part, tensor in (("down", torch.ones(2, 64)), ("up", torch.ones(64, 2)))}
    torch.save(older, tmp_path / "pytorch_lora_weights.bin")
    factors = fit("it", read_lora(tmp_path / "pytorch_lora_weights.bin")[0], model)
    assert list(factors) == [model.unet.get_submodule(f"{base}.to_out.0")]


def test_files_of_words_and_of_weights_are_told_apart(places, tmp_path):
    assert [path.name for path in word_files(places.folder / "whole")] == ["new1.safetensors"]
    with pytest.raises(UserError, match="is no word but weights"):
        read_embedding(lora_file(places.folder / "whole" / "new1.safetensors"))
    with pytest.raises(UserError, match="does not end in _lora"):
        check_files(["<a_lora>"])


def test_weights_are_installed_with_their_word_and_leave_with_it(places, monkeypatch, tmp_path):
    monkeypatch.setattr(f"{PACKAGE}.embedding.INSTALLED", tmp_path)
    word, weights = install(places.folder / "whole")
    assert weights == lora_file(word) and weights.read_bytes() == lora_file(places.folder / "whole" / "new1.safetensors").read_bytes()
    alone = tmp_path / "alone"
    alone.mkdir()
    rows, metadata = read_embedding(word)[1:]
    save_file({"<new1>": rows + 1}, alone / "new1.safetensors", metadata)
    assert install(alone) == [word] and not weights.exists()
    assert sorted(path.name for path in (word.parent / "replaced").iterdir()) == ["new1_0.safetensors", "new1_lora_0.safetensors"]


def test_flags_that_exclude_each_other(call, places, tiny_sd, tmp_path):
    code, _, err = call(f"{PACKAGE}.train", places.folder / "input.json", "--checkpoint", tiny_sd, "--output", tmp_path, "--lora", "--custom-diffusion")
    assert code == 1 and "--lora and --custom-diffusion both" in err
