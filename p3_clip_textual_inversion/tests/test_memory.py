"""What is held of a GPU's memory: one concept's model at a time, the number format asked for, pictures decoded in slices, and what is said where it ends."""

import gc
import importlib
import weakref

import numpy as np
import pytest
import torch

from p3_clip_textual_inversion import inference, objective, train
from p3_clip_textual_inversion.inference import DrawConfig
from p3_clip_textual_inversion.miniature.world import CLIP_STYLES, SIDE, SUBJECTS
from p3_clip_textual_inversion.model import load_stable_diffusion

PACKAGE = "p3_clip_textual_inversion"
SHORT = ["--steps", 1, "--batch-size", 1, "--crops", 1, "--vectors", 1, "--sample-every", 0, "--device", "cpu", "--dtype", "fp32"]


def test_the_first_concepts_model_is_gone_when_the_second_one_loads(call, tiny_sd, concepts_json, tmp_path, monkeypatch):
    """accelerate keeps what it has prepared: 2.2 GB of Stable Diffusion in fp16."""
    refs, alive = [], []
    monkeypatch.setattr(objective, "VALIDATED", 4)

    def load(*args):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        parts = load_stable_diffusion(*args)
        refs.extend(weakref.ref(part) for part in (parts.unet, parts.vae, parts.text_encoder))
        return parts

    monkeypatch.setattr(train, "load_stable_diffusion", load)
    code, _, err = call(f"{PACKAGE}.train", concepts_json, "--checkpoint", tiny_sd, "--output", tmp_path / "words", *SHORT)
    assert (code, alive) == (0, [0, 0]), err


@pytest.mark.parametrize("device, dtype, expected", [("cuda", torch.float16, (torch.float16, torch.float16)), ("cpu", torch.bfloat16, (torch.float32,) * 2),
                                                     ("cuda", torch.bfloat16, (torch.bfloat16, torch.float16)), ("cuda", torch.float32, (torch.float32,) * 2)])
def test_a_gpu_holds_the_model_in_the_format_it_draws_in(tiny_sd, monkeypatch, device, dtype, expected):
    monkeypatch.setattr(inference, "load_stable_diffusion", lambda checkpoint, _, dtype: load_stable_diffusion(checkpoint, "cpu", dtype))
    parts = inference.load(tiny_sd, torch.device(device), DrawConfig(dtype=dtype))
    assert (parts.unet.dtype, parts.vae.dtype, parts.text_encoder.dtype) == (*expected, torch.float32)


@pytest.mark.parametrize("name", ["experiments.compare", "figures", "experiments.several"])
def test_every_command_that_draws_loads_by_its_settings(name):
    module = importlib.import_module(f"{PACKAGE}.{name}")
    assert module.load is inference.load and not hasattr(module, "load_stable_diffusion")


def test_pictures_are_decoded_in_slices(tiny_sd, monkeypatch):
    parts, sizes = load_stable_diffusion(tiny_sd), []
    decode = parts.vae.decode
    monkeypatch.setattr(parts.vae, "decode", lambda z: sizes.append(tuple(z.shape)) or decode(z))
    latents = torch.randn(5, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        sliced, each = parts.decode(latents), [parts.decode(one[None]) for one in latents]
    assert sizes == [(4, 4, 32, 32), (1, 4, 32, 32)] + [(1, 4, 32, 32)] * 5  # 256x256 pixels: four are a slice
    assert torch.allclose(sliced, torch.cat(each), atol=1e-3)
    sizes.clear()
    with torch.inference_mode():
        parts.decode(torch.zeros(2, 4, 64, 64))
    assert sizes == [(1, 4, 64, 64)] * 2


@pytest.fixture
def no_memory(monkeypatch):
    def backward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def test_a_training_without_memory_names_the_flags_to_lower(call, tiny_sd, concepts_json, tmp_path, no_memory, monkeypatch):
    monkeypatch.setattr(objective, "VALIDATED", 4)
    code, _, err = call(f"{PACKAGE}.train", concepts_json, "--checkpoint", tiny_sd, "--output", tmp_path / "words", *SHORT)
    assert code == 1 and "not enough memory" in err and all(flag in err for flag in ("--batch-size", "--side", "--gradient-checkpointing")), err


def test_so_does_the_miniatures(call, tmp_path, no_memory):
    jobs = [(name, style) for name in SUBJECTS[:2] for style in CLIP_STYLES]
    np.savez(tmp_path / "drawings.npz", pixels=np.full((len(jobs), SIDE, SIDE, 4), 255, np.uint8), names=np.array([name for name, _ in jobs]),
             styles=np.array([style for _, style in jobs]))
    code, _, err = call(f"{PACKAGE}.miniature.train", "autoencoder", "--drawings", tmp_path / "drawings.npz", "--output", tmp_path / "run", "--batch-size", 1,
                        "--dtype", "fp32", "--device", "cpu")
    assert code == 1 and "not enough memory" in err and "--batch-size" in err, err
