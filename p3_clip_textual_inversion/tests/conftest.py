import json
import os
import subprocess
import sys

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from p3_clip_textual_inversion.files import ROOT
from p3_clip_textual_inversion.model import write_merges


@pytest.fixture
def command():
    """Runs `python -m MODULE ARGS...` as a user would; returns (exit code, stdout, stderr), or with wait=False the process."""
    def run(module, *arguments, launcher=(), wait=True, **environment):
        line = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
    return run


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of an untrained CLIP of the miniature's shape, but smaller."""
    folder, merges = tmp_path_factory.mktemp("clip"), 300
    write_merges(folder / "bpe.txt.gz", merges)
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
              "text_cfg": {"context_length": 24, "vocab_size": 512 + merges + 2, "width": 32, "heads": 2, "layers": 2}}
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    for parameter in clip.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)  # so that no norm or bias is trivial
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder
