"""Training through the real command: killed runs, bad settings."""

import csv
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from p2_ddim.data import read_faces
from p2_ddim.files import UserError
from p2_ddim.model import UNet, UNetConfig, load_unet
from p2_ddim.train import TrainConfig, batch_of, parted
from p2_ddim.training import make_optimizer

TRAIN = "p2_ddim.train"
SETTINGS = ["--image-size", 16, "--widths", 32, 32, "--attention", 1, "--batch-size", 4, "--save-every", 5, "--sample-every", 0, "--warmup", 1,
            "--dtype", "fp32", "--device", "cpu", "--dropout", 0.1, "--flip"]


def numbers_of(folder):
    """The rows of a run's log.csv, without what depends on the machine."""
    with open(folder / "log.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value and name not in ("seconds", "items_per_second", "peak_memory_gb")}
                for row in csv.DictReader(file)]


@pytest.fixture
def pictures(tmp_path):
    """Ten 20x16 pictures of a disc on a plain ground."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    y, x = np.mgrid[:16, :20]
    for i in range(10):
        inside = ((y - rng.uniform(5, 11)) ** 2 + (x - rng.uniform(7, 13)) ** 2 < rng.uniform(9, 25))[..., None]
        Image.fromarray(np.where(inside, rng.integers(0, 256, 3), rng.integers(0, 256, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_killed_run_ends_with_the_same_weights(call, command, one_thread, pictures, tmp_path):
    settings = [*SETTINGS, "--data", pictures, "--steps", 40]
    code, out, err = command(TRAIN, *settings, "--output", tmp_path / "whole")  # apart: what other tests did to this process may change a last bit
    assert code == 0 and "next: bash scripts/p2_infer.sh" in out, err
    process = command(TRAIN, *settings, "--output", tmp_path / "killed", wait=False)
    while not (tmp_path / "killed" / "UNet.pt").exists() and process.poll() is None:  # which is there beside the first state
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and load_unet(tmp_path / "killed" / "UNet.pt").config.widths == (32, 32)
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] < 40
    code, out, err = command(TRAIN, *settings, "--output", tmp_path / "killed")
    assert code == 0 and "going on at step" in out, err
    whole, resumed = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
    assert numbers_of(tmp_path / "whole") == numbers_of(tmp_path / "killed")
    code, _, err = call(TRAIN, *settings, "--output", tmp_path / "whole", "--lr", "0.5")
    assert code != 0 and "other settings (lr 0.002 is now 0.5)" in err and "Traceback" not in err


@pytest.mark.parametrize("flags", [["--accumulate", 2], ["--accumulate", 9]])
def test_a_batch_in_parts_is_the_same_batch(call, pictures, tmp_path, flags):
    """With the last bits alone to tell it; and a run may change its mind."""
    settings = [*SETTINGS[:-3], "--data", pictures, "--validate-every", 0]
    for name, more in (("whole", []), ("parts", flags)):
        code, _, err = call(TRAIN, *settings, "--steps", 3, "--output", tmp_path / name, *more)
        assert code == 0, err
    whole, parts = (torch.load(tmp_path / name / "UNet.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)
    assert not torch.equal(whole["out.2.weight"], parts["out.2.weight"])  # they were in parts
    code, out, err = call(TRAIN, *settings, "--steps", 4, "--output", tmp_path / "whole", *flags)
    assert code == 0 and "going on at step 3" in out, err


def test_many_pictures_stay_where_there_is_room(call, pictures, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr("p2_ddim.train.MOST_ON_GPU", 0)
    monkeypatch.setattr("p2_ddim.train.batch_of", lambda faces, *a, real=batch_of: moved.append(faces.device.type) or real(faces, *a))
    code, _, err = call(TRAIN, *SETTINGS, "--data", pictures, "--steps", 1, "--output", tmp_path / "run")
    assert code == 0 and set(moved) == {"cpu"}, err


def test_training_learns_and_its_result_draws(call, pictures, tmp_path):
    settings = [*SETTINGS[:-3], "--data", pictures, "--steps", 150, "--batch-size", 16, "--sample-every", 150, "--dtype", "auto"]
    code, _, err = call(TRAIN, *settings, "--output", tmp_path / "run")
    assert code == 0, err
    history = numbers_of(tmp_path / "run")
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]  # the first entry is a mean over the first 50 steps
    assert Image.open(tmp_path / "run" / "samples_000150.png").size == (8 * 16, 2 * 16)
    assert load_unet(tmp_path / "run" / "UNet.pt").config == UNetConfig((32, 32), (1,), 1)


def test_a_training_goes_on_from_given_weights_of_the_same_network(call, pictures, tmp_path):
    torch.manual_seed(1)
    begun = UNet(UNetConfig((32, 32), (1,), 1))
    torch.save(begun.state_dict(), tmp_path / "begun.pt")
    settings = [*SETTINGS, "--data", pictures, "--init", tmp_path / "begun.pt", "--lr", 0]
    code, _, err = call(TRAIN, *settings, "--output", tmp_path / "run", "--steps", 2)
    assert code == 0, err
    ended = torch.load(tmp_path / "run" / "UNet.pt", weights_only=True)
    assert all(torch.equal(tensor, ended[name]) for name, tensor in begun.state_dict().items())
    torch.save(UNet(UNetConfig((32, 32), (0, 1), 1)).state_dict(), tmp_path / "begun.pt")
    code, _, err = call(TRAIN, *settings, "--output", tmp_path / "turned", "--steps", 1, "--attention", 1, 0)  # in any order
    assert code == 0, err
    torch.save(begun.state_dict(), tmp_path / "begun.pt")
    code, _, err = call(TRAIN, *settings, "--output", tmp_path / "other", "--steps", 2, "--widths", 32, 64)
    assert code != 0 and "another network: --widths 32 32 --attention 1 --blocks 1" in err and "Traceback" not in err


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_parameter_moves(layout):
    """Also the kernels, which Muon sees as matrices that share their memory, in either layout."""
    torch.manual_seed(0)
    model = UNet(UNetConfig((32, 32), (1,), 1)).to(memory_format=layout)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.1, 0.0, (0.9, 0.99), edges=("down1.", "out."))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as fp16 on a GPU has it
    scaler.scale(model(torch.randn(4, 3, 16, 16), torch.arange(4) * 90).square().sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(1, rel=1e-3)
    scaler.step(optimizer)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    step = (before["mid1.resblocks.conv1.weight"] - model.mid1.resblocks.conv1.weight.detach()).flatten(1)
    values = torch.linalg.svdvals(step)  # Muon's step is the gradient with its singular values made (about) equal
    assert values.max() / values.min() < 2


def test_pictures_are_cropped_to_their_middle(pictures):
    Image.fromarray(np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3))).save(pictures / "0.png")
    images = read_faces(pictures, 16)
    assert images.shape == (10, 16, 16, 3) and (images[0, 0, :, 0] == np.arange(2, 18)).all()
    assert (read_faces(pictures, 8)[0, 0, :, 0] == np.arange(3, 19, 2)).all()  # 2.5 becomes 3
    Image.fromarray(np.tile(10 * np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3))).save(pictures / "0.png")
    assert (np.diff(read_faces(pictures, 32)[0, 0, 2:-2, 0].astype(int)) == 5).all()  # enlarged smoothly, not to blocks


@pytest.mark.parametrize("share, count, learned, kept", [(0.5, 10, 5, 5), (1.0, 10, 1, 9), (0.8, 2, 1, 1), (0.0, 3, 3, 3), (1.0, 1, 1, 1)])
def test_some_pictures_are_always_left_to_learn_from(share, count, learned, kept):
    faces, held_out = parted(torch.arange(count), TrainConfig(held_out=share))
    assert (len(faces), len(held_out)) == (learned, kept)


def test_bad_flags_and_pictures_end_in_one_line(call, pictures, tmp_path):
    for flags, message in ((["--data", tmp_path / "no"], "no such folder of pictures"), (["--steps", 0], "--steps must be at least 1"),
                           (["--widths", 20], "multiples of 32"), (["--image-size", 15], "cannot be halved"), (["--output", "/dev/null/run"], "/dev/null/run")):
        code, _, err = call(TRAIN, *SETTINGS, "--data", pictures, "--output", tmp_path / "run", *flags)
        assert code != 0 and err.startswith("error: ") and err.strip().count("\n") == 0 and message in err, err
    (pictures / "0.png").write_bytes((pictures / "1.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot read the picture .*0\.png"):
        read_faces(pictures, 16)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no pictures"):
        read_faces(tmp_path / "none", 16)
