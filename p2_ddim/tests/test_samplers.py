"""Every sampler, step by step, against the same one of diffusers on the same schedule; spacings; what holds for all."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)

from p2_ddim.diffusion import Denoiser, make_alpha_bar
from p2_ddim.samplers import SAMPLERS, SPACINGS, ImageNoise, by_name, finish, leading, linspace, logsnr, trailing

ALPHA_BAR = make_alpha_bar()
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SHAPE = (2, 3, 8, 8)
CLOSE = 5e-5  # of the largest value of a state, at least 1


def start(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def eps_of(x, t):
    """A fixed smooth stand-in for a network."""
    return 0.8 * torch.tanh(x + 0.3 * x.roll(1, dims=3) + t / 500) + 0.1


def model(x, t):
    alpha, sigma, eps = math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t]), eps_of(x, t)
    return (x - sigma * eps) / alpha, eps


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max().item() < CLOSE * max(1, theirs.abs().max().item())


@pytest.mark.parametrize("num_steps", [2, 10, 50])
@pytest.mark.parametrize("name, scheduler", [("dpmpp_2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_multistep_solvers_are_diffusers(name, scheduler, num_steps, final):
    """diffusers' sigma_min is alpha_bar[0]; DPM-Solver++ ends in first order there as well, as ours always does."""
    options = {"euler_at_final": True} if name == "dpmpp_2m" else {}
    theirs = scheduler(**SCHEDULE, timestep_spacing="trailing", final_sigmas_type=final, **options)
    theirs.set_timesteps(num_steps)
    ts = trailing(ALPHA_BAR, num_steps, end=1.0 if final == "zero" else ALPHA_BAR[0])
    assert theirs.timesteps.tolist() == list(ts.t)
    y = start()
    for t, state in zip(theirs.timesteps, SAMPLERS[name](model, start(), ts), strict=True):
        y = theirs.step(eps_of(y, int(t)), t, y).prev_sample
        assert_same(state.x, y)


@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_heun_is_diffusers(num_steps):
    """Theirs goes in x / alpha, and takes two calls a step."""
    theirs = HeunDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    theirs.set_timesteps(num_steps)
    ts = trailing(ALPHA_BAR, num_steps)
    y, ends = start() / math.sqrt(ts.alpha_bar[0]), []
    for t in theirs.timesteps:
        y = theirs.step(eps_of(theirs.scale_model_input(y, t), int(t)), t, y).prev_sample
        ends.append(y)
    for state, y, after in zip(SAMPLERS["heun"](model, start(), ts), [*ends[1::2], ends[-1]], ts.alpha_bar[1:], strict=True):
        assert_same(state.x, y * math.sqrt(after))


@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_ipndm_is_diffusers(num_steps):
    """Theirs has a schedule of its own; given ours, it predicts v."""
    theirs, ts = IPNDMScheduler(), trailing(ALPHA_BAR, num_steps)
    theirs.set_timesteps(num_steps)
    theirs.timesteps, theirs.ets, theirs._step_index = torch.tensor(ts.t), [], None
    theirs.alphas, theirs.betas = torch.tensor(ts.alpha_bar).sqrt(), (1 - torch.tensor(ts.alpha_bar)).sqrt()
    y = start()
    for i, (t, state) in enumerate(zip(theirs.timesteps, SAMPLERS["ipndm"](model, start(), ts), strict=True)):
        v = (eps_of(y, int(t)) - theirs.betas[i] * y) / theirs.alphas[i]
        y = theirs.step(v, t, y).prev_sample
        assert_same(state.x, y)


@pytest.mark.parametrize("name, num_steps, eta, clip", [("ddim", 10, 0.0, True), ("ddim", 50, 0.0, False), ("ddim", 50, 0.7, True), ("ddim", 250, 1.0, True),
                                                        ("ddpm", 10, 0.0, True), ("ddpm", 50, 0.0, False), ("ddpm", 250, 0.0, True)])
def test_ddim_and_ddpm_are_diffusers_with_the_same_fresh_noise(name, num_steps, eta, clip, monkeypatch):
    own, other = (ImageNoise(3, ["00", "01"], SHAPE[1:]) for _ in range(2))
    if name == "ddim":
        theirs = DDIMScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=clip)
        ts = leading(ALPHA_BAR, num_steps)
    else:
        theirs = DDPMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=clip)
        ts = trailing(ALPHA_BAR, num_steps)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: other())
    theirs.set_timesteps(num_steps)
    assert theirs.timesteps.tolist() == list(ts.t)

    class Clamped:
        alpha_bar, clip = ALPHA_BAR.tolist(), True
        eps, __call__ = staticmethod(eps_of), Denoiser.__call__

    sampler = by_name(name, eta)(Clamped() if clip else model, start(), ts, noise=own)
    y = start()
    for t, state in zip(ts.t, sampler, strict=True):
        extra = {"eta": eta, "variance_noise": other()} if eta else {}
        y = theirs.step(eps_of(y, t), t, y, **extra).prev_sample
        assert_same(state.x, y)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_what_holds_for_all(name):
    """float64 stays; every step is told; in the limit all agree; the number of evaluations is what the table says."""
    calls = []

    def counted(x, t):
        calls.append(t)
        return model(x, t)

    noise = ImageNoise(0, ["0", "1"], SHAPE[1:])
    states = list(SAMPLERS[name](counted, start(dtype=torch.float64), trailing(ALPHA_BAR, 20), noise=noise))
    assert [state.t for state in states] == list(trailing(ALPHA_BAR, 20).t)
    assert len(calls) == (39 if name == "heun" else 20)
    assert all(part.dtype == torch.float64 and part.isfinite().all() for state in states for part in (state.x, state.x0))
    if name != "ipndm":  # a clean end is the clean picture, but where eps is extrapolated
        torch.testing.assert_close(finish(states).x, states[-1].x0)


class Gaussian:
    """The exact answer for data N(mean, std^2), whose probability flow is known: it keeps (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2)."""

    mean, std = 0.2, 0.3

    def __call__(self, x, t):
        ab = ALPHA_BAR[t].item()
        x0 = self.mean + self.std**2 * ab**0.5 / (ab * self.std**2 + 1 - ab) * (x - ab**0.5 * self.mean)
        return x0, (x - ab**0.5 * x0) / (1 - ab) ** 0.5

    def end(self, x, t):
        ab = ALPHA_BAR[t].item()
        return self.mean + self.std * (x - ab**0.5 * self.mean) / (ab * self.std**2 + 1 - ab) ** 0.5


@pytest.mark.parametrize("name, coarse, fine", [("ddim", 0.11, 0.011), ("dpmpp_2m", 0.011, 0.001), ("heun", 0.022, 1e-4), ("unipc", 0.014, 1.5e-4),
                                                ("ipndm", 5e-4, 1.5e-4)])
def test_where_the_answer_is_known(name, coarse, fine):
    """The largest error after 50 and after 500 steps: a tenth of it at first order; at second, far less, down to what the ends, of first order, leave."""
    x, errors = start(dtype=torch.float64), []
    for n in (50, 500):
        ts = trailing(ALPHA_BAR, n, end=ALPHA_BAR[0])
        end = Gaussian().std**2 * ALPHA_BAR[0] + 1 - ALPHA_BAR[0]
        truth = ALPHA_BAR[0] ** 0.5 * Gaussian.mean + end**0.5 * (Gaussian().end(x, ts.t[0]) - Gaussian.mean) / Gaussian.std
        errors.append((finish(SAMPLERS[name](Gaussian(), x, ts)).x - truth).abs().max().item())
    assert errors[0] < coarse and errors[1] < fine, errors


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", 0.0), ("unipc", 0.0)])
def test_gaussian_data_in_distribution(name, eta):
    generator, shape = torch.Generator().manual_seed(0), (1, 1, 100, 200)
    last = finish(by_name(name, eta)(Gaussian(), torch.randn(shape, generator=generator), trailing(ALPHA_BAR, 500),
                                     noise=lambda: torch.randn(shape, generator=generator)))
    assert last.x.mean().item() == pytest.approx(Gaussian.mean, abs=0.01)
    assert last.x.std().item() == pytest.approx(Gaussian.std, abs=0.01)


@pytest.mark.parametrize("spacing, ours", [("leading", leading), ("trailing", trailing), ("linspace", linspace)])
def test_spacings_are_diffusers(spacing, ours):
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    for num_steps in (7, 10, 50, 250, 600, 999):
        theirs.set_timesteps(num_steps)
        assert list(ours(ALPHA_BAR, num_steps).t) == theirs.timesteps.tolist()


def test_steps_are_distinct_and_inside():
    """From 501 to 999 steps leading is n, ..., 1."""
    assert leading(ALPHA_BAR, 600).t == tuple(range(600, 0, -1)) and leading(ALPHA_BAR, 1000).t == tuple(range(999, -1, -1))
    for name, spacing in SPACINGS.items():
        for n in (1, 3, 50) if name == "logsnr" else (1, 3, 50, 501, 999, 1000):
            ts = spacing(ALPHA_BAR, n)
            assert len(ts.t) == n and list(ts.t) == sorted(set(ts.t), reverse=True) and 0 <= ts.t[-1] <= ts.t[0] <= 999
            assert ts.alpha_bar[:-1] == tuple(ALPHA_BAR[list(ts.t)].tolist()) and ts.alpha_bar[-1] == (ALPHA_BAR[0] if name == "leading" else 1)
        for n in (0, 1001):
            with pytest.raises(ValueError, match="number of steps"):
                spacing(ALPHA_BAR, n)
    with pytest.raises(ValueError, match="do not fit"):
        logsnr(ALPHA_BAR, 1000)


def test_eta_is_ddims_alone():
    with pytest.raises(ValueError, match="eta is for ddim"):
        by_name("unipc", 0.5)
    assert by_name("unipc") is SAMPLERS["unipc"]
