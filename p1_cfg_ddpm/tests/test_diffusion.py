"""The mathematics: against diffusers' schedulers, and against the closed form where the data is Gaussian."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from p1_cfg_ddpm.diffusion import Diffusion, DiffusionConfig, Guided, make_alpha_bar, moment_density
from p1_cfg_ddpm.samplers import ImageNoise, by_name, ddim, ddpm, dpmpp_2m, finish, logsnr, steps_at, trailing

CONFIGS = [DiffusionConfig(schedule, prediction) for schedule in ("linear", "cosine") for prediction in ("eps", "v")]
SHAPE = (2, 3, 8, 8)


class FakeNetwork(torch.nn.Module):
    """A fixed smooth function of everything a UNet sees; counts the images it is shown."""

    null_digit, null_domain = 10, 2

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.weight = torch.nn.Parameter(torch.eye(3) + 0.1)

    def forward(self, x, t, digit, domain):
        self.seen += len(x)
        mixed = torch.einsum("oc,bchw->bohw", self.weight, x)
        phase = (t / 300 + digit * 0.7 + domain * 0.3)[:, None, None, None]
        return 0.5 * torch.sin(mixed + phase)


def guided(config, w=0.0, clip=False, **options):
    diffusion = Diffusion(config)
    return Guided(FakeNetwork(), diffusion, torch.tensor([3, 8]), torch.tensor([0, 1]), w, clip=clip, **options), diffusion


def scheduler(cls, config, **options):
    names = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    theirs = cls(beta_start=1e-4, beta_end=0.02, beta_schedule=names[config.schedule], timestep_spacing="trailing",
                 prediction_type={"eps": "epsilon", "v": "v_prediction"}[config.prediction], **options)
    # theirs is a float32 product: compared by itself in test_alpha_bar; here the steps are compared
    theirs.alphas_cumprod = Diffusion(config).alpha_bar.float()
    return theirs


def largest_difference(ours, theirs, config, x, num_steps, **step_options):
    """Steps both samplers from x; returns the largest absolute difference of any state."""
    predict, diffusion = guided(config)
    theirs.set_timesteps(num_steps)
    assert theirs.timesteps.tolist() == list(trailing(diffusion.alpha_bar, num_steps).t)
    worst = 0.0
    y = x.clone()
    with torch.inference_mode():
        for t, state in zip(theirs.timesteps, ours, strict=True):
            y = theirs.step(predict.output(y, int(t)), t, y, **{k: v() if callable(v) else v for k, v in step_options.items()}).prev_sample
            worst = max(worst, (state.x - y).abs().max().item() / max(1.0, y.abs().max().item()))
    return worst


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_bar(schedule):
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule])
    torch.testing.assert_close(make_alpha_bar(schedule).float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    assert all(0 < make_alpha_bar(schedule, few).min() <= make_alpha_bar(schedule, few).max() < 1 for few in (1, 2, 10, 25))


def test_the_linear_schedule_of_other_lengths_ends_in_as_much_noise():
    ends = [make_alpha_bar("linear", steps)[-1].log().item() for steps in (500, 1000, 2000)]
    assert ends == pytest.approx([ends[1]] * 3, rel=0.02) and DiffusionConfig().schedule == "cosine"


@pytest.mark.parametrize("mean, std", [(-0.5, 1.0), (0.3, 0.6)])
def test_training_visits_noise_levels_as_a_normal_has_them(mean, std):
    """The density over t, summed, is the normal's distribution function of ln(sigma / alpha)."""
    alpha_bar = make_alpha_bar("cosine")
    sigmas = (0.5 * ((1 - alpha_bar) / alpha_bar).log() - mean) / std
    normal = 0.5 * (1 + torch.erf(sigmas / math.sqrt(2)))
    assert (moment_density(alpha_bar, mean, std).cumsum(0) - normal).abs().max() < 0.01


def test_a_guide_is_led_away_from():
    """Autoguidance: (1 + w) of the network less w of the weaker one, both told the condition; and x0 is clamped unasked."""
    x, diffusion, guide = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), Diffusion(), FakeNetwork()
    with torch.no_grad():
        guide.weight.mul_(0.3)
        both = Guided(net := FakeNetwork(), diffusion, torch.tensor([3, 8]), torch.tensor([0, 1]), 2.0, guide=guide)
        told = [n(x, torch.tensor([400, 400]), torch.tensor([3, 8]), torch.tensor([0, 1])) for n in (net, guide)]
        assert torch.allclose(both.output(x, 400), 3 * told[0] - 2 * told[1], atol=1e-5)
        assert both(5 * x, 400)[0].abs().max() <= 1


@pytest.mark.parametrize("config", CONFIGS)
def test_x0_and_eps_invert_the_target(config):
    diffusion = Diffusion(config)
    x0, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 700])
    xt = diffusion.add_noise(x0, eps, t)
    found_x0, found_eps = diffusion.x0_and_eps(diffusion.target(x0, eps, t), xt, t)
    torch.testing.assert_close(found_x0, x0, rtol=0, atol=2e-3 if config.prediction == "eps" else 1e-5)
    torch.testing.assert_close(found_eps, eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_steps", [4, 50])
def test_ddim_is_diffusers(config, num_steps):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    predict, diffusion = guided(config)
    with torch.inference_mode():
        ours = ddim(predict, x, trailing(diffusion.alpha_bar, num_steps))
        assert largest_difference(ours, scheduler(DDIMScheduler, config, clip_sample=False), config, x, num_steps) < 1e-4


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_is_diffusers(eta):
    config = DiffusionConfig("linear", "v")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    predict, diffusion = guided(config)
    noises = [ImageNoise(5, ["a", "b"], SHAPE[1:]) for _ in range(2)]
    with torch.inference_mode():
        ours = ddim(predict, x, trailing(diffusion.alpha_bar, 20), eta=eta, noise=noises[0])
        theirs = scheduler(DDIMScheduler, config, clip_sample=False)
        assert largest_difference(ours, theirs, config, x, 20, eta=eta, variance_noise=noises[1]) < 1e-4


@pytest.mark.parametrize("config", CONFIGS)
def test_ddpm_is_diffusers(config):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    predict, diffusion = guided(config)
    theirs_noise = torch.Generator().manual_seed(7)
    ours_noise = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        ours = ddpm(predict, x, trailing(diffusion.alpha_bar, 40), noise=lambda: torch.randn(SHAPE, generator=ours_noise))
        theirs = scheduler(DDPMScheduler, config, clip_sample=False)
        assert largest_difference(ours, theirs, config, x, 40, generator=theirs_noise) < 1e-4


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_steps", [5, 20])
def test_dpmpp_2m_is_diffusers(config, num_steps):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    predict, diffusion = guided(config)
    with torch.inference_mode():
        ours = dpmpp_2m(predict, x, trailing(diffusion.alpha_bar, num_steps))
        theirs = scheduler(DPMSolverMultistepScheduler, config, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
                           final_sigmas_type="zero")
        # theirs passes through sigma/alpha in float32, which is 2e4 at the end of the cosine schedule
        assert largest_difference(ours, theirs, config, x, num_steps) < (1e-4 if config.schedule == "linear" else 1e-3)


class Gaussian:
    """The exact predictor for data N(mean, std^2): E[x0 | x_t] in closed form."""

    mean, std = 0.3, 0.4

    def __init__(self, diffusion):
        self.diffusion = diffusion

    def __call__(self, x, t):
        alpha_bar = self.diffusion.alpha_bar[t]
        x = x.double()
        x0 = self.mean + self.std**2 * alpha_bar.sqrt() / (alpha_bar * self.std**2 + 1 - alpha_bar) * (x - alpha_bar.sqrt() * self.mean)
        return x0, (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    def flow(self, x, t):
        """Where the probability flow takes x_t: the standard score is kept."""
        alpha_bar = self.diffusion.alpha_bar[t]
        return self.mean + self.std * (x.double() - alpha_bar.sqrt() * self.mean) / (alpha_bar * self.std**2 + 1 - alpha_bar).sqrt()


def flow_error(sampler, num_steps):
    diffusion = Diffusion(DiffusionConfig("linear"))
    gaussian, x = Gaussian(diffusion), torch.linspace(-3, 3, 64)[None, None, None]
    last = finish(by_name(sampler)(gaussian, x, trailing(diffusion.alpha_bar, num_steps)))
    return (last.x - gaussian.flow(x, 999)).abs().max().item()


def test_deterministic_samplers_follow_the_probability_flow():
    assert flow_error("ddim", 1000) < 0.01
    assert flow_error("ddim", 200) < flow_error("ddim", 50) < flow_error("ddim", 20)
    assert flow_error("dpmpp_2m", 50) < 0.35 * flow_error("ddim", 50)  # second order against first


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_reach_the_distribution(sampler, eta):
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 100, 200)
    x = torch.randn(shape, generator=generator)
    ts = trailing(diffusion.alpha_bar, 250)
    last = finish(by_name(sampler, eta)(Gaussian(diffusion), x, ts, noise=lambda: torch.randn(shape, generator=generator)))
    assert last.x.mean().item() == pytest.approx(Gaussian.mean, abs=0.012)
    assert last.x.std().item() == pytest.approx(Gaussian.std, abs=0.012)


def test_guidance_is_the_formula():
    """eps = (1+w) eps_cond - w eps_uncond, in one doubled batch, for eps- and v-prediction alike."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for config in CONFIGS:
        predict, diffusion = guided(config, w=1.7)
        t = torch.full((2,), 400)
        with torch.inference_mode():
            _, eps = predict(x, 400)
            assert predict.model.seen == 4
            _, cond = diffusion.x0_and_eps(predict.model(x, t, predict.digit, predict.domain), x, t)
            _, uncond = diffusion.x0_and_eps(predict.model(x, t, torch.full((2,), 10), torch.full((2,), 2)), x, t)
        torch.testing.assert_close(eps, (1 + 1.7) * cond - 1.7 * uncond, rtol=0, atol=1e-5)


def test_clipping_keeps_x0_and_eps_together():
    predict, diffusion = guided(DiffusionConfig(), w=4.0, clip=True)
    x, t = 2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), torch.full((2,), 600)
    with torch.inference_mode():
        x0, eps = predict(x, 600)
    assert x0.abs().max() == 1
    torch.testing.assert_close(diffusion.add_noise(x0, eps, t), x, rtol=0, atol=1e-5)


def test_no_unconditional_half_where_guidance_is_off():
    for options, images in (({"w": 0.0}, 20), ({"w": 1.0}, 40), ({"w": 1.0, "interval": (0.25, 0.75)}, 30)):
        predict, diffusion = guided(DiffusionConfig(), **options)
        with torch.inference_mode():
            list(ddim(predict, torch.zeros(SHAPE), steps_at(diffusion.alpha_bar, [999, 899, 799, 700, 600, 500, 400, 300, 200, 100])))
        assert predict.model.seen == images


def test_no_noise_is_drawn_at_eta_0():
    def noise():
        raise AssertionError("noise was asked for")

    predict, diffusion = guided(DiffusionConfig())
    with torch.inference_mode():
        for name in ("ddim", "dpmpp_2m", "heun", "unipc", "ipndm"):
            list(by_name(name)(predict, torch.zeros(SHAPE), trailing(diffusion.alpha_bar, 3), noise=noise))


def test_loss_drops_conditions_and_weighs_by_snr():
    class Constant(torch.nn.Module):
        null_digit, null_domain = 10, 2

        def forward(self, x, t, digit, domain):
            self.digit, self.domain = digit, domain
            return torch.zeros_like(x)

    x0, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    t, drop = torch.tensor([50, 900]), torch.tensor([False, True])
    for config in CONFIGS:
        model, diffusion = Constant(), Diffusion(config)
        plain = diffusion.loss(model, x0, torch.tensor([3, 4]), torch.tensor([0, 1]), t, eps, drop)
        assert model.digit.tolist() == [3, 10] and model.domain.tolist() == [0, 2]
        torch.testing.assert_close(plain, diffusion.target(x0, eps, t).square().mean(dim=(1, 2, 3)))
        weighted = diffusion.loss(model, x0, torch.tensor([3, 4]), torch.tensor([0, 1]), t, eps, drop, min_snr_gamma=5.0)
        snr = diffusion.alpha_bar[t] / (1 - diffusion.alpha_bar[t])
        # as a loss on x0 the weight is min(SNR, 5): |x0 error|^2 = |eps error|^2 / SNR = |v error|^2 / (SNR + 1)
        expected = snr.clamp(max=5) / (snr if config.prediction == "eps" else snr + 1)
        torch.testing.assert_close(weighted / plain, expected.float())


def test_image_noise_belongs_to_the_image():
    both, one = ImageNoise(0, ["svhn/3_001", "mnistm/3_001"], (3, 4, 4)), ImageNoise(0, ["mnistm/3_001"], (3, 4, 4))
    first, second = both(), both()
    assert torch.equal(first[1], one()[0]) and torch.equal(second[1], one()[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert not torch.equal(ImageNoise(1, ["mnistm/3_001"], (3, 4, 4))()[0], first[1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_logsnr_steps(schedule):
    alpha_bar = make_alpha_bar(schedule)
    lambda_ = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
    found = lambda_[list(logsnr(alpha_bar, 6).t)]
    torch.testing.assert_close(found, torch.linspace(-2.0, 1.7, 6, dtype=torch.float64), rtol=0, atol=0.02)
    for n in (1, 2, 50, 500):
        steps = logsnr(alpha_bar, n).t
        assert len(steps) == n and all(a > b >= 0 for a, b in pairwise(steps))
    with pytest.raises(ValueError):
        logsnr(alpha_bar, 1000)


def test_trailing_steps():
    alpha_bar = make_alpha_bar("linear")
    assert trailing(alpha_bar, 1000).t == tuple(range(999, -1, -1))
    assert trailing(alpha_bar, 4).t == (999, 749, 499, 249)
    assert trailing(alpha_bar, 4).alpha_bar == (*alpha_bar[[999, 749, 499, 249]].tolist(), 1.0)
    for n in (1, 3, 7, 333):
        steps = trailing(alpha_bar, n).t
        assert len(steps) == n and steps[0] == 999 and all(a > b >= 0 for a, b in pairwise(steps))
    with pytest.raises(ValueError):
        trailing(alpha_bar, 1001)
    assert math.isclose(float(make_alpha_bar("linear", 1000)[0]), 0.9999)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_parallel_to_the_image_is_left_out_by_domain(config):
    """Of the first domain half is kept, of the second nothing: what is left of the guidance leaves the contrast as it is."""
    x, t, w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), 600, 3.0

    def x0_of(w, **options):
        predict, diffusion = guided(config, w, **options)
        return diffusion.x0_and_eps(predict.output(x, t), x, torch.full((2,), t))[0]

    with torch.inference_mode():
        plain, whole, told = x0_of(w), x0_of(w, parallel=(1.0, 1.0)), x0_of(0.0)
        some = x0_of(w, parallel=(0.5, 0.0))
    assert torch.equal(whole, plain)
    deviation = told - told.mean(dim=(1, 2, 3), keepdim=True)
    along = [((changed - told) * deviation).sum(dim=(1, 2, 3)) for changed in (plain, some)]
    assert torch.allclose(along[1], torch.tensor([0.5, 0.0]) * along[0], atol=1e-3) and along[0].abs().min() > 1
    assert ((plain - some)[1] / deviation[1]).std() < 1e-3 * (plain - some)[1].abs().max()  # and nothing else is
