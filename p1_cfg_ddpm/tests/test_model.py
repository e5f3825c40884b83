import pytest
import torch
from torch import nn

from p1_cfg_ddpm import benchmark, device
from p1_cfg_ddpm.device import cpu_has_bf16, pick_device, pick_dtype
from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.model import SIZES, UNet, load_model, save_model
from p1_cfg_ddpm.tensors import save_weights


def inputs(n=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 28, 28, generator=generator), torch.arange(n) * 200, torch.arange(n) % 10, torch.arange(n) % 2


@pytest.mark.parametrize("size", list(SIZES))
def test_nothing_depends_on_the_batch(size):
    model = UNet(SIZES[size])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
        x, t, digit, domain = inputs()
        for mode in (model.eval(), model.train()) if SIZES[size].dropout == 0 else (model.eval(),):
            together = mode(x, t, digit, domain)
            alone = torch.cat([mode(x[i:i + 1], t[i:i + 1], digit[i:i + 1], domain[i:i + 1]) for i in range(len(x))])
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert together.shape == x.shape


def test_every_condition_matters(tiny_model):
    x, t, digit, domain = inputs()
    with torch.no_grad():
        plain = tiny_model(x, t, digit, domain)
        for other in (tiny_model(x, t + 100, digit, domain), tiny_model(x, t, digit + 1, domain), tiny_model(x, t, digit, 1 - domain),
                      tiny_model(x, t, torch.full_like(digit, tiny_model.null_digit), domain),
                      tiny_model(x, t, digit, torch.full_like(domain, tiny_model.null_domain))):
            assert ((other - plain).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_every_parameter_is_trained(tiny_model):
    x, t, digit, domain = inputs(11)
    digit[-1], domain[-1] = tiny_model.null_digit, tiny_model.null_domain
    digit[:10] = torch.arange(10)
    tiny_model(x, t % 1000, digit, domain).square().sum().backward()
    assert [name for name, p in tiny_model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpoint_round_trip(tiny_model, tiny_checkpoint):
    model, metadata = load_model(tiny_checkpoint)
    assert metadata["diffusion"]["prediction"] == "v" and not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), tiny_model(*inputs()), rtol=0, atol=1e-5)


def test_bad_checkpoints_are_refused_in_one_line(tiny_model, tmp_path):
    path = tmp_path / "bad.safetensors"

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            load_model(path)
        assert "\n" not in str(error.value)

    refused("no such checkpoint")
    path.write_bytes(b"")
    refused("not a readable safetensors file")
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{not json.......")
    refused("a damaged safetensors file")
    save_weights(path, {"a": torch.zeros(1)}, {"other": 1})
    refused("not a checkpoint of this UNet")
    save_model(path, UNet(SIZES["small"]), Diffusion())
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused("the download was broken off")
    state = tiny_model.state_dict()
    state["head.2.weight"] = state["head.2.weight"][:1]
    state["stray"] = state.pop("stem.bias")
    tiny_model.state_dict = lambda: state
    save_model(path, tiny_model, Diffusion())
    refused(r"missing stem.bias; unexpected stray; head.2.weight is \(1, 16, 3, 3\), expected \(12, 16, 3, 3\)")


@pytest.mark.parametrize("fast", [(), ("bf16",)])
def test_what_a_machine_is_slow_in_is_not_measured(fast, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(device, "fast_dtypes", lambda _: fast)
    assert list(benchmark.formats(tiny_checkpoint, torch.device("cpu"), batch_size=1, repeats=1)) == ["fp32", *fast]


def test_device_and_dtype():
    cpu = pick_device("cpu")
    assert pick_dtype("fp16", cpu) == torch.float16
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if cpu_has_bf16() else torch.float32)
    with pytest.raises(UserError, match="nonsense"):
        pick_device("nonsense")
