"""The sampler against diffusers, the closed form where the data is Gaussian, inversion, and interpolation."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from p2_ddim.ddim import DDIMConfig, ImageNoise, alpha_bars, ddim, invert, make_alpha_bar
from p2_ddim.inference import predictor, to_pictures
from p2_ddim.interpolation import lerp, slerp
from p2_ddim.model import UNet, UNetConfig
from p2_ddim.reference import scheduler, to_diffusers

SHAPE = (2, 3, 16, 16)


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """A fixed smooth stand-in for a network."""
    return 0.8 * torch.tanh(x + 0.3 * x.roll(1, dims=3) + t / 500) + 0.1


def test_the_convention():
    """interface: t = 981, 961, ..., 21, 1; alpha_bar at that same t; alpha_bar[0] after the last step; x0 clamped, eps kept."""
    config = DDIMConfig()
    assert config.timesteps() == list(range(981, 0, -20))
    now, after = alpha_bars(config)
    alpha_bar = make_alpha_bar()
    assert torch.equal(now, alpha_bar[list(range(981, 0, -20))]) and after[-1].item() == alpha_bar[0].item() == pytest.approx(0.9999)
    assert torch.equal(after[:-1], now[1:])
    called = []
    x = 3 * noise()
    states = list(ddim(lambda x, t: called.append((t, x)) or network(x, t), x, config))
    assert [t for t, _ in called] == config.timesteps() == [state.t for state in states]
    # the first step written out
    ab, ab_prev = alpha_bar[981].float(), alpha_bar[961].float()
    eps = network(x, 981)
    x0 = ((x - (1 - ab).sqrt() * eps) / ab.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(states[0].x, ab_prev.sqrt() * x0 + (1 - ab_prev).sqrt() * eps, rtol=0, atol=1e-6)
    assert all(state.x0.abs().max() <= 1 for state in states)


@pytest.mark.parametrize("num_steps", [10, 50, 250])
@pytest.mark.parametrize("clip", [True, False])
def test_every_state_is_diffusers(num_steps, clip):
    theirs, x = scheduler(num_steps, clip), noise()
    y = x.clone()
    for t, state in zip(theirs.timesteps, ddim(network, x, DDIMConfig(num_steps, clip=clip)), strict=True):
        y = theirs.step(network(y, int(t)), t, y, eta=0.0).prev_sample
        assert (state.x - y).abs().max().item() < 1e-4 * max(1, y.abs().max().item())


def test_with_the_same_fresh_noise_eta_is_diffusers_too():
    for eta in (0.25, 1.0):
        theirs, x = scheduler(50), noise()
        theirs_noise, ours_noise = (ImageNoise(3, ["00", "01"], SHAPE[1:]) for _ in range(2))
        y = x.clone()
        for t, state in zip(theirs.timesteps, ddim(network, x, DDIMConfig(eta=eta), ours_noise), strict=True):
            y = theirs.step(network(y, int(t)), t, y, eta=eta, variance_noise=theirs_noise()).prev_sample
            assert (state.x - y).abs().max().item() < 1e-4 * max(1, y.abs().max().item())


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_other_spacings_are_diffusers(spacing):
    """Only the steps: its stride does not follow the list for linspace, ours does."""
    theirs = DDIMScheduler(timestep_spacing=spacing)
    for num_steps in (7, 50):
        theirs.set_timesteps(num_steps)
        assert DDIMConfig(num_steps, spacing).timesteps() == theirs.timesteps.tolist()


def test_the_whole_is_diffusers():
    """Network and sampler together, 50 steps, each from our last state: an untrained network magnifies rounding from step to step."""
    torch.manual_seed(0)
    model = UNet(UNetConfig((32, 32), (1,), 1)).eval()
    network, steps, x = to_diffusers(model), scheduler(50), noise(1)
    with torch.inference_mode():
        for t, state in zip(steps.timesteps, ddim(predictor(model), x), strict=True):
            torch.testing.assert_close(state.x, steps.step(network(x, t).sample, t, x, eta=0.0).prev_sample, rtol=0, atol=1e-4)
            x = state.x


class Gaussian:
    """The exact eps for data N(mean, std^2)."""

    mean, std = 0.2, 0.3

    def __call__(self, x, t):
        ab = make_alpha_bar()[t]
        x = x.double()
        x0 = self.mean + self.std**2 * ab.sqrt() / (ab * self.std**2 + 1 - ab) * (x - ab.sqrt() * self.mean)
        return ((x - ab.sqrt() * x0) / (1 - ab).sqrt()).float()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_in_distribution(eta):
    shape = (1, 1, 100, 200)
    generator = torch.Generator().manual_seed(0)
    config = DDIMConfig(1000, last_alpha_bar="one", clip=False, eta=eta)
    *_, last = ddim(Gaussian(), torch.randn(shape, generator=generator), config, lambda: torch.randn(shape, generator=generator))
    assert last.x.mean().item() == pytest.approx(Gaussian.mean, abs=0.01)
    assert last.x.std().item() == pytest.approx(Gaussian.std, abs=0.01)


def test_no_noise_is_drawn_at_eta_0():
    def refuse():
        raise AssertionError("noise was asked for")

    list(ddim(network, noise(), DDIMConfig(5), refuse))


def psnr(a, b):
    return -10 * math.log10((a - b).square().mean().item() / 4)


def test_inversion_finds_the_noise():
    predict, x = Gaussian(), noise()
    config = DDIMConfig(clip=False)
    *_, image = ddim(predict, x, config)
    *_, once = invert(predict, image.x, config, iterations=1)
    *_, thrice = invert(predict, image.x, config, iterations=5)
    assert psnr(thrice.x, x) > psnr(once.x, x) + 10 and (thrice.x - x).abs().max() < 0.02
    *_, back = ddim(predict, thrice.x, config)
    assert psnr(back.x, image.x) > 50


def test_bad_configurations_are_refused():
    for options in ({"num_steps": 0}, {"num_steps": 1001}, {"spacing": "odd"}, {"last_alpha_bar": "two"}, {"eta": -0.1}):
        with pytest.raises(ValueError):
            DDIMConfig(**options)
    for spacing in ("leading", "trailing", "linspace"):
        for n in (1, 3, 50, 999, 1000):
            steps = DDIMConfig(n, spacing).timesteps()
            assert len(steps) == n and steps == sorted(set(steps), reverse=True) and 0 <= steps[-1] <= steps[0] <= 999


def test_pictures_are_stretched_over_the_whole_image():
    x = torch.stack([torch.linspace(-3, 5, 12).reshape(3, 2, 2), torch.zeros(3, 2, 2)])
    pictures = to_pictures(x)
    expected = ((x[0] + 3) / 8 * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert (pictures[0] == expected).all() and pictures[0].min() == 0 and pictures[0].max() == 255
    assert (pictures[1] == 0).all()  # a flat image has no range: black, not an error


# interpolation

def test_slerp_of_independent_noise_keeps_the_norm_and_lerp_loses_it():
    a, b = noise(0, (1, 3, 64, 64)), noise(1, (1, 3, 64, 64))
    middle = slerp(a, b, 0.5).norm() / a.norm()
    assert middle == pytest.approx(1, abs=0.02) and lerp(a, b, 0.5).norm() / a.norm() == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 3, 8, 8)])
def test_slerp_ends_and_angles(shape):
    a = noise(0, shape)
    for b in (noise(1, shape), a.clone(), -a, 2 * a, -3 * a, a + 1e-6 * noise(2, shape), -a + 1e-6 * noise(2, shape), torch.zeros(shape)):
        torch.testing.assert_close(slerp(a, b, 0.0), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=1e-4, atol=1e-4)
        for alpha in (0.1, 0.5, 0.9):
            assert slerp(a, b, alpha).isfinite().all() and slerp(a, b, alpha).shape == a.shape
    unit, other = a / a.norm(), noise(1, shape) / noise(1, shape).norm()
    theta = torch.acos((unit * other).sum())
    third = slerp(unit, other, 1 / 3)
    assert third.norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.acos((unit * third).sum()).item() == pytest.approx(theta.item() / 3, abs=1e-4)
    opposite = slerp(unit, -unit, 0.5)  # halfway to the opposite point: still on the sphere, and at a right angle
    assert opposite.norm().item() == pytest.approx(1, abs=1e-5) and (opposite * unit).sum().abs() < 1e-5
