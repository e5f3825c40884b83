"""The page agrees with the package: same weights, same noise, same picture; same loss and gradient. And its two commands run."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from p1_cfg_ddpm import minimal
from p1_cfg_ddpm.data import MINI_DATA, load_digits
from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.inference import CHECKPOINT, DrawConfig, Job, generate, load_generator
from p1_cfg_ddpm.model import DOMAINS, IMAGE_SIZE
from p1_cfg_ddpm.pictures import to_model, to_uint8
from p1_cfg_ddpm.samplers import ImageNoise


@pytest.fixture(scope="module")
def page():
    unet = minimal.UNet().to(memory_format=torch.channels_last)
    unet.load_state_dict(load_file(CHECKPOINT), strict=True)
    return unet


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for name in ("A", "S"):
        monkeypatch.setattr(minimal, name, getattr(minimal, name).cpu())
    monkeypatch.setattr(minimal, "DEVICE", "cpu")


def test_the_same_pictures(page):
    model, diffusion = load_generator(CHECKPOINT, "cpu", torch.float32)
    jobs = [Job(domain, digit, 1) for domain in DOMAINS for digit in (0, 4, 7)]
    config = DrawConfig(sampler="ddim", num_steps=8, spacing="trailing", guidance_weight=3.0, guidance_parallel=(1.0, 1.0))
    ours = np.stack([image for _, image in generate(model, diffusion, jobs, config, 6, shown=False)])
    noise = ImageNoise(config.seed, [job.name for job in jobs], (3, IMAGE_SIZE, IMAGE_SIZE))()
    digit, domain = torch.tensor([job.digit for job in jobs]), torch.tensor([DOMAINS.index(job.domain) for job in jobs])
    drawn = to_uint8(minimal.draw(page, noise, digit, domain, w=3.0, num_steps=8))
    assert np.abs(drawn.astype(int) - ours).max() <= 1
    assert ours.std() > 30  # digits, and no grey


def test_the_same_schedule_loss_and_gradient(page):
    model, diffusion = load_generator(CHECKPOINT, "cpu", torch.float32)
    model.requires_grad_(True)
    torch.testing.assert_close(minimal.A[:-1].double() ** 2, diffusion.alpha_bar, rtol=1e-5, atol=1e-12)
    assert (minimal.A[-1], minimal.S[-1]) == (1, 0)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=g)
    digit, domain = torch.randint(10, (6,), generator=g), torch.randint(2, (6,), generator=g)
    t, drop = torch.tensor([0, 100, 300, 500, 900, 999]), torch.arange(6) % 3 == 1
    page.zero_grad()
    loss = minimal.loss(page, x0, digit, domain, t, eps, drop)
    loss.backward()
    ours = Diffusion().loss(model, x0, digit, domain, t, eps, drop).mean()
    ours.backward()
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
    gradients = dict(model.named_parameters())
    for name, parameter in page.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=0, atol=1e-5 * gradients[name].grad.abs().max().item())


def test_it_reads_the_digits_as_the_package_does():
    x0, digit, domain = minimal.read_digits(MINI_DATA)
    ours = load_digits(MINI_DATA, "train")
    torch.testing.assert_close(x0, to_model(ours.images))
    assert digit.tolist() == ours.digit.tolist() and domain.tolist() == ours.domain.tolist()


def test_the_command_trains_and_draws(tmp_path, monkeypatch):
    weights, picture = tmp_path / "weights.safetensors", tmp_path / "picture.png"
    draw = minimal.draw
    monkeypatch.setattr(minimal, "draw", lambda *args: draw(*args, num_steps=1))
    monkeypatch.setattr(sys, "argv", ["minimal", str(weights), str(picture), "--train", str(MINI_DATA), "--steps", "2"])
    torch.manual_seed(0)
    minimal.main()
    assert {name: tensor.shape for name, tensor in load_file(weights).items()} == {name: tensor.shape for name, tensor in load_file(CHECKPOINT).items()}
    with Image.open(picture) as image:
        assert image.size == (302, 122)
