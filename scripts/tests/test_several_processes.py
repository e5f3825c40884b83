"""The trainings and drawings by two real processes, which torchrun starts or a cluster's variables name, against one."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import several_processes
import torch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STATES = {"P1 train": ("p1/state.pt", "model", 2e-6), "P2 train": ("p2/state.pt", "model", 2e-4), "P3 train": ("p3/0/state.pt", "trained", 1e-6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = several_processes.__file__
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        done = subprocess.run([sys.executable, *launcher, script, folder, name], check=False, env=ENVIRONMENT,
                              cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder


def of(folder, name, rank, command):
    return json.loads((folder / f"{name}_{rank}.json").read_text())[command]


@pytest.mark.parametrize("command", several_processes.commands(Path(), "one"))
def test_there_were_two(folder, command):
    for name, rank in (("one", 0), ("two", 0), ("two", 1)):
        assert of(folder, name, rank, command)["code"] == 0, of(folder, name, rank, command)["said"]
    assert "wrote" in of(folder, "two", 0, command)["said"] and "wrote" not in of(folder, "two", 1, command)["said"]  # the first speaks for both
    if "train" in command:
        assert "2 x cpu" in of(folder, "two", 0, command)["said"]


def numbers(folder):
    """The last row of a run's log."""
    with open(next(folder.rglob("log.csv")), newline="") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


@pytest.mark.parametrize("command", STATES)
def test_two_processes_train_as_one(folder, command):
    """Equal but for the order of sums, which Muon and AdamW, whose steps are as long for a small gradient as for a large one, make larger.

    The weights after six steps of 2e-3 differ, at most, by (Muon's iteration in bf16, as it is; in fp32, as here; in fp64; AdamW in its place)
        P1  9.6e-4  1.9e-7  1.9e-7  4.5e-7        P2  4.1e-4  3.8e-5  2.9e-5  8.0e-5
    so that bf16 is the reason: it turns a difference in a gradient's last digit into one of its own digits. (P1's file, in fp16, may differ by one of those,
    1e-3 at a weight of 1.) The rest of P2's is in the bias of an attention's keys, whose gradient is zero but for rounding, which AdamW makes a step of."""
    path, part, allowed = STATES[command]
    one, two = (torch.load(folder / name / path, weights_only=True)[part] for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < allowed
    one, two = (numbers(folder / name / command[:2].lower()) for name in ("one", "two"))
    for name in ("loss", "validation", "validation_0_249", "validation_750_999"):
        assert one[name] == pytest.approx(two[name], rel=3e-4), name


@pytest.mark.parametrize("problem", ["p1", "p2", "p3"])
def test_pictures_shared_by_two_processes_are_the_same_bytes(folder, problem):
    one, two = ({path.relative_to(folder / name): path.read_bytes() for path in sorted((folder / name / "drawn" / problem).rglob("*.png"))}
                for name in ("one", "two"))
    assert len(one) == {"p1": 20, "p2": 4, "p3": 5}[problem]
    assert one == two


DYING = """import os, signal
from p1_cfg_ddpm import train
from p1_cfg_ddpm.files import run
plain, steps = train.seed_dropout, []
def die(*arguments):
    steps.append(plain(*arguments))
    if os.environ["RANK"] == "1" and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train.seed_dropout = die
run(train.main)
"""


def test_a_process_that_dies_leaves_a_message_and_no_half_result(folder, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    _, train = several_processes.commands(folder, "dead")["P1 train"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "dying.py", *map(str, train)],
                          check=False, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
    message = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(message) == 1 and "another process has failed" in message[0] and "the same command goes on" in message[0], done.stderr
    assert not [path for path in (folder / "dead" / "p1").iterdir() if path.suffix in (".pt", ".safetensors", ".part")]


FAILING = """import os, sys
from p1_cfg_ddpm.device import meet, processes
from p1_cfg_ddpm.files import UserError, run
def draw():
    with processes() as share:
        if share[0] == int(sys.argv[1]):
            raise UserError("this one fails")
        meet(share)
        print("wrote all")
run(draw)
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_drawing_is_told_as_done_when_all_are(failing, tmp_path):
    """One that has failed is told at once, whichever it is, without a launcher that stops the others."""
    (tmp_path / "failing.py").write_text(FAILING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [subprocess.Popen([sys.executable, tmp_path / "failing.py", str(failing)], env=where | {"RANK": str(rank)}, cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [1, 1] and not any(out for out, _ in said)
    assert "this one fails" in said[failing][1] and "is done, but another has failed" in said[1 - failing][1]
