"""Every entry point of the three problems, two steps each, on a GPU: a real one where there is one, otherwise the simulated one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_commands
import pytest
import simulated_gpu
import torch

from p1_cfg_ddpm.inference import WEIGHT_OF_TRIES

CARDS = ("ampere", "turing")  # with native bf16, and without
NAMES = list(gpu_commands.commands(Path()))
PACKAGES = ("p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion")
TRAININGS = ("p1", "student", "p2", "words/0", "custom/0+1", "lora/0", "vae", "clip", "second", "unet")  # their folders


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="session")
def results(folder):
    """{card: {name: {"code", "said", "waits"}}}; one process a card, side by side."""
    if not torch.cuda.is_available() and simulated_gpu.compiled() is None:
        pytest.skip("no GPU, and no C++ compiler to simulate one")
    command = [sys.executable, gpu_commands.__file__]
    running = {card: subprocess.Popen([*command, folder / card, card], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True) for card in CARDS}
    try:
        said = {card: process.communicate(timeout=1200)[0] for card, process in running.items()}
    finally:  # what takes too long would go on beside the other tests
        for process in running.values():
            process.kill()
    assert all(process.returncode == 0 for process in running.values()), said
    return {card: json.loads((folder / card / "results.json").read_text())["commands"] for card in CARDS}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("card", CARDS)
def test_every_command_runs_on_a_gpu(results, card, name):
    if not gpu_commands.left_out(name, card):
        assert results[card][name]["code"] == 0, results[card][name]["said"]
        assert not re.search(r"\bcpu\b", results[card][name]["said"]), results[card][name]["said"]


@pytest.mark.parametrize("card", CARDS)
def test_digits_that_are_doubted_are_drawn_again_on_a_gpu(results, card):
    """Unasked, as each drawing says at its end, and with less guidance; not by a student."""
    assert all(text in results[card]["P1 inference"]["said"] for text in ("tries 4", f"guidance_weight {WEIGHT_OF_TRIES}"))
    assert "tries" not in results[card]["P1 inference, student"]["said"]


def test_no_entry_point_is_forgotten():
    """Every module that can be run, but for the tests', is tried on the simulated GPU, or is told with the reason why not."""
    files = [path for package in PACKAGES for path in (gpu_commands.ROOT / package).rglob("*.py") if not {"tests", "guard.py"} & set(path.parts)]
    found = {".".join(path.relative_to(gpu_commands.ROOT).with_suffix("").parts) for path in files if "__main__" in path.read_text(encoding="utf-8")}
    tried = {module for module, _ in gpu_commands.commands(Path()).values()}
    assert found == tried | gpu_commands.ELSEWHERE.keys() and not tried & gpu_commands.ELSEWHERE.keys()


@pytest.mark.parametrize("run", TRAININGS)
def test_a_training_in_fp16_scales_its_loss(results, folder, run):
    """Gradients of fp16 vanish otherwise. The scale, which each step changes or counts, is in the state, for a run that goes on; in bf16 there is none."""
    scalers = {card: torch.load(folder / card / "out" / run / "state.pt", weights_only=True)["scaler"] for card in CARDS}
    assert scalers["ampere"] is None and (scalers["turing"]["scale"] < 65536 or scalers["turing"]["_growth_tracker"] > 0)


@pytest.mark.parametrize("card, allowed", [("ampere", 0), ("turing", 1)])  # fp16's scaler has to know whether a gradient overflowed
@pytest.mark.parametrize("training", ["P1 train", "P2 train", "P3 train"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="waits are counted on the simulated GPU")
def test_no_training_step_waits_for_the_gpu(results, card, allowed, training):
    """Six steps against two: nothing is read from the GPU, and nothing copied that it would have to be waited for, but where a line is logged."""
    two, six = (results[card][f"{training}, {number}"]["waits"] for number in ("two", "six"))
    more = {place: six[place] - two.get(place, 0) for place in six if six[place] > two.get(place, 0)}
    assert sum(more.values()) <= 4 * allowed, more
