"""Captions beside pictures, schedules that are not obeyed, folders in half precision, runs that would overwrite another's result."""

import hashlib
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from p3_clip_textual_inversion import training
from p3_clip_textual_inversion.data import read_captions
from p3_clip_textual_inversion.files import LOCK, UserError
from p3_clip_textual_inversion.model import check_schedule, variant
from p3_clip_textual_inversion.state import data_fingerprint, held, load_state, refuse_others
from p3_clip_textual_inversion.tensors import save_tensors

NAMES, TEXTS = ["00.jpg", "01.png"], ["a <new1>", "two <new1>"]


@pytest.mark.parametrize("kind", ["texts", "csv", "jsonl"])
def test_captions_in_every_form_with_a_byte_order_mark(tmp_path, kind):
    rows = list(zip(NAMES, TEXTS))
    if kind == "texts":
        for name, text in rows:
            (tmp_path / f"{name[:2]}.txt").write_text(text + "\n", encoding="utf-8-sig")
    elif kind == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows), encoding="utf-8-sig")
    else:
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows), encoding="utf-8-sig")
    assert read_captions(tmp_path, NAMES, "<new1>") == TEXTS
    if kind == "texts":
        (tmp_path / "01.txt").unlink()
        with pytest.raises(UserError, match=r"01\.txt has no caption of 01\.png"):
            read_captions(tmp_path, NAMES, "<new1>")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_pipe_in_the_captions_place_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="it is a named pipe, expected a file"):
        read_captions(tmp_path, NAMES, "<new1>")


def test_a_schedule_that_is_not_obeyed(capsys):
    for name, value in (("trained_betas", [0.1]), ("rescale_betas_zero_snr", True), ("thresholding", True)):
        with pytest.raises(UserError, match=name):
            check_schedule({name: value}, "m")
    check_schedule({"timestep_spacing": "trailing"}, "m")
    assert "timestep_spacing trailing" in capsys.readouterr().err
    check_schedule({"trained_betas": None, "rescale_betas_zero_snr": False, "timestep_spacing": "leading", "set_alpha_to_one": False}, "m")
    assert capsys.readouterr().err == ""


def test_a_part_in_half_precision_only(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert variant(tmp_path, "unet") == {"variant": "fp16"} and variant(tmp_path, "vae") == {}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    assert variant(tmp_path, "unet") == {}


def test_another_runs_result_and_state_are_kept(tmp_path):
    result, state, main = tmp_path / "new1.safetensors", tmp_path / "state.pt", SimpleNamespace(is_main_process=True)
    refuse_others(state, [result])
    result.touch()
    with pytest.raises(UserError, match="without its run's state"):
        refuse_others(state, [result])
    content = {"settings": {"lr": 1, "pictures": "a"}, "step": 5, "history": [], "recent": []}
    torch.save(content, state)
    refuse_others(state, [result])
    assert load_state(state, {"lr": 1, "pictures": "a", "new_flag": 3}, steps=5)["step"] == 5
    assert load_state(state, {"lr": 1, "new_flag": 3, "other": 4}, defaults={"lr": 2, "new_flag": 3, "other": None})["step"] == 5
    with pytest.raises(UserError, match="new_flag 2 is now 3"):
        load_state(state, {"lr": 1, "new_flag": 3}, defaults={"new_flag": 2})
    with pytest.raises(UserError, match="pictures a is now b"):
        load_state(state, {"lr": 1, "pictures": "b"})
    with pytest.raises(UserError, match="at step 5 already, beyond --steps 4"):
        load_state(state, {"lr": 1}, steps=4)
    with held(main, tmp_path), pytest.raises(UserError, match="is in use by process"), held(main, tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()
    assert data_fingerprint(torch.ones(2, 3).numpy()) != data_fingerprint(torch.ones(3, 2).numpy())
    pictures = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4).numpy()
    assert data_fingerprint(pictures, pictures[:, ::2]) == hashlib.sha256(
        b"(2, 3, 4)" + pictures.tobytes() + b"(2, 2, 4)" + pictures[:, ::2].tobytes()).hexdigest()[:16]  # by which older states know theirs


def test_a_model_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("change, said", [({}, None), ({"step": 8}, "process 1 has the step 8, but process 0 4"),
                                          ({"number format": "bf16"}, "process 1 has the number format bf16, but process 0 no"),
                                          ({"settings": {"lr": 2}}, "process 1 has the settings {'lr': 2}, but process 0 {'lr': 1}")])
def test_processes_that_would_not_do_the_same_are_told(monkeypatch, change, said):
    monkeypatch.setattr(training, "gather_object", lambda facts: [*facts, facts[0] | change])
    two = SimpleNamespace(num_processes=2, mixed_precision="no", device=torch.device("cpu"))
    with nullcontext() if said is None else pytest.raises(UserError) as error:
        training.agree(two, step=4, settings={"lr": 1})
    assert said is None or str(error.value).startswith(f"{said}: all need the same --output")


@pytest.mark.parametrize("change", [{"step": "3"}, {"step": -1}, {"step": True}, {"step": 3.0}, {"history": None}, {"history": [3]}, {"history": [[1, 2]]},
                                    {"history": [{"loss": "x"}]}])
def test_a_state_of_the_right_settings_and_wrong_contents(tmp_path, change):
    """What a training could not go on from is refused, not found out by a traceback or taken for a number."""
    content = {"settings": {"lr": 1}, "step": 5, "history": [{"step": 5, "loss": 0.5}], "recent": []}
    torch.save(content, tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt", {"lr": 1})["step"] == 5
    torch.save(content | change, tmp_path / "state.pt")
    with pytest.raises(UserError, match="is damaged: it has no usable step and history"):
        load_state(tmp_path / "state.pt", {"lr": 1})
