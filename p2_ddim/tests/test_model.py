"""The face UNet, against the course's tensor list and against diffusers' UNet2DModel with the same weights."""

import json
from pathlib import Path

import pytest
import torch

from p2_ddim.files import UserError
from p2_ddim.model import UNet, UNetConfig, config_of, load_unet
from p2_ddim.reference import to_diffusers

MINI = UNetConfig(widths=(32, 64, 64), attention=(1,), num_blocks=1)


def random_unet(config, seed=0):
    torch.manual_seed(seed)
    return UNet(config).eval()


@pytest.mark.parametrize("config", [MINI, UNetConfig((32, 32, 64), (), 2), UNetConfig((64, 32), (0, 1), 3), UNetConfig((96, 128), (), 1)])
def test_agrees_with_diffusers(config):
    model = random_unet(config)
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([981, 7])
    with torch.inference_mode():
        torch.testing.assert_close(model(x, t), to_diffusers(model)(x, t).sample, rtol=0, atol=1e-4)


def test_the_full_size_agrees_with_diffusers():
    """113.67 M parameters; at 64x64, which runs through every layer at a sixteenth of the cost."""
    model = random_unet(UNetConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(113.67e6, rel=1e-4)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(x, torch.tensor([501])), to_diffusers(model)(x, torch.tensor([501])).sample, rtol=0, atol=1e-4)


def test_the_tensors_are_the_courses():
    expected = json.loads((Path(__file__).parent / "unet_state_dict.json").read_text())
    with torch.device("meta"):
        own = UNet(UNetConfig()).state_dict()
    assert {name: [list(v.shape), str(v.dtype).split(".")[1]] for name, v in own.items()} == expected
    assert len(expected) == 427


def test_the_configuration_is_read_from_the_tensors(tmp_path):
    for config in (MINI, UNetConfig((32, 32, 64, 96), (2, 3), 2)):
        model = random_unet(config)
        assert config_of(model.state_dict()) == config
        torch.save(model.state_dict(), tmp_path / "UNet.pt")
        loaded = load_unet(tmp_path / "UNet.pt")
        x = torch.randn(1, 3, 16, 16)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(x, torch.tensor([5])), model(x, torch.tensor([5])), rtol=0, atol=1e-5)


def test_nothing_depends_on_the_batch():
    model = random_unet(MINI)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([3, 500, 999])
    with torch.inference_mode():
        torch.testing.assert_close(model(x, t)[1:2], model(x[1:2], t[1:2]), rtol=0, atol=1e-5)


def test_bad_checkpoints_are_refused_in_one_line(tmp_path):
    path = tmp_path / "UNet.pt"

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            load_unet(path)
        assert "\n" not in str(error.value)

    refused("no such UNet checkpoint")
    path.write_bytes(b"")
    refused("cannot be read")
    torch.save([1, 2], path)
    refused("holds no tensors by name; expected the course's UNet.pt")
    torch.save({"weight": torch.zeros(3)}, path)
    refused("is not a checkpoint of the face UNet")
    state = random_unet(MINI).state_dict()
    torch.save({name: v for name, v in state.items() if name not in ("up1.resblocks.conv1.bias", "out.2.bias")}, path)
    refused("missing up1.resblocks.conv1.bias; missing out.2.bias$")
    torch.save(state | {"extra": torch.zeros(1)}, path)
    refused("unexpected extra$")
    torch.save(state | {"out.2.weight": torch.zeros(3, 16, 3, 3)}, path)
    refused(r"out.2.weight is \(3, 16, 3, 3\), expected \(3, 32, 3, 3\)$")
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    refused("cannot be read")


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state}, lambda state: {"model": state, "ema": state, "optimizer": {}, "step": 3},
    lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    lambda state: {f"{kind}_model.{name}": tensor for kind in ("online", "ema") for name, tensor in state.items()} | {"step": torch.tensor(3)},
])
@pytest.mark.parametrize("old", [False, True])
def test_a_state_dict_in_wrappings_and_old_files(tmp_path, capsys, wrap, old):
    """As trainings save it, in torch.save's format of either age; of averaged and plain weights it is said which are used."""
    state = random_unet(MINI).state_dict()
    torch.save(wrap(state), tmp_path / "UNet.pt", _use_new_zipfile_serialization=not old)
    assert all(tensor.equal(state[name]) for name, tensor in load_unet(tmp_path / "UNet.pt").state_dict().items())
    assert ("as model, ema; those of model are used" in capsys.readouterr().err) == ("ema" in wrap(state))
