"""The page agrees with the package: same weights, same noise, same picture, to one grey level; same network, and its gradient; same slerp."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from p2_ddim import minimal
from p2_ddim.data import MINI_DATA
from p2_ddim.evaluate import mse, read_pixels
from p2_ddim.inference import DrawConfig, generate, to_pictures
from p2_ddim.interpolation import slerp
from p2_ddim.model import load_unet
from p2_ddim.samplers import ImageNoise

SMALL = (3, 32, 32)  # the network takes any size that it can halve


@pytest.fixture(scope="module")
def unet():
    return load_unet(MINI_DATA / "UNet.pt")


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "DEVICE", "cpu")
        return minimal.load_unet(MINI_DATA / "UNet.pt")


def noises(count, seed=0):
    return dict(zip("abcdef", ImageNoise(seed, range(count), SMALL)()))


def drawn(x):
    return to_pictures(x).astype(int)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_same_pictures(unet, page, eta):
    starts = noises(2)
    ours = torch.stack([x for _, x in generate(unet, starts, DrawConfig(num_steps=10, eta=eta), 2, seed=3, shown=False)])
    fresh = ImageNoise(3, list(starts), SMALL)
    x = minimal.ddim(page, torch.stack(list(starts.values())), eta, 10, noise=lambda x: fresh())
    assert np.abs(drawn(x) - drawn(ours)).max() <= 1 and drawn(ours).std() > 30


def test_the_same_network_and_gradient(page):
    ours = load_unet(MINI_DATA / "UNet.pt").requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 3, *SMALL, generator=g)
    gradients = []
    for net in (ours, page):
        net.zero_grad()
        loss = (net(x, torch.tensor([1, 400, 981])) - eps).square().mean()
        loss.backward()
        gradients.append((loss, dict(net.named_parameters())))
    (ours, theirs), (loss, parameters) = gradients
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-5 * theirs[name].grad.abs().max().item())


def test_the_course_s_network_has_the_course_s_tensors():
    expected = json.loads((Path(__file__).parent / "unet_state_dict.json").read_text())
    with torch.device("meta"):
        page = minimal.UNet(*minimal.COURSE)
    assert {name: [list(v.shape), str(v.dtype).split(".")[1]] for name, v in page.state_dict().items()} == expected
    assert {module.num_groups for module in page.modules() if isinstance(module, torch.nn.GroupNorm)} == {32}


def test_the_same_slerp():
    u, v = noises(2).values()
    for c in (0, 0.3, 0.5, 1):
        torch.testing.assert_close(minimal.slerp(u, v, c), slerp(u, v, c))


def test_the_command_draws_the_reference(page, tmp_path, monkeypatch):
    """Of the bundled network, at its full size and number of steps: what diffusers has drawn."""
    (tmp_path / "noise").mkdir()
    for name in ("00", "01"):
        (tmp_path / "noise" / f"{name}.pt").write_bytes((MINI_DATA / "noise" / f"{name}.pt").read_bytes())
    monkeypatch.setattr(minimal, "load_unet", lambda path: page)
    monkeypatch.setattr(minimal, "slerp", lambda u, v, c: slerp(u, v, c)[:, :, :16, :16])
    monkeypatch.setattr(sys, "argv", ["minimal", str(tmp_path / "noise"), str(tmp_path / "out"), str(MINI_DATA / "UNet.pt")])
    minimal.main()
    for name in ("00", "01"):
        assert mse(read_pixels(tmp_path / "out" / f"{name}.png"), read_pixels(MINI_DATA / "GT" / f"{name}.png")) < 0.01
    assert read_pixels(tmp_path / "out" / "slerp.png").shape == (20, 11 * 18 + 2, 3)
