"""What the tests of each folder need: commands called, crowded and killed, and files damaged. The same file in the three folders."""

import importlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from ..files import ROOT, UserError, run

PACKAGE = __package__.partition(".")[0]

# --- commands ---


def line_of(module, *arguments, launcher=()):
    """`python -m MODULE ARGUMENTS...`; the package's name may be left out."""
    return [sys.executable, *launcher, "-m", full_name(module), *map(str, arguments)]


def full_name(module):
    return module if "." in module else f"{PACKAGE}.{module}"


@pytest.fixture
def command():
    """Runs `python -m MODULE ARGUMENTS...` as a user would; returns (exit code, stdout, stderr), or with wait=False the process."""
    def start(module, *arguments, launcher=(), wait=True, **environment):
        process = subprocess.Popen(line_of(module, *arguments, launcher=launcher), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
    return start


@pytest.fixture
def call(monkeypatch, capsys):
    """Like `command`, in this process, which has imported everything already."""
    def run_here(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        AcceleratorState._reset_state(True)  # of a call before, perhaps with another number format
        code = 0
        try:
            run(importlib.import_module(full_name(module)).main)
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
        out, err = capsys.readouterr()
        return code, out, err
    return run_here


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in the processes that are started: then all of them compute the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


# --- commands that are crowded and killed ---

# Runs a module, but one of its pictures is half written when the process is killed, as by kill -9.
KILLED = """
import io, os, runpy, signal, sys
from PIL import Image
save, count, last = Image.Image.save, 0, int(sys.argv[1])
def half(self, path, **options):
    global count
    count += 1
    if count < last:
        return save(self, path, **options)
    save(self, whole := io.BytesIO(), "PNG")
    with open(path, "wb") as file:
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = half
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def pictures(folder):
    """{name: pixels} of every finished picture."""
    return {path.relative_to(folder): np.asarray(Image.open(path)) for path in folder.rglob("*.png") if not path.name.startswith(".")}


def check_crowded_and_killed(arguments, folder, call, command, count, killed_at):
    """Of two drawings at once in one folder, no home, one says who has it, and all `count` pictures are there; one that is killed in the middle of writing a
    picture, the killed_at-th, leaves those before it; all as one alone draws them. arguments(output): of `inference`. Returns (that one's folder, the
    killed one's), for what more there is to see."""
    out, killed, alone = folder / "märz 数字 'out'", folder / "killed", folder / "one"
    line = [sys.executable, "-c", KILLED, killed_at, f"{PACKAGE}.inference", *arguments(killed)]
    victim = subprocess.Popen(list(map(str, line)), cwd=ROOT, stderr=subprocess.DEVNULL)
    both = [command("inference", *arguments(out), "--overwrite", wait=False, HOME="/dev/null", XDG_CACHE_HOME="/dev/null") for _ in range(2)]
    code, _, err = call("inference", *arguments(alone))
    assert code == 0, err
    ends = sorted((process.communicate()[1].strip().splitlines()[-1:], process.returncode) for process in both)
    assert 0 in [code for _, code in ends] and all(code == 0 or "is in use by " in said[0] for said, code in ends), ends
    assert victim.wait() == -signal.SIGKILL
    assert len(pictures(alone)) == count and len(list(out.rglob("[!.]*.*"))) == count
    check_same(out, alone, count)
    check_same(killed, alone, killed_at - 1)
    return alone, killed


def check_same(folder, other, count):
    """`count` pictures, each as it is in the other folder."""
    found, expected = pictures(folder), pictures(other)
    assert len(found) == count and all((found[name] == expected[name]).all() for name in found), (sorted(found), count)


# --- damaged files ---

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


class Bomb:
    """A pickle of it, loaded as pickles are, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@st.composite
def damaged(draw, content):
    """A valid file's bytes, cut short, with a few of them changed, or any bytes at all."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    changed = bytearray(content[:draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
    for position, value in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)):
        if changed:
            changed[position % len(changed)] = value
    return bytes(changed)


def answer(read, path, content):
    """Writes `content` to `path` and reads it: fine, or a `UserError` of one line; everything else fails the test."""
    path.write_bytes(content)
    try:
        return read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 10, error
        return None
