import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from p1_cfg_ddpm import redraw
from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import fingerprint
from p1_cfg_ddpm.inference import CHECKPOINT, DrawConfig, all_jobs, generate, load_generator

INFER = "p1_cfg_ddpm.inference"


def draw(model, jobs, batch_size, **options):
    options = {"num_steps": 5, "guidance_weight": 1.0} | options
    return {job.name: image for job, image in generate(model, Diffusion(), jobs, DrawConfig(**options), batch_size, shown=False)}


@pytest.mark.parametrize("options", [{"sampler": "dpmpp_2m"}, {"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}, {"sampler": "unipc"}])
def test_an_image_does_not_depend_on_the_others(tiny_model, options):
    jobs = all_jobs(2)
    whole = draw(tiny_model, jobs, 1000, **options)
    assert len(whole) == 40 and len({image.tobytes() for image in whole.values()}) == 40
    for jobs_, batch_size in ((jobs, 1), (jobs, 7), (jobs[::-3], 5)):
        for name, image in draw(tiny_model, jobs_, batch_size, **options).items():
            assert np.abs(image.astype(int) - whole[name]).max() <= 1, name
    assert all((image == whole[name]).all() for name, image in draw(tiny_model, jobs, 1000, **options).items())  # twice the same
    assert any((image != whole[name]).any() for name, image in draw(tiny_model, jobs, 1000, **options, seed=1).items())


def test_the_bundled_model_is_independent_of_the_batch_too():
    model, diffusion = load_generator(CHECKPOINT, torch.device("cpu"), torch.float32)
    jobs = all_jobs(1)[::3]
    one, all_ = ({job.name: image.astype(int) for job, image in generate(model, diffusion, jobs, DrawConfig(), n, shown=False)} for n in (1, 50))
    assert max(np.abs(one[name] - all_[name]).max() for name in one) <= 1


def test_the_command_writes_the_graders_files(call, tiny_checkpoint, tmp_path):
    out = tmp_path / "a folder with spaces, Ünïcode"
    code, text, err = call(INFER, out, "--checkpoint", tiny_checkpoint, "--images-per-digit", 3, "--steps", 2)
    assert code == 0, err
    expected = {f"{domain}/{digit}_{index:03d}.png" for domain in ("mnistm", "svhn") for digit in range(10) for index in (1, 2, 3)}
    assert {str(path.relative_to(out)) for path in out.rglob("[!.]*.*")} == expected
    with Image.open(out / "svhn" / "7_002.png") as image:
        assert image.size == (28, 28) and image.mode == "RGB"
    assert "wrote 60 images" in text and "next: bash scripts/p1_grade.sh" in text
    # any subset gives the same files
    call(INFER, tmp_path / "b", "--checkpoint", tiny_checkpoint, "--images-per-digit", 2, "--steps", 2, "--domains", "svhn", "--digits", "7", "0")
    assert sorted(path.name for path in (tmp_path / "b").rglob("*.png")) == ["0_001.png", "0_002.png", "7_001.png", "7_002.png"]
    for path in (tmp_path / "b").rglob("*.png"):
        with Image.open(path) as ours, Image.open(out / "svhn" / path.name) as theirs:
            # bf16, where it is native, may round otherwise in another batch
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 6


@pytest.mark.parametrize("settings", [{}, {"eta": 0.5}, {"sampler": "ddim", "eta": 0.5, "spacing": "trailing"}, {"sampler": "heun"}, {"steps": 3}])
def test_a_record_is_drawn_again(tiny_checkpoint, settings):
    """Also one of before --eta was refused where it does nothing, and of when num_steps was called steps."""
    made = {"settings": asdict(DrawConfig(num_steps=3)) | {"dtype": "fp32"} | settings, "made_of": {"model": fingerprint(tiny_checkpoint)}}
    if "steps" in settings:
        del made["settings"]["num_steps"]
        settings = {}
    batch = {f"{job.name}.png": {} for job in all_jobs(1)[:2]}
    args = types.SimpleNamespace(picture="it", checkpoint=None, device=torch.device("cpu"))
    picture = redraw.draw(made, list(batch)[1], batch, {"checkpoint": tiny_checkpoint}, args)
    if settings.get("sampler") != "ddim":
        settings = settings | {"eta": 0.0}
    model, _ = load_generator(tiny_checkpoint, torch.device("cpu"), torch.float32)
    again = draw(model, all_jobs(1)[:2], 2, **asdict(DrawConfig(num_steps=3)) | settings)[all_jobs(1)[1].name]
    assert np.abs(picture.astype(int) - again).max() <= 1


@pytest.mark.parametrize("flags, message", [
    (["--checkpoint", "/nonexistent.safetensors"], "no such checkpoint: /nonexistent.safetensors"),
    (["--checkpoint", __file__], "is not a readable safetensors file"),
    (["--steps", "0"], "--steps must be between 1 and 1000"),
    (["--eta", "2"], "--eta must be between 0 and 1"),
    (["--eta", "0.5"], "--eta is for --sampler ddim, and dpmpp_2m does without; leave it out"),
    (["--guidance-parallel", "1", "1.5"], "--guidance-parallel must be 2 numbers from 0 to 1, for mnistm and svhn, not 1.0 1.5"),
    (["--guidance-interval", "0.9", "0.1"], "--guidance-interval must be two numbers"),
    (["--images-per-digit", "0"], "--images-per-digit must be between 1 and 999"),
    (["--batch-size", "-1"], "--batch-size must be at least 1"),
    (["--device", "abacus"], "abacus"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(call, tmp_path, flags, message):
    code, _, err = call(INFER, tmp_path / "out", *flags)
    assert code != 0 and err.startswith("error: ") and message in err and err.strip().count("\n") == 0
    assert not list(tmp_path.rglob("*.png"))


def test_an_unwritable_folder_ends_in_one_line(call, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(INFER, tmp_path / "file" / "out")
    assert code != 0 and err.startswith("error: cannot write into folder") and err.strip().count("\n") == 0
