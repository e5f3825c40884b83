"""The bundled miniature, through the commands that users run."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from p2_ddim.data import MINI_DATA, read_noises
from p2_ddim.figures import round_trips
from p2_ddim.inference import DrawConfig, generate, to_pictures
from p2_ddim.model import load_unet
from p2_ddim.reference import sample, to_diffusers


@pytest.fixture(scope="module")
def network():
    return load_unet(MINI_DATA / "UNet.pt")


@pytest.mark.parametrize("dtype, limit, count", [("fp32", 0.5, 10), ("bf16", 5, 3)])  # bf16 takes minutes on a processor that has none
def test_the_references_are_reached(call, tmp_path, dtype, limit, count):
    """They were made by diffusers."""
    for folder in ("noise", "GT"):
        (tmp_path / folder).mkdir()
        for path in sorted((MINI_DATA / folder).iterdir())[:count]:
            shutil.copy(path, tmp_path / folder)
    code, out, err = call("p2_ddim.inference", tmp_path / "noise", tmp_path / "out", MINI_DATA / "UNet.pt", "--dtype", dtype)
    assert code == 0 and f"wrote {count} images" in out, err
    code, out, err = call("p2_ddim.evaluate", tmp_path / "out", tmp_path / "GT", "--report", tmp_path / "grade")
    assert code == 0 and f"{count} of {count} pass" in out, err
    assert json.loads((tmp_path / "grade" / "grade.json").read_text())["mean_mse"] < limit


def test_the_references_are_what_diffusers_draws(network):
    noises = read_noises(MINI_DATA / "noise")
    picture = to_pictures(sample(network, noises["03"][None]))[0]
    with Image.open(MINI_DATA / "GT" / "03.png") as image:
        assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1


def test_forward_agrees_with_diffusers(network):
    theirs = to_diffusers(network)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for t in (1, 501, 981):
            assert (network(x, torch.full((2,), t)) - theirs(x, t).sample).abs().max() < 1e-4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_any_batch_size_gives_the_same_pictures(network, eta):
    noises = dict(list(read_noises(MINI_DATA / "noise").items())[:4])
    config = DrawConfig(num_steps=8, eta=eta)
    one, three = ({name: to_pictures(x[None])[0].astype(int) for name, x in generate(network, noises, config, n, shown=False)} for n in (1, 3))
    assert max(np.abs(one[name] - three[name]).max() for name in noises) <= 1


def test_a_generated_face_survives_the_way_to_its_noise_and_back(network):
    noise = torch.stack(list(read_noises(MINI_DATA / "noise").values())[:2])
    ((images, _, psnrs),) = round_trips(network, noise, DrawConfig(), iterations=3, numbers_of_steps=(50,)).values()
    assert min(psnrs) > 30
    assert images.std() > 30  # pictures, not plain grounds
