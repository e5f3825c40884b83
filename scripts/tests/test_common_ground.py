"""What the three problems share is the same file in each, byte for byte, since each folder stands alone."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion")
SHARED = ("guard.py", "files.py", "tensors.py", "pictures.py", "provenance.py", "device.py", "estimate.py", "samplers.py", "training.py")


@pytest.mark.parametrize("name", SHARED)
def test_the_common_ground_is_the_same_in_the_three_folders(name):
    first, *others = ((ROOT / package / name).read_bytes() for package in PACKAGES)
    assert all(other == first for other in others), f"{name} differs; change it in one folder and copy it to the other two"
