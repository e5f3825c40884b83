import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from p1_cfg_ddpm.data import MINI_DATA, load_digits
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.pictures import to_model, to_uint8


@pytest.fixture
def folder(tmp_path):
    """Three images per domain, in the course's layout."""
    for domain in ("mnistm", "svhn"):
        (tmp_path / domain / "data").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((28, 28, 3), 40 * i + 10, np.uint8)).save(tmp_path / domain / "data" / f"{i}.png")
        (tmp_path / domain / "train.csv").write_text("image_name,label\n0.png,7\n1.png,0\n2.png,9\n")
    return tmp_path


def test_reads_the_course_layout(folder):
    data = load_digits(folder, "train")
    assert data.images.shape == (6, 28, 28, 3) and data.images.dtype == np.uint8
    assert data.digit.tolist() == [7, 0, 9] * 2 and data.domain.tolist() == [0] * 3 + [1] * 3
    assert data.images[:, 0, 0, 0].tolist() == [10, 50, 90] * 2
    assert load_digits(folder, "train", ("svhn",)).domain.tolist() == [1] * 3


def test_the_cache_is_found_again_however_the_folder_is_called(folder, monkeypatch):
    load_digits(folder, "train")
    before = sorted((folder / ".cache").iterdir())
    monkeypatch.chdir(folder.parent)
    for other in (Path(folder.name), folder.parent / "." / folder.name / ".." / folder.name):
        load_digits(other, "train")
    assert sorted((folder / ".cache").iterdir()) == before


def test_the_cache_gives_the_same_and_notices_changes(folder):
    first = load_digits(folder, "train")
    assert len(list((folder / ".cache").iterdir())) == 2
    np.testing.assert_array_equal(load_digits(folder, "train").images, first.images)
    Image.fromarray(np.full((28, 28, 3), 200, np.uint8)).save(folder / "svhn" / "data" / "0.png", compress_level=0)
    assert load_digits(folder, "train").images[3, 0, 0, 0] == 200
    cached = sorted((folder / ".cache").glob("mnistm*"))[0]
    cached.write_bytes(cached.read_bytes()[:50])  # a damaged cache is made again
    np.testing.assert_array_equal(load_digits(folder, "train").images[:3], first.images[:3])


def test_other_sizes_and_modes_become_28x28_rgb(folder):
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(folder / "svhn" / "data" / "0.png")
    images = load_digits(folder, "train").images
    assert images.shape[1:] == (28, 28, 3) and (images[3] == 77).all()


@pytest.mark.parametrize("csv, message", [
    ("", "line 1: expected the columns image_name,label"),
    ("name,label\n0.png,7\n", "line 1: expected the columns image_name,label"),
    ("image_name,label\n", "lists no images"),
    ("image_name,label\n0.png,7\n1.png,10\n", "line 3: expected an image name and a label from 0 to 9"),
    ("image_name,label\n0.png,-1\n", "line 2"),
    ("image_name,label\n0.png,seven\n", "line 2"),
    ("image_name,label\n0.png\n", "line 2"),
    ("image_name,label\n9.png,1\n", "9.png does not exist"),
    (b"\xff\xfe\x00\x81", "is not a CSV file"),
    (None, "cannot read"),
])  # fmt: skip
def test_a_bad_csv_is_named(folder, csv, message):
    path = folder / "svhn" / "train.csv"
    if csv is None:
        path.unlink()
    else:
        path.write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    with pytest.raises(UserError, match=message) as error:
        load_digits(folder, "train")
    assert "svhn" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_an_unreadable_image_is_named(folder, content):
    path = folder / "mnistm" / "data" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)  # None: truncated
    with pytest.raises(UserError, match=r"cannot read the picture .*mnistm.data.1\.png"):
        load_digits(folder, "train")


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_an_archive_of_digits_is_read_and_not_run(tmp_path):
    images, label = np.zeros((3, 28, 28, 3), np.uint8), np.array([0, 5, 9])
    np.savez(tmp_path / "digits.npz", svhn_train=images, svhn_train_label=label)
    assert load_digits(tmp_path / "digits.npz", "train", ("svhn",)).digit.tolist() == [0, 5, 9]
    np.savez(tmp_path / "digits.npz", svhn_train=images, svhn_train_label=np.array([0, 5, 10]))
    with pytest.raises(UserError, match="with N labels from 0 to 9"):
        load_digits(tmp_path / "digits.npz", "train", ("svhn",))
    np.savez(tmp_path / "digits.npz", svhn_train=np.array([Hostile(tmp_path / "ran")], dtype=object), svhn_train_label=label)
    with pytest.raises(UserError, match=r"cannot be read as a \.npz of digits"):
        load_digits(tmp_path / "digits.npz", "train", ("svhn",))
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "digits.npz", allow_pickle=True)["svhn_train"]  # and it was no dud
    assert (tmp_path / "ran").exists()


def test_the_bundled_stand_in(tmp_path):
    shutil.copytree(MINI_DATA, tmp_path / "mini", ignore=shutil.ignore_patterns(".cache"))
    for split, each in (("train", 20), ("val", 5)):
        data = load_digits(tmp_path / "mini", split)
        for domain in (0, 1):
            assert np.bincount(data.digit[data.domain == domain]).tolist() == [each] * 10


def test_pixels_survive_the_model_range():
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    x = to_model(images)
    assert x.shape == (2, 3, 28, 28) and x.min() >= -1 and x.max() <= 1
    np.testing.assert_array_equal(to_uint8(x), images)
    np.testing.assert_array_equal(to_uint8(torch.full((1, 3, 28, 28), 7.0)), 255)


def test_images_stay_where_they_lie():
    """A batch on the GPU is not moved back to the CPU: the device "meta" stands for the GPU here."""
    assert to_model(torch.zeros(2, 28, 28, 3, dtype=torch.uint8, device="meta")).device.type == "meta"
