import pytest
import torch

from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.model import SIZES, UNet, save_model

pytest.register_assert_rewrite("p1_cfg_ddpm.tests.tools")
from .tools import call, command, one_thread  # noqa: E402, F401


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
