"""A path that the system refuses to look at (a name of more than 255 bytes), in each place of each command: one line, not Path.is_file()'s traceback."""

import importlib
import json
import sys

import pytest
import torch
from PIL import Image

P1, P2, P3 = "p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion"
LONG = "n" * 300
CALLS = [
    (P1, "inference", "{long}"), (P1, "inference", "{t}/out --checkpoint={long}"), (P1, "evaluate", "{long}"), (P1, "evaluate", "{t} --data={long}"),
    (P1, "train", "--data={long} --output={t}/out"), (P1, "train", "--output={long}"), (P1, "figures", "--output={long}"), (P1, "redraw", "{long}"),
    (P1, "benchmark", "--output={long}"), (P1, "classifier", "--domain=svhn --data={long} --output={t}/out"),
    (P2, "inference", "{long} {t}/out {t}/UNet.pt"), (P2, "inference", "{t} {long} {t}/UNet.pt"), (P2, "inference", "{t} {t}/out {long}"),
    (P2, "evaluate", "{long} {t}"), (P2, "evaluate", "{t} {long}"), (P2, "train", "--data={long} --output={t}/out"), (P2, "figures", "--noise={long}"),
    (P2, "figures", "--output={long}"), (P2, "redraw", "{long}"), (P2, "benchmark", "--output={long}"), (P2, "sweep", "--output={long}"),
    (P3, "inference", "{long} {t}/out"), (P3, "inference", "{t}/a.json {long}"), (P3, "inference", "{t}/a.json {t}/out {long}"),
    (P3, "inference", "{t}/a.json {t}/out --embeddings={long}"), (P3, "inference", "{t}/a.json {t}/out --projections={long}"),
    (P3, "evaluate", "{long} {t}/a.json"), (P3, "evaluate", "{t} {long}"), (P3, "evaluate", "{t} {t}/a.json --model={long}"),
    (P3, "zero_shot", "--data={long}"), (P3, "zero_shot", "--model={long}"), (P3, "zero_shot", "--output={long}"), (P3, "zero_shot", "--templates={long}"),
    (P3, "train", "{long}"), (P3, "train", "--checkpoint={long}"), (P3, "train", "--output={long}"), (P3, "figures", "--runs={long}"),
    (P3, "experiments.compare", "--learned={long}"), (P3, "redraw", "{long}"), (P3, "experiments.several", "{long} --runs={t}/out"),
    (P3, "experiments.fullsize", "{long}"),
]


@pytest.mark.parametrize("package, module, arguments", CALLS, ids=[" ".join(call) for call in CALLS])
def test_a_name_too_long_is_one_line(tmp_path, monkeypatch, capsys, package, module, arguments):
    (tmp_path / "a.json").write_text('{"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1>"]}}')
    monkeypatch.setattr(sys, "argv", [module, *(part.format(t=tmp_path, long=tmp_path / LONG) for part in arguments.split())])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"{package}.files").run(importlib.import_module(f"{package}.{module}").main)
    said = str(stopped.value.code)
    assert said.startswith("error: ") and "\n" not in said and len(said) < 1200, said + capsys.readouterr().err


def test_a_result_whose_name_would_be_too_long_is_said_before_any_work(tmp_path, monkeypatch):
    """A token's file has an ending more than the token, a picture's one letter more than its noise's."""
    torch.save(torch.zeros(3, 8, 8), tmp_path / f"{'n' * 252}.pt")
    (tmp_path / "0").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "0" / "a.png")
    token = f"<{'n' * 250}>"
    (tmp_path / "a.json").write_text(json.dumps({"0": {"src_image": "dog", "token_name": token, "prompt": [token]}}))
    calls = ((P2, "inference", [tmp_path, tmp_path / "out", tmp_path / "UNet.pt"]), (P3, "train", [tmp_path / "a.json", "--output", tmp_path / "out"]))
    for package, module, arguments in calls:
        command = importlib.import_module(f"{package}.{module}")
        for long_work in ("load_unet", "load_stable_diffusion", "prepare"):
            monkeypatch.setattr(command, long_work, lambda *_: pytest.fail("long work started"), raising=False)
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"error: cannot write the file .*: File name too long"):
            importlib.import_module(f"{package}.files").run(command.main)
