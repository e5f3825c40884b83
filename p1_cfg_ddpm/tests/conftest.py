import importlib
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import ROOT, run
from p1_cfg_ddpm.model import SIZES, UNet, save_model


@pytest.fixture
def tiny_model():
    """An untrained tiny UNet whose zero-initialised layers are filled, so that every part of it matters."""
    torch.manual_seed(0)
    model = UNet(SIZES["tiny"])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return model.eval()


@pytest.fixture
def tiny_checkpoint(tiny_model, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_model(path, tiny_model, Diffusion())
    return path


@pytest.fixture
def command():
    """Runs `python -m MODULE ARGS...` as a user would; returns (exit code, stdout, stderr)."""
    def start(module, *arguments, launcher=(), wait=True, **environment):
        line = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
    return start


@pytest.fixture
def call(monkeypatch, capsys):
    """Like `command`, in this process, which has imported everything already. The package's name may be left out."""
    def run_here(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        AcceleratorState._reset_state(True)  # of a call before, perhaps with another number format
        code = 0
        try:
            run(importlib.import_module(module if "." in module else f"p1_cfg_ddpm.{module}").main)
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
