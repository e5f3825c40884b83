"""Pictures to noises and exactly back, through the commands' own `main`, with a small untrained network."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from p2_ddim import edit, inference, quality, sweep
from p2_ddim.data import MINI_DATA, read_noise, read_noise_pairs
from p2_ddim.device import is_slow
from p2_ddim.files import RESULTS, UserError
from p2_ddim.inference import DrawConfig
from p2_ddim.interpolation import mix, slerp
from p2_ddim.model import UNet, UNetConfig, load_unet
from p2_ddim.pictures import read_picture


@pytest.fixture
def call(monkeypatch):
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
    return run


@pytest.fixture
def files(tmp_path):
    """Three 16x16 pictures of two kinds of file, none of which uses all of 0..255, and a checkpoint."""
    torch.manual_seed(0)
    torch.save(UNet(UNetConfig((32, 32), (), 1)).state_dict(), tmp_path / "UNet.pt")
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, kind in enumerate(("png", "png", "webp")):
        picture = np.kron(rng.integers(30, 220, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.{kind}", **({"lossless": True} if kind == "webp" else {}))
    return tmp_path


def test_pictures_come_back_exactly(call, files, capsys):
    """In another batch than they were inverted in, and with any range of values."""
    call(edit, "invert", files / "pictures", files / "noises", files / "UNet.pt", "--steps", 12, "--batch-size", 3)
    assert "--sampler belm --steps 12" in capsys.readouterr().out
    call(inference, files / "noises", files / "again", files / "UNet.pt", "--sampler", "belm", "--steps", 12, "--batch-size", 2)
    for path in sorted((files / "pictures").iterdir()):
        again = np.asarray(Image.open(files / "again" / f"{path.stem}.png"))
        assert (again == np.asarray(read_picture(path))).all()
    noise = read_noise(files / "noises" / "0.pt")  # for the other samplers it is a noise
    assert noise.shape == (3, 16, 16) and noise.dtype == torch.float32
    call(inference, files / "noises", files / "ddim", files / "UNet.pt", "--steps", 3)
    assert len(list((files / "ddim").glob("*.png"))) == 3


def test_what_is_no_pair_is_refused_in_one_line(call, files):
    call(edit, "invert", files / "pictures", files / "noises", files / "UNet.pt", "--steps", 3)
    with pytest.raises(UserError, match=r"0\.pt was inverted with 3 steps: draw it with --steps 3"):
        call(inference, files / "noises", files / "again", files / "UNet.pt", "--sampler", "belm")
    whole = torch.load(files / "noises" / "0.pt")
    for damage in ({"range": torch.zeros(3)}, {"states": whole["states"][:1]}, {"states": whole["states"] * torch.nan}, {"steps": None},
                   {"steps": torch.zeros(2)}):
        torch.save(whole | damage, files / "noises" / "0.pt")
        with pytest.raises(UserError, match="is not a file of p2_invert"):
            read_noise_pairs(files / "noises", 3)
        with pytest.raises(UserError, match="is not a file of p2_invert"):
            read_noise(files / "noises" / "0.pt")
    torch.save(torch.zeros(1, 3, 16, 16), files / "noises" / "0.pt")
    with pytest.raises(UserError, match="mixes files of p2_invert with plain noises"):
        read_noise_pairs(files / "noises", 3)
    for path in (files / "noises").glob("[12].pt"):
        path.unlink()
    assert read_noise_pairs(files / "noises", 3) == (None, {})  # plain noises: belm begins with DDIM's step
    call(inference, files / "noises", files / "plain", files / "UNet.pt", "--sampler", "belm", "--steps", 3)
    assert (files / "plain" / "0.png").exists()


def test_pairs_tell_by_what_they_were_found(call, files, capsys):
    """Another network, number format or other steps do not give the pictures back: a note, or a refusal."""
    call(edit, "invert", files / "pictures", files / "noises", files / "UNet.pt", "--steps", 3, "--dtype", "bf16")
    assert "--sampler belm --steps 3 --dtype bf16\n" in capsys.readouterr().out
    torch.manual_seed(1)
    torch.save(UNet(UNetConfig((32, 32), (), 1)).state_dict(), files / "other.pt")
    for network, dtype, told in (("UNet", "bf16", None), ("UNet", "fp32", "another dtype:"), ("other", "fp32", "another dtype and network:")):
        call(inference, files / "noises", files / f"{network} {dtype}", files / f"{network}.pt", "--sampler", "belm", "--steps", 3, "--dtype", dtype)
        said = capsys.readouterr().err
        assert "its pictures do not come back" not in said if told is None else f"was inverted with {told} its pictures do not come back" in said
    with pytest.raises(UserError, match="was inverted at the trailing steps, to an alpha_bar of one; leave --spacing and --last-alpha-bar out"):
        call(inference, files / "noises", files / "out", files / "UNet.pt", "--sampler", "belm", "--steps", 3, "--spacing", "leading")
    whole = torch.load(files / "noises" / "0.pt")
    torch.save(whole | {"states": whole["states"][..., :8]}, files / "noises" / "0.pt")
    with pytest.raises(UserError, match=r"1\.pt is \(2, 3, 16, 16\), but 0\.pt is \(2, 3, 16, 8\); all noises must have one size"):
        call(inference, files / "noises", files / "out", files / "UNet.pt", "--sampler", "belm", "--steps", 3)


def test_a_strip_that_is_no_ones_but_the_users_is_not_overwritten(call, files):
    given, way = sorted((files / "pictures").iterdir())[:2], files / "way"
    arguments = ["morph", *given, way, "--checkpoint", files / "UNet.pt", "--frames", 1, "--steps", 2]
    for _ in range(2):  # its own is
        call(edit, *arguments)
    for name in ("strip.png", "morph.webp"):
        (way / "strip.png").unlink(missing_ok=True)
        (way / name).write_text("the user's")
        with pytest.raises(UserError, match="did not make, and which is not overwritten"):
            call(edit, *arguments)
        assert (way / name).read_text() == "the user's"


def test_bad_measures_are_refused_in_one_line(call, files):
    pictures = files / "pictures"
    arguments = ["measure", "--references", pictures, "--drawings", pictures, "--checkpoint", files / "UNet.pt", "--output", files / "e.json"]
    with pytest.raises(UserError, match="--steps must be at least 2, not 1"):
        call(edit, *arguments, "--steps", 1)
    with pytest.raises(UserError, match="15x15 is no size for this network"):
        call(edit, *arguments, "--side", 15)
    Image.new("RGB", (8, 16)).save(files / "pictures" / "3.png")
    with pytest.raises(UserError, match=r"3\.png is 8x16, but 0\.png is 16x16; give --side"):
        call(edit, *arguments)


def test_bad_pictures_are_refused_in_one_line(call, files):
    Image.new("RGB", (15, 16)).save(files / "pictures" / "3.png")
    with pytest.raises(UserError, match=r"3\.png is 15x16, but 0\.png is 16x16; give --side"):
        call(edit, "invert", files / "pictures", files / "noises", files / "UNet.pt")
    with pytest.raises(UserError, match="15x15 is no size for this network"):
        call(edit, "invert", files / "pictures", files / "noises", files / "UNet.pt", "--side", 15)
    Image.new("RGB", (16, 16)).save(files / "pictures" / "0.bmp")
    (files / "pictures" / "3.png").unlink()
    with pytest.raises(UserError, match=r"two pictures of .* have one name"):
        call(edit, "invert", files / "pictures", files / "noises", files / "UNet.pt", "--steps", 2)
    with pytest.raises(UserError, match="a way needs two pictures"):
        call(edit, "morph", files / "pictures" / "0.png", files / "way")
    assert not (files / "noises").exists() or not list((files / "noises").iterdir())


def test_noises_of_other_pictures_are_not_replaced_in_silence(call, files):
    """The same call again changes nothing; another picture of the name, or other settings, are told."""
    arguments = ["invert", files / "pictures", files / "noises", files / "UNet.pt"]
    for _ in range(2):
        call(edit, *arguments, "--steps", 3)
    before = (files / "noises" / "0.pt").read_bytes()
    with pytest.raises(UserError, match=r"0\.pt is of another picture, of another network or of other settings; choose another OUT, or give --overwrite"):
        call(edit, *arguments, "--steps", 4)
    Image.new("RGB", (16, 16), "red").save(files / "pictures" / "0.png")
    with pytest.raises(UserError, match=r"0\.pt is of another picture"):
        call(edit, *arguments, "--steps", 3)
    assert (files / "noises" / "0.pt").read_bytes() == before
    call(edit, *arguments, "--steps", 3, "--overwrite")
    assert (files / "noises" / "0.pt").read_bytes() != before


def test_a_broken_off_inversion_goes_on(call, files, monkeypatch, capsys):
    """What is found is kept at once; the same call again finds the rest."""
    arguments, find, left = ["invert", files / "pictures", files / "noises", files / "UNet.pt", "--steps", 3, "--batch-size", 1], edit.to_pair, iter(range(2))
    monkeypatch.setattr(edit, "to_pair", lambda *a: (next(left), find(*a))[1])
    with pytest.raises((StopIteration, RuntimeError)):
        call(edit, *arguments)
    assert sorted(path.name for path in (files / "noises").glob("[!.]*")) == ["0.pt", "1.pt"]
    monkeypatch.setattr(edit, "to_pair", find)
    capsys.readouterr()
    call(edit, *arguments)
    assert "2 were there already; wrote 1 noises" in capsys.readouterr().out and len(list((files / "noises").glob("*.pt"))) == 3
    call(edit, *arguments)
    assert "3 were there already; wrote 0 noises" in capsys.readouterr().out


@pytest.mark.parametrize("module", [quality, sweep])
def test_the_side_of_another_network_is_asked_for(call, files, module):
    """The bundled one's would be taken in silence."""
    arguments = [files / "UNet.pt"] if module is quality else ["--checkpoint", files / "UNet.pt", "--measure", "distance"]
    with pytest.raises(UserError, match=r"--side is missing: .*UNet\.pt does not tell of what side its pictures are"):
        call(module, *arguments, "--output", files / "x.json")


def test_the_way_from_picture_to_picture(call, files):
    """It passes through the pictures themselves."""
    given = sorted((files / "pictures").iterdir())
    call(edit, "morph", *given, files / "way", "--checkpoint", files / "UNet.pt", "--frames", 2, "--steps", 6, "--batch-size", 4)
    with Image.open(files / "way" / "morph.webp") as film:
        assert film.size == (16, 16) and film.n_frames == 8  # there and back: 0 . 1 . 2 . 1 .
    unet = load_unet(files / "UNet.pt")
    pictures = [np.asarray(read_picture(path)) for path in given]
    frames = edit.morph(unet, pictures, DrawConfig("belm", 6, "trailing", "one"), 2, 3)
    assert len(frames) == 5 and all((frames[2 * i] == picture).all() for i, picture in enumerate(pictures))
    assert Image.open(files / "way" / "strip.png").width > 3 * 16


def test_the_references_and_faces_that_the_network_never_made_come_back():
    """In fp32 and bf16, whatever the batch: an MSE of at most 0.1 squared grey levels after rounding; here none."""
    unet, config = load_unet(MINI_DATA / "UNet.pt"), DrawConfig("belm", 10, "trailing", "one")
    reference = np.asarray(read_picture(MINI_DATA / "GT" / "03.png"))
    drawn = np.clip(reference[::-1].astype(int) // 2 + 40, 0, 255).astype(np.uint8)  # upside down and pale: no face of its
    for dtype in (torch.float32, torch.bfloat16):
        pairs = dict(edit.invert_all(unet, {"reference": reference, "drawn": drawn}, config, 2, dtype))
        assert 0.8 < pairs["reference"][0].std() < 2  # 1.05 with 50 steps
        for name, x in inference.generate(unet, pairs, config, 1, dtype=dtype, shown=False):
            picture = {"reference": reference, "drawn": drawn}[name]
            again = inference.to_pictures(x[None], *edit.value_range(picture))[0]
            assert np.square(again.astype(float) - picture).mean() < (0.1 if name == "reference" else 1)


def test_how_exactly_is_measured(call, files):
    """100 dB in float64, 0.1 squared grey levels of what the network drew, 1 of what it never made, in every number format."""
    call(edit, "measure", "--references", files / "pictures", "--drawings", files / "pictures", "--checkpoint", files / "UNet.pt", "--count", 2, "--steps", 12,
         "--output", files / "exact.json")
    results = json.loads((files / "exact.json").read_text())
    for kind, limit in (("references", 0.1), ("drawings", 1)):
        assert results[kind]["pictures"] == 2 and results[kind]["fp64"]["psnr"] > 100
        formats = ["fp64", "fp32", *([] if is_slow("bf16", torch.device("cpu")) else ["bf16"])]  # an emulated one takes hours at the full size
        assert {*results[kind]} == {"pictures", *formats} and all(results[kind][name]["mse"] <= limit for name in formats)


def test_the_numbers_reported_of_exact_inversion_keep_their_limits():
    results = json.loads((RESULTS / "p2_exact.json").read_text())
    for kind, limit in (("references", 0.1), ("drawings", 1)):
        assert results[kind]["fp64"]["psnr"] >= 100 and all(results[kind][name]["mse"] <= limit for name in ("fp64", "fp32", "bf16"))


def test_mixtures_of_noises_are_noise():
    noises = [torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for weights in ((1, 0, 0, 0), (1, 1, 1, 1), (0.1, 0.2, 3, 7)):
        mixture = mix(noises, weights)
        assert mixture.std().item() == pytest.approx(1, abs=0.02) and mixture.mean().abs() < 0.03
    assert torch.equal(mix(noises, (0, 2, 0, 0)), noises[1])
    alpha = 0.3  # two: nearly slerp
    w = (np.cos(alpha * np.pi / 2), np.sin(alpha * np.pi / 2))
    assert (mix(noises[:2], w) - slerp(*noises[:2], alpha)).std() < 0.02
    for weights in ((1, 1), (0, 0, 0, 0), (1, -1, 1, 1), (1, 1, 1, float("nan"))):
        with pytest.raises(ValueError, match="weights"):
            mix(noises, weights)
