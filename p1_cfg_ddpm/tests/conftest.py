import os
import subprocess
import sys

import pytest
import torch

from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import ROOT
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
    def run(module, *arguments, launcher=(), wait=True, **environment):
        line = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
    return run
