"""Whatever is in a file that people download: it is read, or refused in one line; no other error, no code run."""

import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2_ddim.data import read_noise
from p2_ddim.files import UserError
from p2_ddim.model import UNet, UNetConfig, load_unet

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


class Bomb:
    """A pickle of it, loaded as pickles are, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@st.composite
def damaged(draw, content):
    """A valid file's bytes, cut short, with a few of them changed, or any bytes at all."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    changed = bytearray(content[:draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
    for position, value in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)):
        if changed:
            changed[position % len(changed)] = value
    return bytes(changed)


def answer(read, path, content):
    """Writes `content` to `path` and reads it: fine, or a `UserError` of one line; everything else fails the test."""
    path.write_bytes(content)
    try:
        return read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 10
        return None


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
