"""Trains and draws with each problem on the CPU: alone, or as one of several processes.

    python scripts/tests/several_processes.py FOLDER one
    torchrun --nproc_per_node 2 scripts/tests/several_processes.py FOLDER two      # draws with what "one" has trained

All in one process (a rank), since importing takes longer than these trainings."""

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import gpu_commands
import torch


def commands(folder, name):
    """{name: (module, arguments)}"""
    out, one, concepts = folder / name, folder / "one", folder / "concepts" / "input.json"
    train = ["--device", "cpu", "--dtype", "fp32", "--steps", 6, "--sample-every", 0, "--validate-every", 6]
    draw = ["--device", "cpu", "--dtype", "fp32", "--steps", 2]
    words = [concepts, "--checkpoint", folder / "sd", "--concepts", 0, "--vectors", 2, "--crops", 1, "--batch-size", 16]
    return {
        "P1 train": ("p1_cfg_ddpm.train", [*train, "--size", "tiny", "--data", folder / "digits", "--batch-size", 8, "--warmup", 1, "--output", out / "p1"]),
        "P2 train": ("p2_ddim.train", [*train, "--image-size", 16, "--widths", 32, 32, "--attention", 1, "--batch-size", 8, "--warmup", 1, "--dropout", 0,
                                       "--data", folder / "faces", "--output", out / "p2"]),
        "P3 train": ("p3_clip_textual_inversion.train", [*train, *words, "--output", out / "p3"]),
        "P1 draw": ("p1_cfg_ddpm.inference", [out / "drawn" / "p1", *draw, "--checkpoint", one / "p1/model.safetensors", "--images-per-digit", 1,
                                              "--batch-size", 6]),
        "P2 draw": ("p2_ddim.inference", [folder / "noise", out / "drawn" / "p2", one / "p2/UNet.pt", *draw, "--batch-size", 1]),
        "P3 draw": ("p3_clip_textual_inversion.inference", [folder / "one.json", out / "drawn" / "p3", folder / "sd", *draw, "--embeddings", one / "p3",
                                                            "--num-images", 5, "--batch-size", 2]),
    }


def main():
    folder, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    os.chdir(gpu_commands.ROOT)
    sys.path.insert(0, str(gpu_commands.ROOT))
    torch.set_num_threads(1)
    if name == "one":
        gpu_commands.make_inputs(folder)
        content = json.loads((folder / "concepts" / "input.json").read_text())
        (folder / "one.json").write_text(json.dumps({"0": content["0"]}))
    for package in ("p1_cfg_ddpm", "p2_ddim"):  # what bf16 does to Muon's steps, test_several_processes.py says
        module = importlib.import_module(f"{package}.training")
        module.orthogonalised = functools.partial(module.orthogonalised, dtype=torch.float32)
    results, begin = {}, torch.distributed.init_process_group
    with mock.patch("torch.distributed.destroy_process_group"), \
         mock.patch("torch.distributed.init_process_group", lambda *a, **b: None if torch.distributed.is_initialized() else begin(*a, **b)):
        for command, (module, arguments) in commands(folder, name).items():  # one group for all of them
            results[command] = gpu_commands.call(module, arguments)
    (folder / f"{name}_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
