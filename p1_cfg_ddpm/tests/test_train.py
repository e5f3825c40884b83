"""Training through the real command: killed runs, bad settings."""

import csv
import signal
import time

import pytest
import torch
from PIL import Image

from p1_cfg_ddpm.data import MINI_DATA
from p1_cfg_ddpm.model import load_model
from p1_cfg_ddpm.training import make_optimizer

TRAIN = "p1_cfg_ddpm.train"
SETTINGS = ["--size", "tiny", "--data", MINI_DATA, "--batch-size", 8, "--save-every", 5, "--sample-every", 0, "--dtype", "fp32", "--device", "cpu"]


def numbers_of(folder):
    """The rows of a run's log.csv, without what depends on the machine."""
    with open(folder / "log.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value and name not in ("seconds", "items_per_second", "peak_memory_gb")}
                for row in csv.DictReader(file)]


def test_a_killed_run_ends_with_the_same_weights(command, one_thread, tmp_path):
    settings = [*SETTINGS, "--steps", 40]
    code, out, err = command(TRAIN, *settings, "--output", tmp_path / "whole")  # apart: what other tests did to this process may change a last bit
    assert code == 0, err
    assert "next: bash scripts/p1_infer.sh" in out
    process = command(TRAIN, *settings, "--output", tmp_path / "killed", wait=False)
    while not (tmp_path / "killed" / "state.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] < 40
    code, out, err = command(TRAIN, *settings, "--output", tmp_path / "killed")
    assert code == 0 and "going on at step" in out, err
    whole, resumed = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "killed"))
    for whole_part, resumed_part in ((whole["model"], resumed["model"]), (whole["ema"][0], resumed["ema"][0])):
        assert all(torch.equal(whole_part[name], resumed_part[name]) for name in whole_part)
    assert numbers_of(tmp_path / "whole") == numbers_of(tmp_path / "killed")


def test_a_run_that_has_ended_stays_as_it_is_and_is_made_whole(call, tmp_path):
    """Stopped by itself, as nothing gets better at a rate of 0, and killed between its last state and its model."""
    settings = [*SETTINGS, "--output", tmp_path, "--steps", 9, "--lr", 0, "--validate-every", 1, "--stop-when-flat", 1]
    assert call(TRAIN, *settings)[0] == 0
    before, model = (tmp_path / "state.pt").read_bytes(), (tmp_path / "model.safetensors").read_bytes()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    (tmp_path / "model.safetensors").unlink()
    code, out, err = call(TRAIN, *settings)
    assert code == 0 and "after 2 steps" in out, err
    assert (tmp_path / "state.pt").read_bytes() == before and (tmp_path / "model.safetensors").read_bytes() == model


def test_minutes_count_on_and_never_go_below_a_rate_of_zero(call, monkeypatch, tmp_path):
    """By a clock that goes on by a second whenever it is asked: a run that has ended is not trained again, nor is what has learned nothing written."""
    seconds = iter(range(10**6))
    monkeypatch.setattr("p1_cfg_ddpm.train.time.perf_counter", lambda: next(seconds))
    settings = [*SETTINGS, "--output", tmp_path / "run", "--minutes", 1, "--validate-every", 0, "--decay", 1]
    code, out, err = call(TRAIN, *settings)
    assert code == 0 and "next: " in out, err
    before, state = (tmp_path / "run" / "model.safetensors").read_bytes(), torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert 60 <= state["seconds"] < 70 and 5 < state["step"] < 60 and all(row["lr"] >= 0 for row in state["history"])
    code, out, err = call(TRAIN, *settings)
    assert code == 0 and f"after {state['step']} steps" in out and (tmp_path / "run" / "model.safetensors").read_bytes() == before, err
    code, out, err = call(TRAIN, *settings, "--minutes", 0.5)
    assert code == 1 and err.startswith("error: --minutes 0.5 are over: the training in ") and " so far; give it more" in err
    code, out, err = call(TRAIN, *settings, "--minutes", 2)
    assert code == 0 and torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] > state["step"], err
    code, out, err = call(TRAIN, *SETTINGS, "--output", tmp_path / "none", "--minutes", 0.001)
    assert code == 1 and err.startswith("error: --minutes 0.001 were over before the first step") and not (tmp_path / "none" / "model.safetensors").exists()


def test_a_run_is_known_by_the_weights_that_it_began_with_and_not_by_their_path(call, tiny_checkpoint, tmp_path):
    begun = tmp_path / "begun.safetensors"
    begun.write_bytes(tiny_checkpoint.read_bytes())
    settings = [*SETTINGS, "--output", tmp_path / "run", "--steps"]
    assert call(TRAIN, *settings, 1, "--init", begun)[0] == 0
    moved = begun.rename(tmp_path / "moved.safetensors")
    assert call(TRAIN, *settings, 2, "--init", moved)[0] == 0
    code, _, err = call(TRAIN, *settings, 3)
    assert code == 1 and "other settings (begun_from " in err and "is now None" in err


def test_weights_of_another_diffusion_are_no_beginning(call, tiny_checkpoint, tmp_path):
    code, _, err = call(TRAIN, *SETTINGS, "--output", tmp_path / "run", "--init", tiny_checkpoint, "--prediction", "eps", "--steps", 1)
    assert code == 1 and "was trained for another diffusion" in err and err.count("\n") == 1


def test_training_learns_and_samples_on_the_way(call, tmp_path):
    settings = ["--size", "tiny", "--data", MINI_DATA, "--batch-size", 32, "--steps", 150, "--sample-every", 150, "--warmup", 20, "--lr", "3e-3"]
    code, _, err = call(TRAIN, *settings, "--output", tmp_path / "run")
    assert code == 0, err
    history = numbers_of(tmp_path / "run")
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]  # the first row is a mean over the first 50 steps
    assert Image.open(tmp_path / "run" / "samples_000150.png").size == (840, 168)
    model, metadata = load_model(tmp_path / "run" / "model.safetensors")
    assert metadata["training"]["steps"] == 150 and metadata["training"]["images"] == 400
    assert model.config.widths == (16, 32)


def test_every_parameter_moves(tiny_model):
    """Also the kernels, which Muon sees as matrices that share their memory."""
    model = tiny_model.to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.1, 0.0, (0.9, 0.99), edges=("stem", "head"))
    digit, domain = torch.arange(11), torch.arange(11) % 3
    x = torch.randn(11, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as fp16 on a GPU has it
    scaler.scale(model(x, torch.arange(11) * 90, digit, domain).square().sum()).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.isfinite() and torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(1, rel=1e-3)
    scaler.step(optimizer)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    kernel = model.middle[0].residual.conv1.weight
    step = (before["middle.0.residual.conv1.weight"] - kernel.detach()).permute(0, 2, 3, 1).flatten(1)
    values = torch.linalg.svdvals(step)  # Muon's step is the gradient with its singular values made (about) equal
    assert values.max() / values.min() < 2


@pytest.mark.parametrize("flags, message", [
    (["--data", "/nonexistent"], "cannot read /nonexistent/mnistm/train.csv"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--drop-condition", "2"], "--drop-condition must be between 0 and 1"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--log-sigma", "20", "0.1"], "--log-sigma 20 0.1 lies outside of the schedule's noise levels"),
    (["--stop-when-flat", "1", "--validate-every", "0"], "--stop-when-flat goes by validations; give it a --validate-every above 0"),
    (["--output", "/dev/null/run"], "/dev/null/run"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(call, tmp_path, flags, message):
    code, _, err = call(TRAIN, *SETTINGS, "--output", tmp_path, *flags)
    assert code != 0 and "Traceback" not in err
    assert err.strip().count("\n") == 0 and err.startswith("error: ") and message in err


def test_other_settings_are_not_resumed(call, tmp_path):
    settings = [*SETTINGS, "--output", tmp_path, "--steps", 1]
    assert call(TRAIN, *settings)[0] == 0
    code, _, err = call(TRAIN, *settings, "--lr", "0.5")
    assert code != 0 and "other settings (lr 0.002 is now 0.5)" in err and "Traceback" not in err
    (tmp_path / "state.pt").write_bytes(b"half a file")
    code, _, err = call(TRAIN, *settings)
    assert code != 0 and "state.pt cannot be read" in err and "Traceback" not in err
