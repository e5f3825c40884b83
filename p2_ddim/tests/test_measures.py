"""What measures: the samplers' sweep, arithmetic by kind of layer, the spectrum of pictures; with a small untrained network."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from p2_ddim import benchmark, device, figures, quality, sweep
from p2_ddim.benchmark import by_kind, shares_of_peak
from p2_ddim.diffusion import Denoiser
from p2_ddim.figures import deviations, spectrum, variety
from p2_ddim.files import UserError, write_json
from p2_ddim.model import UNet, UNetConfig
from p2_ddim.samplers import ImageNoise


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(UNetConfig((32, 32), (1,), 1)).eval().requires_grad_(False)


def test_samplers_come_nearer_with_more_evaluations(unet, tmp_path, monkeypatch):
    """To the answer of the one equation that all of them solve; what the file has of the other measure stays."""
    torch.save(unet.state_dict(), tmp_path / "UNet.pt")
    write_json(tmp_path / "s.json", {"frechet": {"rows": []}})
    arguments = ["--checkpoint", tmp_path / "UNet.pt", "--output", tmp_path / "s.json", "--side", 8, "--near", 1, "--truth", 100, "--evaluations", 4, 16]
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments), "--measure", "distance"])
    sweep.main()
    results = json.loads((tmp_path / "s.json").read_text())
    assert results["frechet"] == {"rows": []}
    rows = {(row["sampler"], row["asked"]): row for row in results["distance"]["rows"] if row["spacing"] == "trailing"}
    assert {name for name, _ in rows} == {"ddim", "dpmpp_2m", "heun", "unipc", "ipndm"} and rows["heun", 16]["evaluations"] == 15
    for sampler, _ in rows:
        assert rows[sampler, 16]["value"] < rows[sampler, 4]["value"]

    left = results["distance"]["rows"]
    broken = left[2:]  # as of a run that was broken off before the first two
    broken[0]["value"] += 1000  # is there already, and is believed
    write_json(tmp_path / "s.json", results | {"distance": results["distance"] | {"rows": broken}})
    sweep.main()
    assert json.loads((tmp_path / "s.json").read_text())["distance"]["rows"] == broken + left[:2]
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments), "8", "--measure", "distance"])
    sweep.main()  # one more: what was measured before counts
    more = json.loads((tmp_path / "s.json").read_text())["distance"]["rows"]
    assert more[:len(left)] == broken + left[:2] and {row["asked"] for row in more[len(left):]} == {8}
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments), "--measure", "distance", "--seed", "1"])
    sweep.main()  # another question: none of the answers is one to it
    others = json.loads((tmp_path / "s.json").read_text())["distance"]["rows"]
    assert len(others) == len(left) and not {row["value"] for row in others} & {row["value"] for row in left}

    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments), "--faces", str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"none is no folder of drawn faces; python -m p2_ddim\.make_mini faces .*none --count 3000"):
        sweep.main()


@pytest.mark.parametrize("module, flags", [(sweep, ["--measure", "frechet", "--evaluations", "2", "--checkpoint"]),
                                           (quality, ["--quality", "draft", "--"])])
def test_what_a_sampler_adds_is_not_the_noise_that_it_began_with(unet, tmp_path, monkeypatch, module, flags):
    """ddpm's first fresh noise was its start, of the same seed and names: after the first step it was a third too strong."""
    torch.save(unet.state_dict(), tmp_path / "UNet.pt")
    (tmp_path / "faces").mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "faces" / f"{i}.png")
    seen = []

    def generate(unet, noises, config, batch_size, seed, dtype):
        seen.extend((noise, ImageNoise(seed, [name], noise.shape)()[0]) for name, noise in noises.items())
        return iter(noises.items())

    monkeypatch.setattr(module, "generate", generate)
    for user in (quality, sweep):
        monkeypatch.setattr(user, "features", lambda pictures: torch.rand(len(pictures), 2, dtype=torch.float64))
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, ["--output", tmp_path / "s.json", "--side", 8, "--count", 2,
                                                                  "--faces", tmp_path / "faces", *flags, tmp_path / "UNet.pt"])])
    module.main()
    assert seen and all((start - fresh).abs().max() > 0.1 for start, fresh in seen)


@pytest.mark.parametrize("flags, said", [
    (["--evaluations", "0"], "--evaluations: steps must be between 1 and 1000, not 0"), (["--evaluations", "900"], "--evaluations: steps 900 do not fit"),
    (["--truth", "2000"], "--truth must be between 1 and 1000")])
def test_bad_flags_of_the_sweep_end_in_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep", "--measure", "distance", "--output", str(tmp_path / "s.json"), *flags])
    with pytest.raises(UserError, match=said):
        sweep.main()


def test_the_sweep_of_another_network_is_not_drawn(tmp_path, capsys):
    write_json(tmp_path / "s.json", {"distance": {"model": "ours", "rows": []}, "frechet": {"model": "another", "rows": []}})
    assert figures.sweep_of(tmp_path / "s.json", "ours") == {"distance": {"model": "ours", "rows": []}} and not capsys.readouterr().err
    assert figures.sweep_of(None, "mine") == {} and "p2_samplers.json is of another network: p2_samplers.png is not drawn" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such result of"):
        figures.sweep_of(tmp_path / "none.json", "ours")


def test_sets_of_drawn_faces_are_none_of_those_they_are_compared_with(monkeypatch):
    faces = np.arange(9)
    monkeypatch.setattr(sweep, "read_faces", lambda *_: faces)
    for name in ("to_model", "to_pictures"):
        monkeypatch.setattr(sweep, name, lambda pictures: pictures)
    monkeypatch.setattr(sweep, "features", lambda pictures: torch.tensor(pictures)[:, None])
    monkeypatch.setattr(sweep, "frechet_distance", lambda own, truth: (own.flatten().tolist(), truth.flatten().tolist()))
    truth, sets = sweep.reference_of("folder", 8, 2)
    assert truth.flatten().tolist() == [0, 1, 2, 3, 4] and sets == [([5, 6], [0, 1, 2, 3, 4]), ([7, 8], [0, 1, 2, 3, 4])]
    assert len(sweep.reference_of("folder", 8, 4)[1]) == 1
    with pytest.raises(UserError, match="folder has 9 pictures; --count 5 needs twice as many"):
        sweep.reference_of("folder", 8, 5)
    faces = np.arange(99)
    assert len(sweep.reference_of("folder", 8, 2)[1]) == sweep.SETS


def test_arithmetic_is_counted_by_kind_of_layer(unet):
    """As torch counts it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Denoiser(unet), torch.randn(2, 3, 16, 16)
    kinds = by_kind(unet, lambda: model.eps(x, 500), 2, torch.device("cpu"))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products it sees
        model.eps(x, 500)
    told = shares_of_peak(kinds, 1e9, 0.5)
    assert told["operations"] == pytest.approx(counter.get_total_flops())
    assert told["share_of_peak"] == pytest.approx(told["operations"] / 0.5e9)
    assert sum(row["share_of_time"] for row in kinds.values()) == pytest.approx(1)
    assert {"3x3 convolutions", "3x3 convolutions, stride 2", "1x1 convolutions", "linear", "attention", "norms"} < set(kinds)
    assert not unet.down1._forward_hooks


@pytest.mark.parametrize("fast, ways", [((), 3), (("fp16",), 3), (("bf16",), 4)])
def test_what_a_machine_is_slow_in_is_not_measured(fast, ways, tmp_path, monkeypatch, capsys):
    """Where bf16 is emulated a face takes hours."""
    row = json.dumps({"seconds_per_step": 1, "batch_size": 1, "peak_memory_gb": 1})
    monkeypatch.setattr(device, "fast_dtypes", lambda _: fast)
    monkeypatch.setattr(benchmark, "generate", lambda unet, noises, *_, **options: ((k, torch.zeros(3, 64, 64)) for k in noises))
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **options: SimpleNamespace(returncode=0, stdout=row))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device=cpu", f"--output={tmp_path}/b.json"])
    benchmark.main()
    results = json.loads((tmp_path / "b.json").read_text())
    assert len(results["ways"]) == ways and ("this project, bf16" in results["ways"]) == ("bf16" in results["miniature_mse"]) == ("bf16" in fast)
    assert ("note: left out, as cpu computes it slower than fp32: this project, bf16\n" in capsys.readouterr().err) == ("bf16" not in fast)


def test_variety_is_how_far_pictures_are_apart():
    pictures = np.random.default_rng(0).normal(100, 7, (200, 8, 8, 3))
    assert abs(variety(pictures) - 7) < 0.2 and variety(pictures[[0, 0, 0]]) < 1e-9


def test_the_spectrum_of_a_wave_is_where_it_should_be():
    y, x = np.mgrid[:32, :32]
    waves = np.stack([np.repeat((100 * np.sin(2 * np.pi * 5 * axis / 32))[..., None], 3, axis=2) for axis in (x, y)])
    for wave in waves:  # in either direction
        frequencies, power = spectrum(wave[None])
        assert frequencies[power.argmax()] == pytest.approx(5 / 32) and power.max() > 1e6 * np.sort(power)[-2]


def test_pictures_deviate_by_their_seeds():
    first = [np.zeros((2, 2, 3), np.uint8)]
    assert deviations({0.0: first, 0.5: first}, lambda eta, seed: [np.full((2, 2, 3), 20, np.uint8)], range(2)) == pytest.approx(
        np.array([[0], [20 / 2**0.5]]))


def test_faces_are_measured_as_by_hand():
    """Frechet distance in closed form; the energy of what is finer than four pixels, whichever way it lies; the deviation of noise in flat places."""
    a = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)  # covariance 2/3 I
    assert quality.frechet_distance(a, 2 * a + torch.tensor([3.0, 0])) == pytest.approx(9 + 2 * 2 / 3)  # tr(C + 4 C - 2 * 2 C)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    y, x = np.mgrid[:32, :48]
    for wave, energy in ((20.0 * (-1) ** x, 400), (20.0 * (-1) ** y, 400), (20.0 * (-1) ** (x + y), 400), (20 * np.sin(2 * np.pi * x / 8), 0)):
        picture = np.repeat((128 + wave).round().astype(np.uint8)[None, ..., None], 3, axis=3)
        assert quality.high_frequency(picture) == pytest.approx(energy, abs=1)
    noise = np.random.default_rng(0).normal(128, 5, (4, 64, 64, 3)).round().astype(np.uint8)
    assert quality.grain(noise) == pytest.approx(5, rel=0.05) and quality.grain(np.full_like(noise, 7)) == 0
    rows = quality.compare({"frechet": 3.0, "high_frequency": 2.0, "grain": 1.0}, {"frechet": 1.5, "high_frequency": 4.0, "grain": 0.0})
    assert (rows["frechet"]["ratio"], rows["high_frequency"]["ratio"], "ratio" in rows["grain"]) == (2, 0.5, False)
