"""The grader's calls, hw2_1.sh, hw2_2.sh and hw2_3.sh, and what they find: what a user has trained and installed."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from p1_cfg_ddpm import inference
from p3_clip_textual_inversion import embedding

SCRIPTS = Path(__file__).resolve().parent.parent
MINI = SCRIPTS.parent / "hw2_data" / "mini"


def shell(script, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", os.path.relpath(SCRIPTS / script, folder), *map(str, arguments)], check=False, cwd=folder, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_graders_three_calls(tmp_path):
    """From another folder, with relative and absolute paths, with spaces, and by a link, as a grader wants one at the top. (Few and quick pictures, by
    further flags.)"""
    here = tmp_path / "a folder"
    (here / "noise dir").mkdir(parents=True)
    shutil.copyfile(MINI / "face" / "noise" / "03.pt", here / "noise dir" / "03.pt")
    shutil.copyfile(MINI / "face" / "UNet.pt", here / "the UNet.pt")
    (here / "hw2_1.sh").symlink_to(SCRIPTS / "hw2_1.sh")
    out = shell(here / "hw2_1.sh", here, "out 1", "--images-per-digit=1", "--steps=1")
    assert "drawing with " in out and "weights" in out
    assert {path.name for path in (here / "out 1" / "svhn").iterdir()} == {f"{digit}_001.png" for digit in range(10)}
    assert "with the UNet.pt" in shell("hw2_2.sh", here, "noise dir", tmp_path / "out 2", "the UNet.pt", "--steps=1")
    assert [path.name for path in (tmp_path / "out 2").glob("[!.]*")] == ["03.png"]
    moved = shutil.copytree(MINI / "stable_diffusion", here / "some where")
    prompts = MINI / "textual_inversion" / "input.json"
    out = shell("hw2_3.sh", here, os.path.relpath(prompts, here), "out 3", moved.name, "--num-images=1", "--steps=1")
    assert "words: <new1>, <new2> of " in out and "p3_clip_textual_inversion/embeddings/miniature-" in out
    with Image.open(here / "out 3" / "1" / "0" / "source1_prompt0_0.png") as image:
        assert image.size == (64, 64)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Runs install.py with places of its own."""
    module = importlib.import_module("install")
    monkeypatch.setattr(inference, "INSTALLED", tmp_path / "weights" / "installed.safetensors")
    monkeypatch.setattr(embedding, "INSTALLED", tmp_path / "embeddings")
    (tmp_path / "weights").mkdir()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["install.py", *map(str, arguments)])
        module.main()
    return run


def test_a_trained_digit_model_is_installed(install, tmp_path, capsys):
    assert inference.default_checkpoint() == inference.CHECKPOINT
    install(inference.CHECKPOINT)
    assert inference.default_checkpoint() == tmp_path / "weights" / "installed.safetensors" and "installed " in capsys.readouterr().out
    inference.INSTALLED.write_bytes(b"an earlier one")
    install(inference.CHECKPOINT)
    assert (tmp_path / "weights" / "replaced" / "installed_0.safetensors").read_bytes() == b"an earlier one"
    assert inference.INSTALLED.read_bytes() == inference.CHECKPOINT.read_bytes()


def test_words_are_installed_by_their_model(install, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    embedding.save_embedding(tmp_path / "run" / "new1.safetensors", "<new1>", torch.ones(1, 192))
    with pytest.raises(SystemExit, match="does not tell which model <new1> was learned with; give that by --checkpoint"):
        install(tmp_path / "run")
    install(tmp_path / "run", "--checkpoint", MINI / "stable_diffusion")
    path, = (tmp_path / "embeddings").rglob("*.safetensors")
    assert path.parent.name.startswith("miniature-") and f"installed {path}" in capsys.readouterr().out
    torch.save({"<new2>": torch.ones(1, 192)}, tmp_path / "learned_embeds.bin")  # as diffusers' training wrote them
    install(tmp_path / "learned_embeds.bin", "--checkpoint", MINI / "stable_diffusion")
    assert "new2.safetensors" in capsys.readouterr().out and (path.parent / "new2.safetensors").is_file()
    (tmp_path / "run" / "0").mkdir()
    (tmp_path / "run" / "0" / "state.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="is one concept's training; give the folder above it, which has the words"):
        install(tmp_path / "run" / "0")
    runs = tmp_path / "runs"
    (runs / "p1").mkdir(parents=True)
    (runs / "p1" / "state.pt").write_bytes(b"")
    (runs / "classifier_svhn.safetensors").write_bytes(inference.CHECKPOINT.with_name("classifier_svhn.safetensors").read_bytes())
    with pytest.raises(SystemExit, match="is a training that has not ended"):  # no words are beside it
        install(runs / "p1")


def test_what_cannot_be_installed_ends_in_one_line(install, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    classifier = inference.CHECKPOINT.with_name("classifier_svhn.safetensors")
    for path, said in ((tmp_path / "no", "no such file"), (tmp_path / "x.safetensors", "safetensors"), (classifier, "is not a checkpoint"),
                       (tmp_path / "weights", "has no words")):
        with pytest.raises(SystemExit, match=f"error: .*{said}") as error:
            install(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["p1_cfg_ddpm.inference", "p2_ddim.inference", "p3_clip_textual_inversion.inference"])
def test_an_empty_argument_is_no_folder(module, tmp_path):
    """A variable of the shell that was never set: as a folder it was the one that one stands in. An empty prompt is one."""
    def said(*arguments):
        done = subprocess.run([sys.executable, SCRIPTS / "run.py", module, *arguments], check=False, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stderr

    for arguments, what in ((["", "--device", "cpu"], "an argument"), (["out", "--device", ""], "the value of --device")):
        code, text = said(*arguments)
        assert code == 1 and text.startswith(f"error: {what} is empty") and len(text.splitlines()) == 1
    assert said("--help", "--negative-prompt", "")[0] == 0
    assert not list(tmp_path.iterdir())
