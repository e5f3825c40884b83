"""What the network reads in an image, by hand, and that what it doubts is drawn again."""

import argparse

import numpy as np
import pytest
import torch

from p1_cfg_ddpm import figures, inference, reading
from p1_cfg_ddpm.diffusion import Diffusion, DiffusionConfig
from p1_cfg_ddpm.inference import WEIGHT_OF_TRIES, DrawConfig, all_jobs, generate
from p1_cfg_ddpm.provenance import read_made
from p1_cfg_ddpm.reading import SURE, as_noisy
from p1_cfg_ddpm.samplers import ImageNoise

INFER = "p1_cfg_ddpm.inference"


class Templates(torch.nn.Module):
    """Takes every image for the template of the digit that it is told: its error at digit y is ||x0 - template_y||^2 / sigma^2."""

    null_digit = 10

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion, self.dtype, self.asked = diffusion, torch.nn.Parameter(torch.zeros(1)), []
        self.templates = torch.randn(10, 3, 28, 28, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)

    def forward(self, x, t, digit, domain):
        self.asked.append((int(t[0]), len(x)))
        a, s = self.diffusion.coefficients(t)
        return (a * x - self.templates[digit]) / s


def test_the_least_error_is_read():
    diffusion = Diffusion()
    model, digit = Templates(diffusion), torch.tensor([3, 4, 5])
    x0 = torch.stack([model.templates[3], 0.4 * model.templates[4] + 0.6 * model.templates[7], 0.9 * model.templates[5] + 0.1 * model.templates[6]])
    with torch.inference_mode():
        found = reading.doubt(model, diffusion, x0, digit, torch.zeros_like(digit), 0, ["a", "b", "c"])
    # by hand: of 0.4 A + 0.6 B the error as A is 0.36 ||A - B||^2, as B 0.16 ||A - B||^2, on any noise
    (first, sure), (second, enough) = reading.SURE
    assert found[0] < -100 and found[2] == pytest.approx(sure - (0.81 / 0.01 - 1), rel=1e-2)
    assert found[1] == pytest.approx(enough + (0.36 / 0.16 - 1), rel=1e-3)
    assert model.asked == [(first, 3)] * 10 + [(second, 1)] * 10  # two are sure at once


@pytest.mark.parametrize("sure, stages", [(((600, 0.10), (500, 0.05)), [500] * 6), (((600, 1e-6), (500, 0.05)), [600, 500, 500] * 2)])
def test_each_image_is_read_as_if_it_were_alone(tiny_model, monkeypatch, sure, stages):
    """On its own noises, in its own domain; the errors of both noises count where the first does not suffice."""
    if sure != SURE:  # so that some are sure at once
        monkeypatch.setattr(reading, "SURE", sure)
    diffusion, generator = Diffusion(), torch.Generator().manual_seed(3)
    x0, digit, domain = torch.randn(6, 3, 28, 28, generator=generator).clamp(-1, 1), torch.arange(6), torch.tensor([0, 1] * 3)
    names = [f"image {i}" for i in range(6)]
    with torch.inference_mode():
        digit[::3] = reading.errors(tiny_model, diffusion, x0, domain, 600, ImageNoise(7, names, x0.shape[1:])()).argmin(dim=1)[::3]
        found, asked = reading.doubt(tiny_model, diffusion, x0, digit, domain, 7, names), []
        for i, name in enumerate(names):
            noise, total = ImageNoise(7, [name], x0.shape[1:]), torch.zeros(10)
            for t, share in sure:
                steps, eps = torch.tensor([t]), noise()
                x, target = diffusion.add_noise(x0[i:i + 1], eps, steps), diffusion.target(x0[i:i + 1], eps, steps)
                total += torch.stack([(tiny_model(x, steps, torch.tensor([y]), domain[i:i + 1]) - target).square().mean() for y in range(10)])
                own, other = total[digit[i]], min(total[y] for y in range(10) if y != digit[i])
                expected = share - (other - own) / min(own, other)
                if expected <= 0:
                    break
            asked.append(t)
            assert found[i] == pytest.approx(float(expected), abs=1e-4)
    assert asked == stages


def test_what_is_doubted_is_drawn_again_and_the_least_doubted_kept(tiny_model, monkeypatch):
    """The second image is clear at its third try, the third image never, and least doubted at its second."""
    doubts = {"a": [-1.0], "b": [0.5, 0.2, -0.1, -9.0], "c": [0.3, 0.1, 0.2, 0.4]}
    jobs, asked = all_jobs(1, ("svhn",), (0, 1, 2)), []

    def doubt(model, diffusion, x, digit, domain, seed, names):
        asked.append(names)
        tries = [int(name.split("try ")[1][0]) if "try" in name else 1 for name in names]
        return torch.tensor([doubts["abc"[int(d)]][n - 1] for d, n in zip(digit, tries)])

    monkeypatch.setattr(inference, "doubt", doubt)
    config = DrawConfig(num_steps=2, tries=4)
    images = [image for _, image in generate(tiny_model, Diffusion(), jobs, config, 3, shown=False)]
    assert [len(names) for names in asked] == [3, 2, 2, 1]  # the fourth try is the third image's alone
    with torch.inference_mode():
        for i, attempt in enumerate((1, 3, 2)):
            alone = inference.finish(inference.states(tiny_model, Diffusion(), [jobs[i]], config, attempt=attempt)).x
            assert np.abs(inference.to_uint8(alone)[0].astype(int) - images[i]).max() <= 1
            assert (np.abs(inference.to_uint8(alone)[0].astype(int) - images[(i + 1) % 3]) > 1).any()


def test_an_image_that_is_drawn_again_does_not_depend_on_the_others(tiny_model):
    config, jobs = DrawConfig(num_steps=2, tries=3), all_jobs(1)[::2]
    whole, few = ({job.name: image.astype(int) for job, image in generate(tiny_model, Diffusion(), jobs, config, n, shown=False)} for n in (100, 3))
    once = {job.name: image for job, image in generate(tiny_model, Diffusion(), jobs, DrawConfig(num_steps=2), 100, shown=False)}
    assert max(np.abs(whole[name] - few[name]).max() for name in whole) <= 1
    assert any((whole[name] != once[name]).any() for name in whole)


def test_the_command_reads_where_it_is_asked_to(call, tiny_checkpoint, tmp_path):
    arguments = ["--checkpoint", tiny_checkpoint, "--images-per-digit", 1, "--digits", 1, "--steps", 2, "--device", "cpu"]
    for name, flags, tries, weight in (("1", [], 1, 4), ("3", ["--tries", 3], 3, WEIGHT_OF_TRIES), ("w", ["--tries", 2, "--guidance-weight", 5], 2, 5)):
        out = tmp_path / name
        code, _, err = call(INFER, out, *arguments, *flags)
        assert code == 0, err
        settings = read_made(out / "svhn" / "1_001.png")["settings"]
        assert (settings["tries"], settings["guidance_weight"]) == (tries, weight)
    code, text, err = call("p1_cfg_ddpm.redraw", tmp_path / "3" / "svhn" / "1_001.png", "--output", tmp_path / "again.png")
    assert code == 0 and "byte for byte" in text, err


def test_other_schedules_are_read_in_as_much_noise():
    cosine, linear = (Diffusion(DiffusionConfig(schedule)) for schedule in ("cosine", "linear"))
    for t, _ in SURE:
        assert as_noisy(t, cosine) == t
        other = as_noisy(t, linear)
        assert linear.alpha_bar[other + 1] < cosine.alpha_bar[t] < linear.alpha_bar[other - 1]


def test_without_guidance_nothing_is_chosen_unasked(monkeypatch, tiny_checkpoint):
    """On a GPU, too, where digits are drawn again otherwise."""
    monkeypatch.setitem(inference.TRIES, "cpu", 4)
    parser = argparse.ArgumentParser()
    inference.add_arguments(parser)
    inference.add_tries(parser)
    for flags, tries in (([], 4), (["--guidance-weight", "2"], 4), (["--guidance-weight", "0"], 1), (["--guidance-weight", "0", "--tries", "3"], 3)):
        config = inference.load_with_settings(parser.parse_args(["--checkpoint", str(tiny_checkpoint), "--device", "cpu", *flags]))[2]
        assert config.tries == tries


def test_the_reverse_process_is_that_of_the_try_that_is_kept(monkeypatch, tiny_model):
    seen = iter([1.0, 0.5, -1.0] * 2)
    monkeypatch.setattr(inference, "doubt", lambda *_: torch.tensor([next(seen)]))
    shown = []
    monkeypatch.setattr(figures, "sheet", lambda rows, **_: shown.append(rows))
    config, job = DrawConfig(num_steps=2, tries=4), all_jobs(1)[0]
    (_, image), = generate(tiny_model, Diffusion(), [job], config, 1, shown=False)
    figures.reverse_process(tiny_model, Diffusion(), job, config)
    assert (shown[0][0][-1] == image).all()
    first = inference.finish(inference.states(tiny_model, Diffusion(), [job], config)).x
    assert (inference.to_uint8(first)[0] != image).any()


@pytest.mark.parametrize("flags, message", [(["--tries", 0], "--tries must be between 1 and 100, not 0"),
                                            (["--tries", 2, "--student"], "--tries is not for student.safetensors")])
def test_tries_that_are_refused(call, tmp_path, flags, message):
    code, _, err = call(INFER, tmp_path / "out", *flags)
    assert code == 1 and message in err and len(err.splitlines()) == 1
