"""The time of a drawing, told before it begins."""

import time

import pytest
import torch

from p3_clip_textual_inversion import estimate
from p3_clip_textual_inversion.defaults import SD_V1

CPU = torch.device("cpu")


def test_work_is_counted_and_timed():
    layer, x, calls = torch.nn.Linear(10, 20), torch.ones(3, 10), []

    def work():
        calls.append(torch.is_inference_mode_enabled())
        time.sleep(0.01)
        return layer(x)

    seconds, flop = estimate.measure(work, CPU)
    assert flop == 2 * 3 * 10 * 20 and 0.01 <= seconds < 1 and calls == [True, True]


@pytest.mark.parametrize("per_step, said", [
    (0.1, "about 2:55 minutes in all\n"), (0.3, "about 7:55 minutes in all, more than the 5:00 that the course gives a graded script; --steps 8 would fit\n"),
    (20, "the course gives a graded script\n")])
def test_what_takes_more_than_the_courses_limit_is_told(monkeypatch, capsys, per_step, said):
    """1,500 steps, then 25 decodings of a second: 0.9 of 300 seconds less 25, for eight of fifteen steps."""
    answers = iter([(per_step, 1.6e12), (1.0, 2.5e12)])
    monkeypatch.setattr(estimate, "measure", lambda *_: next(answers))
    estimate.announce([(1500, None), (25, None)], torch.nn.Linear(10, 10), CPU, time.perf_counter(), steps=15)
    out = capsys.readouterr().out
    assert out.startswith("1,500 calls of the network, 2,462 TFLOP, 4.4e-07 GB of weights: about ") and out.endswith(said)


def test_no_estimate_of_what_is_short_or_does_not_fit(monkeypatch, capsys):
    estimate.announce([(9, pytest.fail)], None, CPU, 0)
    assert not capsys.readouterr().out

    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory")

    estimate.announce([(10, too_much)], None, CPU, 0)
    assert "does not fit into memory" in capsys.readouterr().out


def test_the_real_models_default_fits():
    """A hundred pictures: 1.61 TFLOP a guided step and 2.51 a decoding (counted on sd_v1/'s configurations), at the 12 TFLOP/s that an RTX 2080 Ti sustains in
    half precision on this network (about 8 guided steps a second), with a minute for everything else."""
    assert 100 * (SD_V1.drawing.steps * 1.61 + 2.51) / 12 + 60 < estimate.LIMIT
