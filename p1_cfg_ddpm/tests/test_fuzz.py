"""Whatever is in a file that people download or write: it is read, or refused in one line; no other error, no code run."""

import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from p1_cfg_ddpm.classifier import CourseClassifier, load_classifier
from p1_cfg_ddpm.data import read_csv, read_image
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.model import load_model

from .tools import Bomb, answer, damaged, quick


@pytest.mark.parametrize("reader, suffix", [(load_classifier, ".pth"), (load_classifier, ".safetensors"), (load_model, ".safetensors")])
@quick
@given(data=st.data())
def test_checkpoints(reader, suffix, tmp_path, tiny_checkpoint, data):
    if suffix == ".pth":
        file = io.BytesIO()
        torch.save({"state_dict": CourseClassifier().state_dict(), "optimizer": {}}, file)
        valid = file.getvalue()
    else:
        valid = tiny_checkpoint.read_bytes()
    answer(reader, tmp_path / f"damaged{suffix}", data.draw(damaged(valid)))


@quick
@given(data=st.data())
def test_csv(tmp_path, data):
    valid = b"image_name,label\n0.png,3\n1.png,9\n"
    result = answer(read_csv, tmp_path / "a.csv", data.draw(damaged(valid) | st.text(max_size=60).map(lambda text: b"image_name,label\n" + text.encode())))
    assert result is None or (len(result[0]) == len(result[1]) > 0 and set(result[1]) <= set(range(10)))


@quick
@given(data=st.data())
def test_pictures(tmp_path, data):
    file = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(file, "PNG")
    result = answer(read_image, tmp_path / "a.png", data.draw(damaged(file.getvalue())))
    assert result is None or result.shape == (28, 28, 3)


def test_a_pickle_runs_no_code(tmp_path):
    for write in (lambda path, what: path.write_bytes(pickle.dumps(what)), lambda path, what: torch.save(what, path)):
        write(tmp_path / "bomb.pth", {"state_dict": Bomb(tmp_path / "exploded"), "optimizer": {}})
        with pytest.raises(UserError):
            load_classifier(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
