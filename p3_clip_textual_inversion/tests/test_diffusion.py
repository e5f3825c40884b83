"""Schedule, samplers and guidance against diffusers and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from p3_clip_textual_inversion import diffusion
from p3_clip_textual_inversion.inference import DrawConfig
from p3_clip_textual_inversion.samplers import SAMPLERS, ImageNoise

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def toy(x, t):
    """A smooth stand-in for a UNet."""
    return torch.tanh(x * (1 + t / 1000)) + 0.1 * x.roll(1, dims=-1)


class Toy(diffusion.Guided):
    def __init__(self):
        self.alpha_bar = diffusion.make_alpha_bar().tolist()
        self.eps = toy


def follow(scheduler, x, num_steps):
    """Every state of a scheduler of diffusers."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.item()), t, x).prev_sample
        yield t.item(), x


def test_alpha_bar_and_noising_agree_with_diffusers():
    theirs, alpha_bar = DDPMScheduler(**SCHEDULE), diffusion.make_alpha_bar()
    assert torch.allclose(alpha_bar.float(), theirs.alphas_cumprod, atol=1e-5)
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    assert torch.allclose(diffusion.add_noise(alpha_bar, x0, eps, t), theirs.add_noise(x0, eps, t), atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_ddim_agrees_with_diffusers_at_every_step(num_steps):
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = list(DrawConfig("ddim", num_steps).states(Toy(), diffusion.make_alpha_bar(), lambda: x))
    theirs = list(follow(scheduler, x, num_steps))
    assert [state.t for state in ours] == [t for t, _ in theirs]
    for state, (_, xt) in zip(ours, theirs):
        assert torch.allclose(state.x, xt, atol=2e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 25])
def test_dpm_solver_agrees_with_diffusers_at_every_step(num_steps):
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", timestep_spacing="linspace")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = list(DrawConfig("dpmpp_2m", num_steps).states(Toy(), diffusion.make_alpha_bar(), lambda: x))
    theirs = list(follow(scheduler, x, num_steps))
    assert [state.t for state in ours] == [t for t, _ in theirs]
    for state, (_, xt) in zip(ours, theirs):
        assert torch.allclose(state.x, xt, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_samplers_recover_a_single_point(sampler):
    """Where every picture is `point`, eps is known exactly, and any sampler ends at it."""
    alpha_bar, point = diffusion.make_alpha_bar(), torch.full((1, 4, 2, 2), 0.7)
    def model(x, t):
        return point, (x - alpha_bar[t].sqrt() * point).div((1 - alpha_bar[t]).sqrt()).float()
    *_, last = DrawConfig(sampler, 20).states(model, alpha_bar, lambda: torch.randn(1, 4, 2, 2))
    assert torch.allclose(last.x0, point, atol=1e-3)
    assert torch.allclose(last.x, point, atol=0.12)  # DDIM leaves the noise of alpha_bar[0] in: a deviation of 0.03


def test_guidance_formula(echo):
    x, cond, uncond = torch.zeros(2, 4, 2, 2), torch.full((2, 3, 5), 3.0), torch.full((2, 3, 5), 1.0)
    for w, expected in ((0, 3.0), (1, 5.0), (6.5, 7.5 * 3 - 6.5)):
        guided = diffusion.Guided(echo, diffusion.make_alpha_bar(), cond, uncond, w)
        x0, eps = guided(x, 5)
        assert torch.equal(eps, guided.eps(x, 5)) and torch.allclose(eps, torch.full_like(x, expected))
        assert torch.allclose(diffusion.add_noise(diffusion.make_alpha_bar(), x0, eps, torch.tensor([5, 5])), x, atol=1e-5)


def test_min_snr_weights(echo):
    alpha_bar, x0, eps = diffusion.make_alpha_bar(), torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    t = torch.tensor([0, 300, 999])
    plain = diffusion.loss(echo, alpha_bar, x0, t, eps, torch.zeros(3, 2, 4))
    weighed = diffusion.loss(echo, alpha_bar, x0, t, eps, torch.zeros(3, 2, 4), min_snr_gamma=5)
    snr = (alpha_bar / (1 - alpha_bar))[t]
    assert torch.allclose(plain, torch.ones(3))
    assert torch.allclose(weighed.double(), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-3)


def test_image_noise_depends_on_the_name_only():
    together = ImageNoise(3, ["a", "b"], (4, 2, 2))()
    assert torch.equal(together[1:], ImageNoise(3, ["b"], (4, 2, 2))())
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, ImageNoise(4, ["a", "b"], (4, 2, 2))())
