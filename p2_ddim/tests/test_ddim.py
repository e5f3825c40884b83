"""The convention, the way to pictures, inversion, and interpolation."""

import math

import pytest
import torch

from p2_ddim.diffusion import Denoiser, make_alpha_bar
from p2_ddim.inference import QUALITIES, DrawConfig, to_pictures
from p2_ddim.interpolation import lerp, slerp
from p2_ddim.inversion import belm, belm_invert, invert, to_pair
from p2_ddim.model import UNet, UNetConfig
from p2_ddim.reference import scheduler, to_diffusers
from p2_ddim.samplers import ddim, finish, leading, trailing

SHAPE = (2, 3, 16, 16)
ALPHA_BAR = make_alpha_bar()


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Smooth(torch.nn.Module):
    """A fixed smooth stand-in for a network."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.8), requires_grad=False)

    def forward(self, x, t):
        return self.weight * torch.tanh(x + 0.3 * x.roll(1, dims=3) + t[0] / 500) + 0.1


def test_the_convention():
    """interface: t = 981, 961, ..., 21, 1; alpha_bar at that same t; alpha_bar[0] after the last step; x0 clamped, eps kept."""
    config, called = DrawConfig(), []
    assert config == QUALITIES["exact"]
    ts = config.steps()
    assert ts.t == tuple(range(981, 0, -20))
    assert ts.alpha_bar == (*ALPHA_BAR[list(range(981, 0, -20))].tolist(), ALPHA_BAR[0].item()) and ts.alpha_bar[-1] == pytest.approx(0.9999)

    class Asked(Smooth):
        def forward(self, x, t):
            called.append((int(t[0]), x))
            assert t.dtype == torch.long and t.shape == x.shape[:1]
            return super().forward(x, t)

    x = 3 * noise()
    states = list(config.states(Asked(), x))
    assert [t for t, _ in called] == [state.t for state in states] == list(ts.t)
    # the first step written out
    ab, ab_prev = ALPHA_BAR[981].float(), ALPHA_BAR[961].float()
    eps = Smooth()(x, torch.tensor([981, 981]))
    x0 = ((x - (1 - ab).sqrt() * eps) / ab.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(states[0].x, ab_prev.sqrt() * x0 + (1 - ab_prev).sqrt() * eps, rtol=0, atol=1e-6)
    assert all(state.x0.abs().max() <= 1 for state in states)


@pytest.mark.parametrize("num_steps", [10, 50, 250])
@pytest.mark.parametrize("clip", [True, False])
def test_every_state_is_diffusers(num_steps, clip):
    theirs, y = scheduler(num_steps, clip), noise()
    for t, state in zip(theirs.timesteps, DrawConfig(num_steps=num_steps, clip=clip).states(Smooth(), noise()), strict=True):
        y = theirs.step(Smooth()(y, t[None]), t, y, eta=0.0).prev_sample
        assert (state.x - y).abs().max().item() < 5e-5 * max(1, y.abs().max().item())


def test_the_whole_is_diffusers():
    """Network and sampler together, 50 steps, each from our last state: an untrained network magnifies rounding from step to step."""
    torch.manual_seed(0)
    model = UNet(UNetConfig((32, 32), (1,), 1)).eval()
    network, steps, x = to_diffusers(model), scheduler(50), noise(1)
    with torch.inference_mode():
        for t, state in zip(steps.timesteps, DrawConfig().states(model, x), strict=True):
            torch.testing.assert_close(state.x, steps.step(network(x, t).sample, t, x, eta=0.0).prev_sample, rtol=0, atol=1e-4)
            x = state.x


def test_bad_configurations_are_refused():
    for options in ({"num_steps": 0}, {"num_steps": 1001}, {"spacing": "odd"}, {"last_alpha_bar": "two"}, {"eta": -0.1}, {"sampler": "odd"},
                    {"sampler": "unipc", "eta": 0.5}, {"spacing": "logsnr", "num_steps": 1000}):
        with pytest.raises(ValueError):
            DrawConfig(**options)


# inversion

def psnr(a, b):
    return -10 * math.log10((a - b).square().mean().item() / 4)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return UNet(UNetConfig((32, 32), (1,), 1)).to(dtype).eval().requires_grad_(False)


def test_inversion_finds_the_noise():
    model, ts = Denoiser(Smooth(), clip=False), leading(ALPHA_BAR, 50)
    image = finish(ddim(model, noise(), ts)).x
    once, often = (finish(invert(model, image, ts, iterations=n)).x for n in (1, 5))
    assert psnr(often, noise()) > psnr(once, noise()) + 10
    assert psnr(finish(ddim(model, often, ts)).x / 4, image / 4) > 40


@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_belm_is_undone_exactly(num_steps):
    """In float64 more than 100 dB, both ways: from any picture, and from noise."""
    model, ts = Denoiser(network(torch.float64), clip=False), trailing(ALPHA_BAR, num_steps)
    image = noise(1, (2, 3, 8, 8)).double().clamp(-1, 1)
    with torch.inference_mode():
        pair = to_pair(model, image, ts)
        assert pair.shape == (2, 2, 3, 8, 8) and pair.dtype == torch.float64
        assert psnr(finish(belm(model, pair[:, 0], ts, second=pair[:, 1])).x, image) > 100
        *_, before, last = belm(model, noise(2, (2, 3, 8, 8)), ts)
        assert last.t == ts.t[-1] and before.t == ts.t[-2] and last.x.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_belm_is_undone_whatever_the_network_computes_in(dtype):
    model, ts = Denoiser(network(), clip=False, dtype=dtype), trailing(ALPHA_BAR, 20)
    image = noise(1, (2, 3, 8, 8)).clamp(-1, 1)
    pair = to_pair(model, image, ts)
    assert psnr(finish(belm(model, pair[:, 0], ts, second=pair[:, 1])).x, image) > 100


def test_belm_draws_what_ddim_draws():
    """The same equation: with many steps the same picture, and sooner, being of second order."""
    model = Denoiser(Smooth(), clip=False)
    truth = finish(ddim(model, noise().double(), trailing(ALPHA_BAR, 1000, end=ALPHA_BAR[0]))).x
    ts = trailing(ALPHA_BAR, 100, end=ALPHA_BAR[0])
    first, second = (finish(sampler(model, noise().double(), ts)).x for sampler in (ddim, belm))
    assert (second - truth).square().mean() < (first - truth).square().mean() / 2


def test_the_rule_of_belm_is_of_second_order():
    """Exact where y is quadratic in s: eps = 2 a s + b."""
    ts = trailing(ALPHA_BAR, 20, end=ALPHA_BAR[0])
    s = [((1 - a) / a) ** 0.5 for a in ts.alpha_bar]

    def model(x, t):
        eps = torch.full_like(x, 0.02 * s[ts.t.index(t)] + 0.3)
        return (x - (1 - ALPHA_BAR[t].item()) ** 0.5 * eps) / ALPHA_BAR[t].item() ** 0.5, eps

    def y(i):
        return 0.01 * s[i] ** 2 + 0.3 * s[i]

    x = [torch.full((1, 3, 2, 2), y(i) * ts.alpha_bar[i] ** 0.5, dtype=torch.float64) for i in range(21)]
    for i, state in enumerate(belm(model, x[0], ts, second=x[1])):
        torch.testing.assert_close(state.x, x[i + 1], rtol=1e-9, atol=1e-9)
    *_, second, first = belm_invert(model, x[-1], ts, iterations=1)
    assert second.x.shape == first.x.shape


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
