"""The grader's call and the grading, through the real commands, with a small untrained network."""

import argparse
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from p2_ddim.data import read_noise, read_noises
from p2_ddim.evaluate import difference, mse, psnr, read_pairs
from p2_ddim.files import UserError
from p2_ddim.inference import DrawConfig, add_arguments, draw_settings, generate, to_pictures
from p2_ddim.model import UNet, UNetConfig


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return UNet(UNetConfig((32, 32), (), 1)).eval().requires_grad_(False)


@pytest.fixture
def files(network, tmp_path):
    """A noise folder (00, 01, 02) and a checkpoint in the course's format."""
    (tmp_path / "noise").mkdir()
    for i in range(3):
        x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(i))
        torch.save(x if i else x[0], tmp_path / "noise" / f"{i:02d}.pt")
    torch.save(network.state_dict(), tmp_path / "UNet.pt")
    return tmp_path


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_image_does_not_depend_on_the_others(network, eta):
    noises = {f"{i:02d}": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    config = DrawConfig(num_steps=4, eta=eta)
    whole = {name: to_pictures(x[None])[0].astype(int) for name, x in generate(network, noises, config, 5, shown=False)}
    for batch_size, some in ((1, list(noises)), (2, list(noises)[::-2])):
        for name, x in generate(network, {name: noises[name] for name in some}, config, batch_size, shown=False):
            assert np.abs(to_pictures(x[None])[0] - whole[name]).max() <= 1


def test_the_command_and_its_grading(call, files):
    out = files / "a folder, Ünïcode"
    code, text, err = call("p2_ddim.inference", files / "noise", out, files / "UNet.pt", "--steps", 3)
    assert code == 0 and "wrote 3 images" in text, err
    assert sorted(path.name for path in out.glob("[!.]*")) == ["00.png", "01.png", "02.png"]
    with Image.open(out / "01.png") as image:
        assert image.size == (16, 16) and image.mode == "RGB" and np.asarray(image).max() == 255
    code, text, err = call("p2_ddim.evaluate", out, out, "--report", files / "grade")
    assert code == 0 and "3 of 3 pass" in text, err
    assert json.loads((files / "grade" / "grade.json").read_text())["mean_mse"] == 0
    assert (files / "grade" / "comparison.png").exists()
    (files / "some").mkdir()
    Image.open(out / "00.png").save(files / "some" / "00.png")
    code, text, err = call("p2_ddim.evaluate", out, files / "some", "--report", files / "grade")
    assert code == 0 and "01.png, 02.png (GT has no .png of that name)" in err, err


def test_mse_and_psnr():
    a, b = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 10, np.uint8)
    assert mse(a, b) == mse(b, a) == 100 and psnr(100) == pytest.approx(28.1308, abs=1e-4) and psnr(0) == float("inf")
    assert mse(a, a + np.uint8(255)) == mse(a + np.uint8(255), a) == 255**2  # as 8 bits it would be 1
    assert (difference(a, b) == 80).all() and (difference(b, a) == 80).all() and (difference(a, a + np.uint8(200)) == 255).all()


def test_bad_noise_is_refused_in_one_line(tmp_path):
    path = tmp_path / "00.pt"

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            read_noise(path)
        assert "\n" not in str(error.value)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for content, message in ((torch.zeros(1, 4, 8, 8), r"\(1, 4, 8, 8\), expected"), (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\), expected"),
                             (torch.zeros(3, 8), "expected"), (torch.zeros(3, 8, 8, dtype=torch.long), "int64"), (["a"], "holds a list"),
                             (torch.full((3, 8, 8), float("nan")), "not finite"), (torch.full((3, 8, 8), float("inf")), "not finite"),
                             (Evil(), "cannot be read as a noise tensor")):
        torch.save(content, path)
        refused(message)
    path.write_bytes(pickle.dumps(Evil()))
    refused("cannot be read as a noise tensor")
    assert not (tmp_path / "executed").exists()
    path.write_bytes(b"")
    refused("cannot be read as a noise tensor")
    torch.save(torch.zeros(3, 8, 8, dtype=torch.float16), path)
    assert read_noise(path).dtype == torch.float32
    torch.save(torch.zeros(1, 3, 16, 16), tmp_path / "01.pt")
    with pytest.raises(UserError, match="all noises must have one size"):
        read_noises(tmp_path)


def test_bad_calls_end_in_one_line_and_write_nothing(call, files):
    empty = files / "empty"
    empty.mkdir()
    noise, out, checkpoint = files / "noise", files / "out", files / "UNet.pt"
    odd = files / "odd"
    odd.mkdir()
    torch.save(torch.zeros(3, 15, 16), odd / "00.pt")
    for arguments, message in (((files / "no", out, checkpoint), "no such folder of noises"), ((empty, out, checkpoint), "has no .pt files"),
                               ((noise, out, files / "no.pt"), "no such UNet checkpoint"),
                               ((noise, out, checkpoint, "--steps", 0), "--steps must be between 1 and 1000, not 0"),
                               ((odd, out, checkpoint), "multiples of 2"), ((noise, "/dev/null/out", checkpoint), "/dev/null/out")):
        code, _, err = call("p2_ddim.inference", *arguments)
        assert code != 0 and err.startswith("error: ") and message in err and err.strip().count("\n") == 0, err
    assert not list(files.rglob("*.png"))


def test_bad_grading_folders(files):
    (files / "gt").mkdir()
    (files / "result").mkdir()
    with pytest.raises(UserError, match="has no"):
        read_pairs(files / "result", files / "gt")
    Image.new("RGB", (8, 8)).save(files / "gt" / "00.png")
    with pytest.raises(UserError, match=r"00\.png is missing"):
        read_pairs(files / "result", files / "gt")
    Image.new("RGB", (8, 9)).save(files / "result" / "00.png")
    with pytest.raises(UserError, match=r"00\.png is 8x9, but .*gt.00\.png is 8x8"):
        read_pairs(files / "result", files / "gt")
    (files / "result" / "00.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read the picture"):
        read_pairs(files / "result", files / "gt")


@pytest.mark.parametrize("flags, first", [((501,), 501), ((400,), 799), ((501, "--spacing", "trailing"), 0), ((500,), 0), ((50,), 0)])
def test_steps_that_begin_in_the_middle_are_told(flags, first, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    draw_settings(parser.parse_args(["--steps", *map(str, flags)]))
    assert (f"begin at t = {first}, where noise alone is not expected" in capsys.readouterr().err) == bool(first)


def test_the_limit_is_the_courses(call, files):
    """20 squared grey levels on average, which is no pass itself: 4,000 and 3,999 over 200 values."""
    for folder in ("gt", "result"):
        (files / folder).mkdir()
        for name, errors in (("at", [20] * 10), ("below", [20] * 9 + [19] + [6, 1, 1])):
            picture = np.zeros((20, 10, 3), np.uint8)
            picture[..., 0].flat[:len(errors)] = np.multiply(errors, folder == "result")
            picture = np.repeat(picture[..., :1], 3, axis=2)
            Image.fromarray(picture).save(files / folder / f"{name}.png")
    code, out, err = call("p2_ddim.evaluate", files / "result", files / "gt")
    images = json.loads((files / "result_grade" / "grade.json").read_text())["images"]
    assert code == 0 and images["at.png"] == {"mse": 20.0, "psnr": psnr(20), "passed": False}, out + err
    assert images["below.png"]["mse"] == pytest.approx(3999 / 200) and images["below.png"]["passed"]


def test_one_bad_picture_costs_no_other_its_grade(call, files):
    for name in ("00", "01", "02"):
        for folder in ("gt", "result"):
            (files / folder).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(files / folder / f"{name}.png")
    (files / "result" / "01.png").unlink()
    Image.new("RGB", (8, 9)).save(files / "result" / "02.png")
    code, out, err = call("p2_ddim.evaluate", files / "result", files / "gt")
    grade = json.loads((files / "result_grade" / "grade.json").read_text())
    assert code == 0 and (grade["passed"], grade["mean_mse"]) == (1, 0) and "1 of 3 pass" in out, out + err
    assert [grade["images"][f"0{i}.png"]["passed"] for i in range(3)] == [True, False, False]
    assert "01.png is missing" in grade["images"]["01.png"]["reason"] and "02.png  FAIL: " in out and "is 8x9, but" in out
    (files / "result" / "00.png").unlink()
    code, _, err = call("p2_ddim.evaluate", files / "result", files / "gt")
    assert code == 1 and "00.png is missing" in err and not (files / "result_grade" / "grade.json").exists()
