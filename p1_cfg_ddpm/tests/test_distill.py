"""A student: its target by hand, the whole way from a teacher to drawn images, and what it is refused."""

import argparse
import csv
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from p1_cfg_ddpm import distill, inference, paths
from p1_cfg_ddpm.data import MINI_DATA
from p1_cfg_ddpm.diffusion import Diffusion, Distilled, Guided
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.inference import DEFAULT, all_jobs, generate, load_generator, steps_of
from p1_cfg_ddpm.model import SIZES, UNet, load_model, save_model
from p1_cfg_ddpm.samplers import SAMPLERS
from p1_cfg_ddpm.train import PowerEMA

SETTINGS = ["--size", "tiny", "--data", MINI_DATA, "--paths", 24, "--batch-size", 8, "--steps", 8, "--leaps", 2, "--tuning", 0.5, "--teacher-steps", 4,
            "--warmup", 1, "--validate-every", 4, "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def student(tiny_model, tmp_path):
    """The path of an untrained one of two leaps, which has learned weights up to 3."""
    torch.manual_seed(1)
    net = UNet(replace(SIZES["tiny"], times=(999, 449)))
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    save_model(tmp_path / "student.safetensors", net, Diffusion(), {"max_weight": 3.0})
    return tmp_path / "student.safetensors"


def call(monkeypatch, module, *arguments):
    AcceleratorState._reset_state()  # accelerate holds a process to its first number format
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def stopping_after(monkeypatch, steps):
    """The training breaks off in the step after so many."""
    update, left = PowerEMA.update, iter(range(steps))
    monkeypatch.setattr(PowerEMA, "update", lambda self, net, step: (update(self, net, step), next(left)))


def test_the_target_lands_where_the_path_is():
    diffusion = Diffusion()
    x, landing = torch.randn(2, 3, 3, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    t, s = torch.tensor([999, 800, 449]), torch.tensor([449, 351, distill.CLEAN])
    x0 = distill.needed_x0(diffusion, x, landing, t, s)
    assert torch.allclose(distill.leap(diffusion, x, x0, t, s), landing, atol=1e-4)
    assert torch.equal(x0[2], landing[2])  # the last leap ends at the image itself
    # DDIM's own rule, as the samplers have it: x_s = a_s x0 + sigma_s eps
    a, sigma = diffusion.coefficients(t[:2])
    a_s, sigma_s = diffusion.coefficients(s[:2])
    assert torch.allclose(a_s * x0[:2] + sigma_s * (x[:2] - a * x0[:2]) / sigma, landing[:2], atol=1e-4)


def test_paths_are_what_the_sampler_draws(tiny_model, monkeypatch):
    """One call draws with many weights, some paths at a time, what `Guided` draws with each."""
    monkeypatch.setitem(paths.AT_ONCE, "cpu", 4)
    diffusion, config = Diffusion(), replace(DEFAULT, num_steps=3)
    ts = steps_of(config, diffusion)
    drawn = distill.draw_paths(tiny_model, None, diffusion, config, list(ts.t), list(ts.t[:2]), 6, 2.0, torch.Generator().manual_seed(0))
    assert drawn["w"][::2].tolist() == [config.guidance_weight] * 3 and len(set(drawn["w"].tolist())) == 4 and drawn["x"].shape == (3, 6, 3, 28, 28)
    for i in (0, 5):
        predict = Guided(tiny_model, diffusion, drawn["digit"][i:i + 1], drawn["domain"][i:i + 1], drawn["w"][i].item(), parallel=config.guidance_parallel)
        with torch.inference_mode():
            ways = [state.x for state in SAMPLERS[config.sampler](predict, drawn["x"][0, i:i + 1].float(), ts)]
        for ours, theirs in ((ways[0], drawn["x"][1, i]), (ways[-1], drawn["x"][-1, i])):
            assert (ours - theirs.float()).abs().max() < 0.02  # fp16 on the way in and out


def test_the_guidance_weight_is_an_input(student):
    net, _ = load_model(student)
    digit, x = torch.tensor([3, 3]), torch.zeros(2, 3, 28, 28)
    x0, _ = Distilled(net, Diffusion(), digit, torch.zeros_like(digit), torch.tensor([0.0, 3.0]))(x, 999)
    assert not torch.allclose(x0[0], x0[1])


def test_a_stopped_student_ends_with_the_same_weights(monkeypatch, tiny_checkpoint, tmp_path):
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], dropout=0.1))  # as medium and base have
    settings = ["--teacher", tiny_checkpoint, "--paths-in", tmp_path / "paths", *SETTINGS]
    call(monkeypatch, distill, *settings, "--output", tmp_path / "whole")
    for steps in (3, 4):  # once in each stage: in step 4, and from 2 on in step 7
        with monkeypatch.context() as patch:
            stopping_after(patch, steps)
            with pytest.raises(StopIteration):
                call(patch, distill, *settings, "--output", tmp_path / "stopped", "--save-every", 2)
    call(monkeypatch, distill, *settings, "--output", tmp_path / "stopped", "--save-every", 2)
    whole, stopped = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "stopped"))
    assert whole["stage"] == stopped["stage"] == {"name": "tuning", "began": 4}
    for part in ("model", "ema"):
        ours, theirs = ((state[part][0] if part == "ema" else state[part]) for state in (whole, stopped))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model, _ = load_generator(tmp_path / "whole" / "model.safetensors", torch.device("cpu"), torch.float32)
    assert len(model.config.times) == 2 and model.max_weight == 6.0
    call(monkeypatch, inference, tmp_path / "out", "--checkpoint", tmp_path / "whole" / "model.safetensors", "--images-per-digit", 1, "--digits", 3)
    assert len(list((tmp_path / "out").rglob("3_001.png"))) == 2
    with pytest.raises(UserError, match="is a student itself; give its teacher"):
        call(monkeypatch, distill, "--teacher", tmp_path / "whole" / "model.safetensors", *SETTINGS, "--output", tmp_path / "again")
    with pytest.raises(UserError, match="is at step 8 already, beyond --steps 4"):
        call(monkeypatch, distill, *settings, "--steps", 4, "--output", tmp_path / "whole")
    for flags in (["--teacher-steps", 5], ["--guidance-weight", 2], ["--guidance-parallel", 1, 0.5], ["--max-weight", 5]):
        with pytest.raises(UserError, match="has paths of another teacher, of other settings or of another number"):
            call(monkeypatch, distill, *settings, *flags, "--output", tmp_path / "other")


def test_a_stopped_students_minutes_go_on_where_they_were(monkeypatch, tiny_checkpoint, tmp_path):
    """By a clock that goes on by a second whenever it is asked: the rate falls on, and what the paths took is not taken twice."""
    seconds, done, real = iter(range(10**6)), [], distill.share_of_stage
    monkeypatch.setattr("p1_cfg_ddpm.train.time.perf_counter", lambda: next(seconds))
    monkeypatch.setattr(distill, "share_of_stage", lambda name, share, tuning: done.append(share) or real(name, share, tuning))
    settings = ["--teacher", tiny_checkpoint, *SETTINGS, "--minutes", 1, "--tuning", 0, "--validate-every", 0, "--save-every", 1, "--output", tmp_path / "run"]
    with monkeypatch.context() as patch:
        stopping_after(patch, 8)
        with pytest.raises(StopIteration):
            call(patch, distill, *settings)
    stopped = len(done)
    call(monkeypatch, distill, *settings)
    assert len(done) > stopped + 3 and done == sorted(done) and 0 < done[stopped] - done[stopped - 2] < 0.3
    ended = len(done)
    call(monkeypatch, distill, *settings)  # which has ended
    assert len(done) == ended


def test_a_student_learns_its_teachers_paths(monkeypatch, tiny_checkpoint, tmp_path):
    call(monkeypatch, distill, "--teacher", tiny_checkpoint, *SETTINGS, "--tuning", 0, "--steps", 40, "--lr", 5e-3, "--output", tmp_path / "run",
         "--validate-every", 10)
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        apart = [float(row["validation"]) for row in csv.DictReader(file) if row["validation"]]  # in grey levels, on paths that it never saw
    assert apart[-1] < 0.985 * apart[0]  # the teacher, which is untrained, draws what is hard to learn


def test_a_student_is_trained_in_bf16(monkeypatch, tiny_checkpoint, tmp_path):
    """Both stages, on a CPU, where `auto` is bf16 if it has it: autocast there is not a GPU's (it refuses to join tensors of fp16)."""
    call(monkeypatch, distill, "--teacher", tiny_checkpoint, *SETTINGS[:-1], "bf16", "--steps", 2, "--output", tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["stage"]["name"] == "tuning"


def test_a_student_goes_on_from_another_ones_weights(monkeypatch, student, tiny_checkpoint, tmp_path):
    """A step of a rate of next to nothing leaves them as they were."""
    settings = ["--teacher", tiny_checkpoint, *SETTINGS, "--init", student, "--steps", 1, "--tuning", 0, "--lr", 1e-12]
    call(monkeypatch, distill, *settings, "--output", tmp_path / "run")
    ours, theirs = (load_model(path)[0].state_dict() for path in (tmp_path / "run" / "model.safetensors", student))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").unlink()  # killed between its last state and its model
    call(monkeypatch, distill, *settings, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    with pytest.raises(UserError, match="does not fit the network"):
        call(monkeypatch, distill, *settings, "--init", tiny_checkpoint, "--output", tmp_path / "other")


@pytest.mark.parametrize("flags, said", [
    (["--guide", "student"], "student.safetensors is a student itself; give its teacher"),
    (["--leaps", 3, "--teacher-steps", 2], "--teacher-steps 2 are too few for --leaps 3, which would begin at t = "),
    (["--max-weight", 2], "--max-weight must be at least --guidance-weight, 4, not 2"),
])
def test_what_no_student_can_be_made_of(monkeypatch, student, tiny_checkpoint, tmp_path, flags, said):
    flags = [student if flag == "student" else flag for flag in flags]
    with pytest.raises(UserError) as refused:
        call(monkeypatch, distill, "--teacher", tiny_checkpoint, *SETTINGS, "--output", tmp_path / "run", *flags)
    assert said in str(refused.value)


def test_a_flag_given_at_its_default_is_the_same_run(monkeypatch, tiny_checkpoint, tmp_path):
    settings = ["--teacher", tiny_checkpoint, *SETTINGS, "--tuning", 0, "--steps", 1, "--output", tmp_path / "run"]
    call(monkeypatch, distill, *settings)
    call(monkeypatch, distill, *settings, "--guidance-parallel", 1, 0.25, "--guidance-interval", 0, 1)


@pytest.mark.parametrize("flags, said", [
    (["--steps", 4], "--steps is not for student.safetensors, a student that draws in 2 steps of its own; only other networks have it"),
    (["--sampler", "ddpm"], "--sampler is not for student.safetensors"),
    (["--guidance-weight", 3.5], "--guidance-weight of student.safetensors must be between 0 and 3, which it has learned, not 3.5"),
    (["--student"], "--student is the bundled one; give it or --checkpoint, not both"),
])
def test_what_a_student_has_no_choice_of(monkeypatch, student, tmp_path, flags, said):
    with pytest.raises(UserError, match=said.replace(".", "[.]")):
        call(monkeypatch, inference, tmp_path, "--checkpoint", student, *flags)


def test_another_student_is_drawn_at_the_weight_that_it_learned_most(student):
    """What was chosen for the bundled one says nothing of others."""
    parser = argparse.ArgumentParser()
    inference.add_arguments(parser)
    for told, weight in (({}, 3), ({"guidance_weight": 1.5}, 1.5)):
        net = inference.load_generator(student, "cpu", torch.float32)[0]
        save_model(student, net, Diffusion(), {"max_weight": 3.0, **told})
        config = inference.load_with_settings(parser.parse_args(["--checkpoint", str(student), "--device", "cpu"]))[2]
        assert config.guidance_weight == weight
    assert inference.load_with_settings(parser.parse_args(["--student", "--device", "cpu"]))[2].guidance_weight == 5


def test_a_flat_stage_does_not_end_what_another_follows(monkeypatch, tiny_checkpoint, tmp_path):
    monkeypatch.setattr(distill, "is_flat", lambda history, patience, since: any(row["step"] > since for row in history))
    for tuning, steps in ((0, 1), (0.5, 3)):  # two are supervised, then one ends the tuning
        folder = tmp_path / str(tuning)
        call(monkeypatch, distill, "--teacher", tiny_checkpoint, *SETTINGS, "--steps", 4, "--tuning", tuning, "--validate-every", 1, "--output", folder)
        assert torch.load(folder / "state.pt", weights_only=True)["step"] == steps


def test_a_students_image_does_not_depend_on_the_others(student):
    model, diffusion = load_generator(student, torch.device("cpu"), torch.float32)
    config, jobs = replace(inference.STUDENT, num_steps=2, guidance_weight=2.0), all_jobs(1)
    whole, single = ({job.name: image.astype(int) for job, image in generate(model, diffusion, jobs, config, n, shown=False)} for n in (20, 3))
    assert max(np.abs(whole[name] - single[name]).max() for name in whole) <= 1
