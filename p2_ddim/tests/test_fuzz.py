"""Whatever is in a file that people download: it is read, or refused in one line; no other error, no code run."""

import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2_ddim.data import read_noise
from p2_ddim.files import UserError
from p2_ddim.model import UNet, UNetConfig, load_unet

from .tools import Bomb, answer, damaged, quick


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


NOISE = saved(torch.randn(1, 3, 8, 8))
STATE = UNet(UNetConfig((32,), (), 1)).state_dict()


@quick
@given(data=st.data())
def test_noises(tmp_path, data):
    result = answer(read_noise, tmp_path / "a.pt", data.draw(damaged(NOISE)))
    assert result is None or (result.dtype == torch.float32 and result.ndim == 3 and len(result) == 3)


@quick
@given(shape=st.lists(st.integers(0, 4), max_size=5), dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]))
def test_noises_of_any_shape(tmp_path, shape, dtype):
    result = answer(read_noise, tmp_path / "a.pt", saved(torch.zeros(shape, dtype=dtype)))
    assert (result is not None) == (dtype.is_floating_point and shape[:-2] in ([1, 3], [3]))


@quick
@given(data=st.data())
def test_checkpoints(tmp_path, data):
    answer(load_unet, tmp_path / "UNet.pt", data.draw(damaged(saved({name: STATE[name] for name in list(STATE)[:4]}))))


@settings(quick, max_examples=12)
@given(data=st.data())
def test_state_dicts(tmp_path, data):
    """Tensors left out, of another shape, number format or kind, under other names."""
    state = dict(STATE)
    for name in data.draw(st.lists(st.sampled_from(sorted(STATE)), max_size=3)):
        other = data.draw(st.sampled_from([None, 3, "x", torch.zeros(2), torch.zeros(()), STATE[name].unsqueeze(0), STATE[name].half()]))
        state[data.draw(st.sampled_from([name, "down2.resblocks.conv1.weight", f"{name}x"]))] = other
        if data.draw(st.booleans()):
            state.pop(name, None)
    answer(load_unet, tmp_path / "UNet.pt", saved(state))


def test_a_pickle_runs_no_code(tmp_path):
    for read in (read_noise, load_unet):
        for content in (pickle.dumps(Bomb(tmp_path / "exploded")), saved({"down1.weight": Bomb(tmp_path / "exploded")})):
            with pytest.raises(UserError):
                read_file(read, tmp_path / "bomb.pt", content)
    assert not (tmp_path / "exploded").exists()


def read_file(read, path, content):
    path.write_bytes(content)
    return read(path)
