"""The miniature's training: resumed runs, the end by the clock, what hard negatives cost, and files that stock libraries read."""

import json
import types

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.miniature import models, train
from p3_clip_textual_inversion.miniature.models import write_merges
from p3_clip_textual_inversion.miniature.world import CLIP_STYLES, SIDE, SUBJECTS, Drawings

MODULE = "p3_clip_textual_inversion.miniature.train"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Squares of some colours in the trained styles."""
    jobs = [(name, style) for name in SUBJECTS[:12] for style in CLIP_STYLES]
    pixels = np.zeros((len(jobs), SIDE, SIDE, 4), np.uint8)
    for row in range(len(jobs)):
        pixels[row, 16:48, 16:48] = (20 * (row % 12), 60, 30 * (row % 7), 255)
    path = tmp_path_factory.mktemp("drawings") / "drawings.npz"
    np.savez(path, pixels=pixels, names=np.array([name for name, _ in jobs]), styles=np.array([style for _, style in jobs]))
    return path


@pytest.fixture
def narrow(monkeypatch):
    """Networks of the same kinds, small enough for a test."""
    text = {"context_length": models.CONTEXT, "width": 32, "heads": 2, "layers": 1}
    monkeypatch.setattr(models.Clip, "config", models.CLIP_CONFIG | {"embed_dim": 16, "text_cfg": text})
    monkeypatch.setattr(models, "VAE_CONFIG", models.VAE_CONFIG | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4})
    monkeypatch.setattr(models, "UNET_CONFIG", models.UNET_CONFIG | {"block_out_channels": (16, 16, 16), "cross_attention_dim": 32, "norm_num_groups": 4})


def arguments(part, drawings, output, *more):
    return [part, "--drawings", drawings, "--output", output, "--batch-size=4", "--warmup=1", "--dtype=fp32", "--device=cpu", *more]


def test_a_stopped_training_resumes_to_the_same_weights(call, drawings, tmp_path, narrow, monkeypatch):
    code, _, err = call(MODULE, *arguments("autoencoder", drawings, tmp_path / "whole", "--steps=4"))
    assert code == 0, err
    saved = []

    def stop(*_):
        saved.append(None)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models.Autoencoder, "export", stop)  # right after a state was saved
        code, _, _ = call(MODULE, *arguments("autoencoder", drawings, tmp_path / "stopped", "--steps=4", "--save-every=0"))
    assert code != 0 and torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["step"] == 2
    code, out, err = call(MODULE, *arguments("autoencoder", drawings, tmp_path / "stopped", "--steps=4"))
    assert code == 0 and "going on at step 2" in out, err
    whole, resumed = (load_file(tmp_path / run / "diffusion_pytorch_model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.allclose(whole[name].float(), resumed[name].float(), atol=1e-3) for name in whole)
    code, _, err = call(MODULE, *arguments("autoencoder", drawings, tmp_path / "stopped", "--steps=4", "--seed=1"))
    assert code == 1 and "seed 0 is now 1" in err


def test_progress_is_by_steps_or_by_the_clock():
    args = types.SimpleNamespace(steps=100, seconds=None)
    assert train.progress_of(25, 10**6, args) == 0.25
    args.seconds = 60
    assert train.progress_of(25, 45, args) == 0.75 and train.progress_of(90, 45, args) == 0.9


def test_all_parts_become_files_that_stock_libraries_read(call, drawings, tmp_path, narrow):
    """CLIP for open_clip; autoencoder and UNet with CLIP's text tower as a whole Stable Diffusion, loaded without arguments, all in one dtype."""
    for part in ("autoencoder", "clip"):
        code, _, err = call(MODULE, *arguments(part, drawings, tmp_path / part, "--steps=1"))
        assert code == 0, err
    code, _, err = call(MODULE, *arguments("unet", drawings, tmp_path / "sd", "--steps=2", "--pool=8", "--clip", tmp_path / "clip", "--vae",
                                           tmp_path / "autoencoder", "--keep", "0.5", "--validate-every=1"))
    assert code == 0, err
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    assert model.context_length == models.CONTEXT and transform is not None
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd" / "stable_diffusion")
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a small striped teal owl next to a bus", num_inference_steps=2, output_type="np", height=SIDE, width=SIDE).images
    assert pictures.shape == (1, SIDE, SIDE, 3) and {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert (tmp_path / "sd" / "at_050" / "stable_diffusion" / "unet").is_dir()
    assert json.loads((tmp_path / "sd" / "stable_diffusion" / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert "band_7" in (tmp_path / "sd" / "log.csv").read_text()


def test_captions_by_their_length_are_the_same_captions(tmp_path, drawings, narrow):
    """Features and gradients of the text tower, of a batch as it comes."""
    part = models.Clip(types.SimpleNamespace(output=tmp_path, start=None, lock_text=False), Drawings(drawings), torch.device("cpu"))
    _, tokens, untrue, _ = part.batch(torch.Generator().manual_seed(0), 7)
    captions, gradients = torch.cat([tokens, untrue.flatten(0, 1)]), []
    assert len((captions != 0).sum(1).unique()) > 2
    for encode in (lambda: part.model.encode_text(captions, normalize=True), lambda: models.encode_by_length(part.model, captions)):
        part.model.zero_grad()
        features = encode()
        (features * torch.arange(features.numel()).view_as(features).sin()).sum().backward()
        gradients.append([features, part.model.token_embedding.weight.grad, part.model.text_projection.grad])
    for plain, by_length in zip(*gradients):
        torch.testing.assert_close(by_length, plain, rtol=1e-4, atol=1e-5)


def test_a_hard_negative_costs_what_its_similarity_says(tmp_path, drawings, narrow):
    """By hand: one picture whose caption and untrue caption it is as near to costs log 2 on the picture's side; an untrue caption that does not count, 0."""
    part = models.Clip(types.SimpleNamespace(output=tmp_path, start=None, lock_text=False), Drawings(drawings), torch.device("cpu"))

    part.features = lambda model, pictures, tokens: (torch.ones(1, 2), torch.ones(len(tokens), 2), torch.tensor(1.0))
    batch = torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 1, 5, dtype=torch.long)
    assert part.loss(None, (*batch, torch.tensor([[True]])), None).item() == pytest.approx(np.log(2) / 2, abs=1e-5)
    assert part.loss(None, (*batch, torch.tensor([[False]])), None).item() == pytest.approx(0, abs=1e-5)


def test_a_run_begins_at_the_weights_it_is_given(tmp_path, drawings, narrow):
    """--start; words of other tokens or towers of another size are refused, not half used."""
    def clip(name, start=None, kind=models.Clip):
        (tmp_path / name).mkdir(exist_ok=True)
        part = kind(types.SimpleNamespace(output=tmp_path / name, start=start, lock_text=False), Drawings(drawings), torch.device("cpu"))
        part.export(part.model, tmp_path / name)
        return part.model

    first, then = clip("first"), clip("then", tmp_path / "first")
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(first.state_dict().values(), then.state_dict().values()))
    with pytest.raises(UserError, match="of another size or has other words than the judge"):
        clip("judge", tmp_path / "first", models.Judge)
    write_merges(tmp_path / "first" / models.BPE_FILE, ["other", "words"], 100)
    with pytest.raises(UserError, match="has other words"):
        clip("other", tmp_path / "first")
    autoencoder = models.Autoencoder(types.SimpleNamespace(start=None), Drawings(drawings), torch.device("cpu"))
    autoencoder.export(autoencoder.model, tmp_path / "vae")
    begun = models.Autoencoder(types.SimpleNamespace(start=tmp_path / "vae"), Drawings(drawings), torch.device("cpu"))
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(autoencoder.model.state_dict().values(), begun.model.state_dict().values()))


def test_the_text_tower_stays_when_clip_is_trained_on(call, drawings, tmp_path, narrow):
    assert call(MODULE, *arguments("clip", drawings, tmp_path / "first", "--steps=1"))[0] == 0
    code, _, err = call(MODULE, *arguments("clip", drawings, tmp_path / "on", "--steps=2", "--start", tmp_path / "first", "--lock-text"))
    assert code == 0, err
    before, after = (load_file(tmp_path / run / "open_clip_model.safetensors") for run in ("first", "on"))
    visual = {name for name in before if name.startswith("visual.")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - visual - {"logit_scale"})
    assert any(not torch.equal(before[name], after[name]) for name in visual)


def test_the_pool_is_renewed_and_captions_are_dropped(tmp_path, drawings, narrow, call):
    for part in ("autoencoder", "clip"):
        assert call(MODULE, *arguments(part, drawings, tmp_path / part, "--steps=1"))[0] == 0
    args = types.SimpleNamespace(output=tmp_path, clip=tmp_path / "clip", vae=tmp_path / "autoencoder", start=None, pool=8)
    part = models.Unet(args, Drawings(drawings), torch.device("cpu"))
    part.drop_caption = 1.0
    _, hidden = part.batch(torch.Generator().manual_seed(0), 4)
    assert torch.equal(hidden, part.empty.expand(4, -1, -1))
    first = part.pool[0].clone()
    for step in range(1, 2 * part.reuse):
        part.batch(torch.Generator().manual_seed(step), 4)
    assert not (part.pool[0] == first).flatten(1).all(1).any()  # twice 4 of 8


@pytest.mark.parametrize(("flags", "said"), [
    (["clip", "--save-every=-1"], "--save-every must be a number from 0"), (["clip", "--lr=nan"], "--lr must be a number above 0, not nan"),
    (["clip", "--lock-text"], "--lock-text is for clip, and needs --start"),
    (["clip", "--ema=-1"], "--ema must be between 0 and 1, not -1.0"), (["clip", "--seed=-1"], "--seed must be a whole number from 0"),
    (["autoencoder", "--start=x"], "cannot load x"), (["clip", "--keep", "2"], "--keep must be shares"),
    (["clip", "--device=cpu", "--dtype=fp16"], "--dtype fp16 trains on a GPU only"), (["unet", "--seconds=0"], "--seconds must be a number above 0")])
def test_flags_that_do_not_fit_end_in_one_line(call, drawings, tmp_path, flags, said):
    code, _, err = call(MODULE, *flags, "--drawings", drawings, "--output", tmp_path / "run")
    assert code == 1 and said in err and err.count("\n") == 1
