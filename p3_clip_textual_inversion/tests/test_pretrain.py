"""The miniature's training: resumed runs, and what stays frozen."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from p3_clip_textual_inversion import pretrain
from p3_clip_textual_inversion.files import MINI
from p3_clip_textual_inversion.world import SIDE, STYLES

MODULE = "p3_clip_textual_inversion.pretrain"


@pytest.fixture
def drawings(tmp_path):
    """Squares of two colours in the trained styles."""
    names = ["red-apple", "owl"]
    pixels = np.zeros((2 * len(STYLES), SIDE, SIDE, 4), np.uint8)
    for row in range(len(pixels)):
        pixels[row, 16:48, 16:48] = (255 * (row % 2), 60, 20 * row, 255)
    np.savez(tmp_path / "drawings.npz", pixels=pixels, names=np.array(names * len(STYLES)), styles=np.repeat(STYLES, 2))
    return tmp_path / "drawings.npz"


def arguments(drawings, output, *more):
    return ["--drawings", drawings, "--output", output, "--batch-size=2", "--save-every=2", "--sample-every=0", "--warmup=1", "--dtype=fp32", *more]


def test_a_stopped_training_resumes_to_the_same_weights(call, drawings, tmp_path, monkeypatch):
    code, _, err = call(MODULE, "vae", *arguments(drawings, tmp_path / "whole", "--steps=4"))
    assert code == 0, err

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_json", stop)  # right after the state of step 2 was saved
        code, _, err = call(MODULE, "vae", *arguments(drawings, tmp_path / "stopped", "--steps=4"))
    assert code == 130 and "stopped\n" in err and torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["step"] == 2
    code, out, err = call(MODULE, "vae", *arguments(drawings, tmp_path / "stopped", "--steps=4"))
    assert code == 0 and "going on at step 2" in out, err
    whole, resumed = (load_file(tmp_path / run / "diffusion_pytorch_model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.allclose(whole[name].float(), resumed[name].float(), atol=1e-3) for name in whole)


def test_the_text_tower_stays_when_clip_is_trained_on(call, drawings, tmp_path):
    code, _, err = call(MODULE, "clip", *arguments(drawings, tmp_path / "run", "--steps=2", "--start", MINI / "clip"))
    assert code == 0, err
    before, after = (load_file(folder / "open_clip_model.safetensors") for folder in (MINI / "clip", tmp_path / "run"))
    assert before.keys() == after.keys()
    visual = [name for name in before if name.startswith("visual.")]
    assert all(torch.equal(before[name], after[name]) for name in before if name not in visual and name != "logit_scale")
    assert any(not torch.equal(before[name], after[name]) for name in visual)
    assert (tmp_path / "run" / "bpe.txt.gz").read_bytes() == (MINI / "clip" / "bpe.txt.gz").read_bytes()
