"""What the three problems share is the same file in each, byte for byte, since each folder stands alone."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion")
SHARED = ("guard.py", "files.py", "tensors.py", "pictures.py", "provenance.py", "device.py", "estimate.py", "samplers.py", "training.py", "state.py",
          "tests/tools.py")


@pytest.mark.parametrize("name", SHARED)
def test_the_common_ground_is_the_same_in_the_three_folders(name):
    first, *others = ((ROOT / package / name).read_bytes() for package in PACKAGES)
    assert all(other == first for other in others), f"{name} differs; change it in one folder and copy it to the other two"


def test_a_wrapper_is_a_prefix_of_nearly_all_names():
    """Of two tensors whose one is the model's, none is lost; a model and its count of updates lose the count."""
    tensors = importlib.import_module("p2_ddim.tensors")
    plain = {"model.a": torch.zeros(1), "b": torch.ones(1)}
    assert tensors.strip_wrappers(plain) == plain
    averaged = {f"module.{name}": torch.zeros(1) for name in "abc"} | {"n_averaged": torch.ones(1)}
    assert set(tensors.strip_wrappers(averaged)) == {"a", "b", "c"}
