"""Learning, files of embeddings, drawing and grading."""

import io
import itertools
import json
import shutil
import signal
import time
import types

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from p3_clip_textual_inversion import diffusion, training
from p3_clip_textual_inversion.clip import Grader
from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.data import CAPTIONS, example_pictures, read_captions, varied
from p3_clip_textual_inversion.defaults import MINIATURE
from p3_clip_textual_inversion.embedding import add_words, expand, file_of, initial_rows, nearest_words, read_embedding, save_embedding
from p3_clip_textual_inversion.evaluate import Rule, best_of, clip_scores, passes
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.identity import identify
from p3_clip_textual_inversion.formats.words import gather
from p3_clip_textual_inversion.inference import DrawConfig, generate
from p3_clip_textual_inversion.model import load_stable_diffusion
from p3_clip_textual_inversion.objective import Best, Loss
from p3_clip_textual_inversion.pictures import read_pictures
from p3_clip_textual_inversion.samplers import ImageNoise
from p3_clip_textual_inversion.sources import Source, counts_of, draw_batch, make_held, make_sources
from p3_clip_textual_inversion.train import first_rows

from .conftest import FEW

PACKAGE = "p3_clip_textual_inversion"
# A training in a process of its own, `python -c AS_HERE -m MODULE ARGUMENTS...`, with as few kept latents as those in this one.
AS_HERE = f"import sys; from {PACKAGE} import files, objective, train; objective.VALIDATED = {FEW}; del sys.argv[1:3]; files.run(train.main)"


@pytest.fixture
def parts(tiny_sd):
    return load_stable_diffusion(tiny_sd)


def train_arguments(concepts_json, tiny_sd, output, **changed):
    options = {"steps": 4, "vectors": 1, "batch-size": 2, "crops": 2, "save-every": 2, "sample-every": 0, "dtype": "fp32"} | changed
    return [concepts_json, "--checkpoint", tiny_sd, "--output", output, *(f"--{name}={value}" for name, value in options.items())]


def test_only_the_new_rows_learn(parts):
    """All vectors of the word are in the prompt, all of them move, and nothing else in the model does."""
    before = {name: tensor.clone() for model in (parts.text_encoder, parts.unet, parts.vae) for name, tensor in model.state_dict().items()}
    table = parts.text_encoder.get_input_embeddings().weight.clone()
    rows = torch.randn(3, 32) * 0.1
    learned = add_words(parts, {"<new1>": rows})
    ids = parts.tokens([expand("a drawing of a <new1>, a <new1>", {"<new1>": 3})])
    assert (ids >= len(table)).sum() == 6
    optimizer = torch.optim.AdamW([p for p in Loss(parts, None).parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(3, 32)]
    x, loss = torch.randn(1, 4, 8, 8), Loss(parts, None)
    for _ in range(3):
        loss(x, torch.tensor([300]), torch.randn_like(x), ids, torch.tensor([0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ((learned.rows - rows).abs() > 1e-3).any(dim=1).all()
    assert torch.equal(learned.table.weight, table)
    after = {name: tensor for model in (parts.text_encoder, parts.unet, parts.vae) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, after.get(name, after.get(name.replace("token_embedding.weight", "token_embedding.table.weight"))))
               for name, tensor in before.items())


def test_gradient_agrees_with_a_resized_table(tiny_sd):
    """The same loss and the same gradient as when transformers itself makes the table longer."""
    ours, theirs = load_stable_diffusion(tiny_sd), load_stable_diffusion(tiny_sd)
    rows = torch.randn(2, 32) * 0.1
    learned = add_words(ours, {"<new1>": rows})
    theirs.tokenizer.add_tokens(["<new1>", "<new1>_1"])
    theirs.text_encoder.resize_token_embeddings(len(theirs.tokenizer), mean_resizing=False)
    table = theirs.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    table.data[-2:] = rows
    x, eps, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([400])
    losses = []
    for parts in (ours, theirs):
        loss = Loss(parts, None)
        losses.append(loss(x, t, eps, *loss.ids(["a <new1> <new1>_1 on a hill"])))
        losses[-1].backward()
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    assert torch.allclose(learned.rows.grad, table.grad[-2:], atol=1e-6)


def test_file_loads_into_a_stock_pipeline_and_draws_the_same(parts, tiny_sd, tmp_path):
    vectors = {"<new1>": torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) * 0.1}
    path = file_of(tmp_path, "<new1>")
    save_embedding(path, "<new1>", vectors["<new1>"], {"steps": "3"})
    assert path.name == "new1.safetensors"
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {"<new1>": (2, 32)}
    word, rows, metadata = read_embedding(path)
    assert (word, metadata["steps"]) == ("<new1>", "3")
    assert torch.equal(rows, vectors["<new1>"])

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_textual_inversion(str(path))
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise(0, ["x", "y"], (4, 8, 8))()
    theirs = pipeline(["a <new1> on a hill"] * 2, latents=noise, num_inference_steps=10, guidance_scale=4.0, output_type="np").images
    add_words(parts, gather([tmp_path], [])[0])
    prompt = expand("a <new1> on a hill", {"<new1>": 2})
    ours = list(generate(parts, [prompt] * 2, ["x", "y"], DrawConfig(sampler="ddim", num_steps=10, guidance_weight=3.0)))
    assert np.abs(np.stack(ours).astype(int) - (theirs * 255).round().astype(int)).max() <= 1


def test_drawing_does_not_depend_on_the_batch(parts):
    prompts, names = ["a", "b c", "a"], ["0", "1", "2"]
    one, three = (np.stack(list(generate(parts, prompts, names, DrawConfig(num_steps=3, batch_size=size)))) for size in (1, 3))
    assert np.abs(one.astype(int) - three).max() <= 1


def test_words_that_cannot_be_learned(tiny_sd):
    for words, said in ((["the"], "already knows"), (["two words"], "one word"), ([""], "one word"), (["<new1>", "<new1>_1"], "contains another")):
        with pytest.raises(UserError, match=said):
            add_words(load_stable_diffusion(tiny_sd), {word: torch.zeros(1, 32) for word in words})
    with pytest.raises(UserError, match="dimensions"):
        add_words(load_stable_diffusion(tiny_sd), {"<new1>": torch.zeros(1, 768)})


def test_words_in_any_spelling(tiny_sd):
    for word in ("<New1>", "zwbq", "*", "<a-b_c>", "ñü"):
        parts = load_stable_diffusion(tiny_sd)
        known = parts.text_encoder.get_input_embeddings().num_embeddings
        try:
            add_words(parts, {word: torch.ones(1, 32)})
        except UserError as error:
            assert word in str(error)  # "*" is a token already
            continue
        assert (parts.tokens([f"a {word}, {word} b"]) == known).sum() == 2


def test_initial_rows(parts):
    table = parts.text_encoder.get_input_embeddings().weight
    ids = parts.tokenizer("red hill", add_special_tokens=False).input_ids
    directions = torch.nn.functional.normalize(table[ids], dim=1)
    assert torch.allclose(initial_rows(parts, "red hill", len(ids)), directions * table[ids].norm(dim=1).mean(), atol=1e-5)
    assert initial_rows(parts, "red", 5).shape == (5, 32)
    assert initial_rows(parts, "a red hill near a river", 1).shape == (1, 32)
    noise = initial_rows(parts, None, 4, torch.Generator().manual_seed(0))
    assert torch.allclose(noise.norm(dim=1), table.norm(dim=1).median().expand(4), rtol=1e-4)
    assert nearest_words(parts, table[ids[:1]])[0][0] == (parts.tokenizer.convert_ids_to_tokens(ids[0]).removesuffix("</w>"), pytest.approx(1, abs=1e-5))


def test_training_writes_what_inference_and_grading_read(call, concepts_json, tiny_sd, tiny_clip, tmp_path):
    code, out, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / "run", vectors=2))
    assert code == 0, err
    assert "new1.safetensors" in out
    vectors = gather([tmp_path / "run"], [])[0]
    assert {word: tuple(rows.shape) for word, rows in vectors.items()} == {"<new1>": (2, 32), "<new2>": (2, 32)}
    arguments = [concepts_json, tmp_path / "out", tiny_sd, "--embeddings", tmp_path / "run", "--num-images=3", "--steps=2", "--dtype=fp32"]
    code, out, err = call(f"{PACKAGE}.inference", *arguments)
    assert code == 0, err
    expected = {f"{c}/{k}/source{c}_prompt{k}_{i}.png" for c, k in (("0", 0), ("0", 1), ("1", 0)) for i in range(3)}
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")} == expected
    path = tmp_path / "out/0/0/source0_prompt0_1.png"
    before = path.read_bytes()
    path.unlink()
    code, out, _ = call(f"{PACKAGE}.inference", *arguments, "--batch-size=1")
    assert "wrote 1 pictures" in out and "8 were there already" in out
    assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(io.BytesIO(before)))).max() <= 1

    code, out, err = call(f"{PACKAGE}.evaluate", tmp_path / "out", concepts_json, "--model", tiny_clip, "--num-images=3")
    assert code == 0, err
    grade = json.loads((tmp_path / "out_grade" / "grade.json").read_text())
    assert [row["passed"] for row in grade["prompts"]] == [None] * 3
    assert (tmp_path / "out_grade" / "best.png").is_file()
    path.unlink()
    code, _, err = call(f"{PACKAGE}.evaluate", tmp_path / "out", concepts_json, "--model", tiny_clip, "--num-images=3")
    assert code == 1 and "source0_prompt0_1.png is missing" in err


def test_killed_training_resumes_to_the_same_embedding(call, command, concepts_json, tiny_sd, tmp_path):
    code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / "whole"), "--concepts", "0", "--pull=0.1")
    assert code == 0, err
    arguments = [*train_arguments(concepts_json, tiny_sd, tmp_path / "killed"), "--concepts", "0", "--pull=0.1"]
    process = command(f"{PACKAGE}.train", *arguments, wait=False, launcher=("-c", AS_HERE))
    state = tmp_path / "killed" / "0" / "state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "new1.safetensors").exists()
    code, _, err = call(f"{PACKAGE}.train", *arguments)
    assert code == 0, err
    whole, resumed = (read_embedding(tmp_path / run / "new1.safetensors")[1] for run in ("whole", "killed"))
    assert torch.allclose(whole, resumed, atol=1e-6)
    code, _, err = call(f"{PACKAGE}.train", *arguments, "--lr=1")
    assert code == 1 and "other settings (lr" in err


def test_a_finished_run_is_known_by_its_pictures_and_its_model(call, concepts_json, tiny_sd, tmp_path):
    """Not by its word alone, which every input.json may give to something else."""
    arguments = [*train_arguments(concepts_json, tiny_sd, tmp_path / "run", steps=1), "--concepts", "1"]
    code, out, _ = call(f"{PACKAGE}.train", *arguments)
    assert code == 0 and f"next: bash scripts/p3_infer.sh {concepts_json} OUT {tiny_sd} --embeddings {tmp_path / 'run'}\n" in out
    shutil.copytree(tiny_sd, tmp_path / "moved")
    code, out, err = call(f"{PACKAGE}.train", *arguments, "--checkpoint", tmp_path / "moved")
    assert code == 0 and "<new2> is learned already" in out, err
    before = identify(tiny_sd)
    path = tmp_path / "moved" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"conv_in.weight": torch.ones(32, 4, 3, 3)}, path)  # another model, of as many bytes
    code, _, err = call(f"{PACKAGE}.train", *arguments, "--checkpoint", tmp_path / "moved")
    assert code == 1 and f"other settings (model miniature-{before} is now miniature-{identify(tmp_path / 'moved')};" in err
    code, _, err = call(f"{PACKAGE}.train", *arguments, "--checkpoint", tmp_path / "no.ckpt")
    assert code == 1 and f"no such checkpoint: {tmp_path / 'no.ckpt'}" in err
    (concepts_json.parent / "1" / "2.png").unlink()
    code, _, err = call(f"{PACKAGE}.train", *arguments)
    assert code == 1 and "other settings (pictures " in err


def test_a_training_that_diverges_keeps_its_last_state_and_goes_on_from_it(call, concepts_json, tiny_sd, tmp_path, monkeypatch):
    """Every loss after the first saved state is not finite, between two lines of the log; then it is cured; then the pictures are others."""
    loss, run = diffusion.loss, tmp_path / "run"
    arguments = [*train_arguments(concepts_json, tiny_sd, run), "--concepts", "0", "--validate-every=4"]
    monkeypatch.setattr(diffusion, "loss", lambda *args: loss(*args) * (float("nan") if (run / "0" / "state.pt").exists() else 1))
    for _ in range(2):
        code, _, err = call(f"{PACKAGE}.train", *arguments)
        assert code == 1 and "the loss or the weights are not finite at step 4" in err.splitlines()[-1], err
        assert torch.load(run / "0" / "state.pt", weights_only=True)["step"] == 2 and not (run / "new1.safetensors").exists()
    monkeypatch.setattr(diffusion, "loss", loss)
    code, _, err = call(f"{PACKAGE}.train", *arguments, "--crops=3")
    assert code == 1 and "belongs to a run with other settings (crops 2 is now 3)" in err
    state = torch.load(run / "0" / "state.pt", weights_only=True)  # as it was written before settings that are not in use were told, too
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in vars(MINIATURE.low_rank) or name == "steps"}
    torch.save(state | {"settings": state["settings"] | {"style_pull": 0.3}}, run / "0" / "state.pt")
    code, _, err = call(f"{PACKAGE}.train", *arguments, "--lora=2")
    assert code == 1 and "belongs to a run with other settings (lora 0 is now 2)" in err
    code, _, err = call(f"{PACKAGE}.train", *arguments)
    assert code == 0 and torch.load(run / "0" / "state.pt", weights_only=True)["step"] == 4, err
    Image.new("RGB", (70, 80), "red").save(concepts_json.parent / "0" / "1.png")
    code, _, err = call(f"{PACKAGE}.train", *arguments)
    assert code == 1 and "belongs to a run with other settings (pictures" in err


def test_a_model_whose_loss_is_not_finite_on_what_is_kept_learns_nothing(call, concepts_json, tiny_sd, tmp_path, monkeypatch):
    """As in fp16, where the mean of a batch may stay finite."""
    loss, run = diffusion.loss, tmp_path / "run"
    monkeypatch.setattr(diffusion, "loss", lambda *args: loss(*args) * (1 if torch.is_grad_enabled() else float("nan")))
    code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, run), "--concepts", "0")
    assert code == 1 and "the loss or the weights are not finite at step 0; try" in err.splitlines()[-1], err
    assert not (run / "new1.safetensors").exists()


def test_a_pull_of_one_leaves_the_initial_words(call, parts, concepts_json, tiny_sd, tmp_path):
    code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path, steps=1), "--pull=1", "--norm=free")
    assert code == 0, err
    for word, source in (("new1", "dog"), ("new2", "red car")):
        assert torch.allclose(read_embedding(tmp_path / f"{word}.safetensors")[1], initial_rows(parts, source, 1), atol=1e-6)


@pytest.mark.parametrize(("kind", "flags", "pull"), [("object", [], 0.0), ("style", [], MINIATURE.learning.style_pull), ("style", ["--pull=0.5"], 0.5)])
def test_what_is_pulled_back_unasked(call, concepts_json, tiny_sd, tmp_path, kind, flags, pull):
    """A style is, an object is not, and the file of the word tells; the words end where AdamW's one step and that pull lead."""
    rows = {}
    for name, more in (("free", ["--pull=0"]), ("default", flags)):
        code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / name, steps=1), "--concepts", "0", f"--kind={kind}",
                            "--norm=free", *more)
        assert code == 0, err
        _, rows[name], settings = read_embedding(tmp_path / name / "new1.safetensors")
    initial = initial_rows(load_stable_diffusion(tiny_sd), "dog", 1)
    assert torch.allclose(rows["default"], rows["free"].lerp(initial, pull), atol=1e-6)
    assert not torch.allclose(rows["free"], initial, atol=1e-4)
    assert (float(settings["pull"]), float(settings["min_snr_gamma"])) == (pull, MINIATURE.learning.min_snr_gamma)


def test_gradient_checkpointing_changes_nothing(call, concepts_json, tiny_sd, tmp_path):
    rows = {}
    for name, flags in (("plain", []), ("checkpointing", ["--gradient-checkpointing"])):
        code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / name, steps=2), "--concepts", "0", *flags)
        assert code == 0, err
        rows[name] = read_embedding(tmp_path / name / "new1.safetensors")[1]
    assert torch.allclose(rows["plain"], rows["checkpointing"], atol=1e-6)
    # it is what a run without memory is told to give, beside what it has finished
    code, out, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / "plain", steps=2), "--concepts", "0", *flags)
    assert code == 0 and "<new1> is learned already" in out, err


def test_a_word_begins_with_a_vector_for_each_token_of_its_initial_words(call, parts, concepts_json, tiny_sd, tmp_path):
    initial = parts.tokenizer("red car", add_special_tokens=False).input_ids
    config, (concept,) = types.SimpleNamespace(vectors=0, init="src_image", seed=0), read_concepts(concepts_json)[1:]
    rows, table = first_rows(parts, [concept], config)["<new2>"], parts.text_encoder.get_input_embeddings().weight.detach()
    assert len(rows) == len(initial) > 1 and torch.nn.functional.cosine_similarity(rows, table[initial]).min() > 0.999
    for init, count in (("dog", 1), ("noise", 1), ("a red car on a hill", 4)):
        assert counts_of(parts, [concept], types.SimpleNamespace(vectors=0, init=init)) == {"<new2>": count}
    code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / "run", steps=1, vectors=0), "--joint")
    assert code == 0, err
    assert [len(read_embedding(tmp_path / "run" / f"new{i}.safetensors")[1]) for i in (1, 2)] == [1, len(initial)]


@pytest.mark.parametrize("waits", [0, 1])
def test_ordinary_pictures_wait_for_the_weights_that_they_hold(call, monkeypatch, concepts_json, tiny_sd, tmp_path, waits):
    seen, draw = [], draw_batch
    monkeypatch.setattr(f"{PACKAGE}.train.draw_batch", lambda sources, *a: seen.append(any(source.ordinary for source in sources)) or draw(sources, *a))
    code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path, steps=4), "--concepts", "0", "--lora", "2", "--pivot", "0.5",
                        "--hold", "0", "--prior", "1", "--prior-waits", waits)
    assert code == 0, err
    assert seen == [not waits, not waits, True, True]


def test_norm_stays_at_the_initial_words(call, concepts_json, tiny_sd, tmp_path):
    norms = {}
    for norm in ("keep", "free"):
        code, _, err = call(f"{PACKAGE}.train", *train_arguments(concepts_json, tiny_sd, tmp_path / norm, norm=norm, lr=0.5), "--concepts", "0")
        assert code == 0, err
        norms[norm] = read_embedding(tmp_path / norm / "new1.safetensors")[1].norm().item()
    start = initial_rows(load_stable_diffusion(tiny_sd), "dog", 1).norm().item()
    assert norms["keep"] == pytest.approx(start, rel=1e-3)
    assert norms["free"] != pytest.approx(start, rel=1e-2)


def test_batches_depend_on_their_generator_only():
    sources = [Source(torch.randn(6, 4, 2, 2), torch.rand(6, 4, 2, 2), ["x", "y"])]
    a, b, c = (draw_batch(sources, 0.5, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3] == b[3]
    assert not torch.equal(a[1], c[1])


def test_score_and_pass_rule():
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), dim=1)
    image, text = clip_scores(features, torch.tensor([[1.0, 0], [0.6, 0.8]]), torch.tensor([0.0, 1.0]))
    assert torch.allclose(image, torch.tensor([80.0, 40.0, (1 + 1.4) / 2 / 2**0.5 * 100]))
    assert torch.allclose(text, torch.tensor([0, 100, 100 / 2**0.5]))
    best, image_score, text_score = best_of(torch.tensor([10.0, 20, 30]), torch.tensor([9.0, 1, 0]), Rule(2.5, 2))
    assert best.tolist() == [0, 2] and (image_score, text_score) == (20, 4.5)  # 32.5, 22.5, 30
    assert passes(20, 4.5, [20, 4.5]) and not passes(20, 4.4, [20, 4.5]) and passes(1, 1, None) is None


def test_pictures_and_their_variations(tmp_path):
    picture = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "b.png", exif=exif)
    Image.new("L", (10, 10)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    pictures, skipped = read_pictures(tmp_path)
    assert {name: p.size for name, p in pictures.items()} == {"a.png": (10, 10), "b.png": (20, 40)}
    assert skipped == ["cut.png"]  # what is no picture by name is not looked at
    squares = varied(Image.fromarray(np.arange(64 * 80 * 3, dtype=np.uint32).reshape(64, 80, 3).astype(np.uint8)), 64, 6, np.random.default_rng(0))
    assert squares.shape == (6, 3, 64, 64) and squares.min() >= -1 and squares.max() <= 1
    assert torch.equal(squares[0].flip(-1), squares[1])  # the middle, and flipped


def test_captions_of_pictures(tmp_path):
    assert read_captions(tmp_path, ["a.png"], "<new1>") is None
    lines = ['{"file_name": "b.png", "text": "a <new1> on a hill"}', "", '{"file_name": "a.png", "text": "<new1>"}']
    (tmp_path / CAPTIONS).write_text("\n".join(lines))
    assert read_captions(tmp_path, ["a.png", "b.png"], "<new1>") == ["<new1>", "a <new1> on a hill"]
    for names, token, said in ((["c.png"], "<new1>", "no caption of c.png"), (["b.png"], "<new2>", "for b.png the caption 'a <new1> on a hill'")):
        with pytest.raises(UserError, match=said):
            read_captions(tmp_path, names, token)
    for content in ("{", "[]", "3", '{"file_name": []}', '{"text": "x"}', '{"file_name": {}, "text": 1}', b"\xff"):
        (tmp_path / CAPTIONS).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match="cannot read"):
            read_captions(tmp_path, ["a.png"], "<new1>")


def test_sources_pair_each_picture_with_its_caption(parts, concepts_json):
    folder = concepts_json.parent / "0"
    (folder / CAPTIONS).write_text("\n".join(json.dumps({"file_name": f"{i}.png", "text": f"a <new1> on ground {i}"}) for i in range(3)))
    args = types.SimpleNamespace(input=concepts_json, vectors=1, seed=0, crops=2, kind="auto", joint=False, custom_diffusion=False, lora=0)
    concepts = read_concepts(concepts_json)[:1]
    add_words(parts, {"<new1>": torch.randn(1, 32)})
    own, = make_sources(parts, concepts, args, MINIATURE, 64, DrawConfig(num_steps=1))
    assert own.paired and own.captions == [f"a <new1> on ground {i}" for i in (0, 0, 1, 1, 2, 2)] and len(own.means) == 6


@pytest.mark.parametrize("content, said", [
    ("{", "cannot read"), ("[]", "object of concepts"), ("{}", "object of concepts"), ('{"0": 3}', "must be an object"),
    ('{"0": {"prompt": ["a"]}}', "token_name"),
    ('{"0": {"token_name": "<a>", "prompt": "a <a>"}}', "list of texts"), ('{"0": {"token_name": "<a>", "prompt": ["a dog"]}}', "not in the prompt"),
    ('{"../x": {"token_name": "<a>", "prompt": ["<a>"]}}', "folder"), ('{"0": {"token_name": "<a>", "prompt": ["<a>"], "baseline": [1, 2]}}', "baseline"),
    ('{"0": {"token_name": "<a>", "prompt": ["<a>"], "prompt_4_clip_eval": ["a", "b"]}}', "has 1 prompts, but 2"), ("[" * 100000, "cannot read")])
def test_wrong_input_json(tmp_path, content, said):
    (tmp_path / "input.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        read_concepts(tmp_path / "input.json")
    assert "\n" not in str(caught.value)


def test_wrong_embeddings(tmp_path):
    cases = {"two": {"a": torch.ones(2), "b": torch.ones(2)}, "ints": {"a": torch.ones(2, dtype=torch.long)}, "nan": {"a": torch.full((1, 4), float("nan"))},
             "cube": {"a": torch.ones(2, 2, 2)}, "empty": {"a": torch.ones(0, 4)}}
    for name, content in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in (*cases, "text", "missing"):
        with pytest.raises(UserError, match=f"{name}.safetensors"):
            read_embedding(tmp_path / f"{name}.safetensors")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no embeddings"):
        gather([tmp_path / "none"], [])[0]


@pytest.mark.parametrize("module, arguments, said", [
    ("train", ["missing.json"], "cannot read missing.json"), ("train", ["{json}", "--checkpoint", "missing.ckpt"], "no such checkpoint"),
    ("train", ["{json}", "--concepts", "7"], "no concept '7'"), ("train", ["{json}", "--steps", "0"], "above 0"),
    ("train", ["{json}", "--side", "63"], "multiple of"), ("train", ["{json}", "--side", "0"], "at least 1"), ("train", ["{json}", "--lr", "nan"], "above 0"),
    ("train", ["{json}", "--decay", "9"], "between 0 and 1"), ("train", ["{json}", "--sample-every=-1"], "from 0"),
    ("train", ["{json}", "--seed", "1" + "0" * 30], "at most 12 digits"), ("train", ["{json}", "--dtype", "fp16", "--device", "cpu"], "on a GPU only"),
    ("inference", ["{json}", "{tmp}", "--embeddings", "{tmp}"], "has no embeddings"), ("inference", ["{json}", "/proc/nothing"], "cannot write"),
    ("inference", ["{json}", "{tmp}", "--steps", "0"], "between 1 and 1000"), ("evaluate", ["{tmp}", "{json}"], "is missing")])
def test_wrong_use_ends_in_one_line(call, concepts_json, tiny_sd, tmp_path, module, arguments, said):
    filled = [argument.format(json=concepts_json, tmp=tmp_path) for argument in arguments]
    if module == "train" and "--checkpoint" not in filled and filled[0] != "missing.json":
        filled += ["--checkpoint", str(tiny_sd), "--output", str(tmp_path / "run")]
    if "/proc/nothing" in filled:
        save_embedding(tmp_path / "a.safetensors", "<new1>", torch.ones(1, 192))
        save_embedding(tmp_path / "b.safetensors", "<new2>", torch.ones(1, 192))
        filled += ["--embeddings", str(tmp_path)]
    code, _, err = call(f"{PACKAGE}.{module}", *filled)
    assert code == 1 and said in err and "Traceback" not in err, err
    assert err.strip().splitlines()[-1].startswith("error: ")


def test_grader_scores_do_not_depend_on_the_batch(tiny_clip, concepts_json):
    grader = Grader(tiny_clip)
    pictures = example_pictures(concepts_json.parent / "0")
    assert torch.allclose(grader.of_pictures(pictures)[1:2], grader.of_pictures(pictures[1:2]), atol=1e-5)


def test_the_best_state_is_kept_and_told(monkeypatch):
    """Of the losses on kept crops the lowest decides, not the last; a word that ends worse than it began says so."""
    held = Source(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), ["x", "y"], True)
    for losses, step, said in (((0.5, 0.3, 0.4), 1, "the best is kept, 0.3000 at step 1"), ((0.5, 0.4, 0.6), 1, "the end is worse than the initial words"),
                               ((0.5, 0.6, 0.7), 0, "no state is better than the initial words")):
        best, trained = Best(None, None, held, None, 2), {"rows": torch.zeros(1)}
        for at, loss in enumerate(losses):
            trained["rows"] += 1
            monkeypatch.setattr(best, "validation", lambda *_, loss=loss: {"validation": loss})
            assert best.update(at, trained) == {"validation": loss}
        assert best.step == step and best.kept["rows"].item() == step + 1 and said in best.told("<new1>")


def test_a_word_does_not_end_worse_than_it_began(call, concepts_json, tiny_sd, tmp_path, monkeypatch):
    """Where the loss on kept crops only rises, the word is the initial one, and this is said."""
    rising = itertools.count(1)
    monkeypatch.setattr(training.Validation, "__call__", lambda *_: {"validation": float(next(rising))})
    arguments = train_arguments(concepts_json, tiny_sd, tmp_path / "run", steps=2, lr=30, norm="free")
    code, out, err = call(f"{PACKAGE}.train", *arguments, "--concepts", "0")
    assert code == 0 and "no state is better than the initial words, which are kept" in out, err
    rows = gather([tmp_path / "run"], [])[0]["<new1>"]
    assert torch.allclose(rows, initial_rows(load_stable_diffusion(tiny_sd), "dog", 1), atol=1e-6)
    assert json.loads((tmp_path / "run" / "0" / "validation.json").read_text()) == {"kept_step": 0, "losses": {"0": 1.0, "1": 2.0, "2": 3.0}}


def test_kept_crops_are_no_training_crops(parts, concepts_json):
    args = types.SimpleNamespace(input=concepts_json, vectors=1, seed=0, crops=4, kind="auto", joint=False, custom_diffusion=False, lora=0)
    concept = read_concepts(concepts_json)[:1]
    own, = make_sources(parts, concept, args, MINIATURE, 64, DrawConfig(num_steps=1))
    held = make_held(parts, concept, args, MINIATURE, 64)
    again = make_held(parts, concept, args, MINIATURE, 64)
    assert len(held.means) == len(held.captions) == 6 and torch.equal(held.means, again.means) and all("<new1>" in text for text in held.captions)
    assert min((kept - learned).abs().max() for kept in held.means for learned in own.means) > 1e-3
