"""Bad calls of P1's commands, files that are none, and runs that are killed or crowded: one line, or whole files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from p1_cfg_ddpm import device, inference
from p1_cfg_ddpm.classifier import CourseClassifier, load_classifier
from p1_cfg_ddpm.data import MINI_DATA, load_digits, read_image
from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import UserError, fingerprint
from p1_cfg_ddpm.inference import CHECKPOINT, DrawConfig, all_jobs, generate, load_generator
from p1_cfg_ddpm.model import DOMAINS, load_model
from p1_cfg_ddpm.state import load_state

from .tools import check_crowded_and_killed, quick

DRAW = ["--images-per-digit=3", "--digits", "3", "--steps=2", "--dtype=fp32", "--batch-size=1"]
TRAIN = ["--size=tiny", "--steps=1", "--batch-size=2", "--device=cpu"]


@pytest.fixture
def places(tmp_path):
    """A file, an empty folder, one with a picture of each of two digits, and JSONs that are no benchmark's."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    for domain in DOMAINS:
        (tmp_path / "drawn" / domain).mkdir(parents=True)
        for digit in (3, 4):
            Image.new("RGB", (28, 28), "red").save(tmp_path / "drawn" / domain / f"{digit}_001.png")
    (tmp_path / "rows.json").write_text('{"guidance": [], "ladder": []}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    return tmp_path


@pytest.mark.parametrize("module, arguments, said", [
    ("inference", ["{t}/out", "--guidance-weight=nan"], "--guidance-weight must be a finite number, not nan"),
    ("inference", ["{t}/out", "--guidance-interval", "nan", "1"], "--guidance-interval must be two numbers"),
    ("inference", ["{t}/out", "--eta=nan"], "--eta must be between 0 and 1, not nan"),
    ("inference", ["{t}/out", "--batch-size=0"], "--batch-size must be at least 1, not 0"),
    ("inference", ["{t}/out", "--device=meta"], "the device 'meta' cannot be used"),
    ("inference", ["{t}/out", "--device=hpu"], "the device 'hpu' cannot be used"),
    ("inference", ["/proc/out"], "cannot write into folder /proc/out/mnistm"),
    ("inference", ["{t}/out", "--checkpoint={t}"], "cannot read the checkpoint {t}: it is a folder"),
    ("evaluate", ["/"], "/mnistm does not exist"),
    ("evaluate", ["{t}/file"], "{t}/file/mnistm does not exist"),
    ("evaluate", ["{t}/drawn", "--report={t}/file"], "cannot write into folder {t}/file"),
    ("evaluate", ["{t}/drawn", "--classifier-svhn={t}/file"], "{t}/file cannot be read as a classifier"),
    ("evaluate", ["{t}/drawn", "--data={t}/empty"], "cannot read {t}/empty/mnistm/train.csv"),
    ("figures", ["--output={t}/file"], "cannot write into folder {t}/file"),
    ("figures", ["--output={t}/out", "--results={t}/file"], "{t}/file is not what scripts/p1_benchmark.sh writes"),
    ("figures", ["--output={t}/out", "--results={t}/rows.json"], "{t}/rows.json is not what scripts/p1_benchmark.sh writes (IndexError"),
    ("figures", ["--output={t}/out", "--results={t}/deep.json"], "{t}/deep.json is not what scripts/p1_benchmark.sh writes (RecursionError"),
    ("figures", ["--output={t}/out", "--results={t}/no", "--checkpoint={t}/file"], "{t}/file is not a readable safetensors file"),
    ("benchmark", ["--sweep-images-per-digit=1"], "--sweep-images-per-digit must be at least 2, not 1"),
    ("benchmark", ["--output={t}"], "cannot write the file {t}: it is a folder"),
    ("benchmark", ["--output={t}/file/x.json"], "cannot write into folder {t}/file"),
    ("benchmark", ["--output={t}/b.json", "--batch-size=0"], "--batch-size must be at least 1, not 0"),
    ("benchmark", ["--output={t}/b.json", "--sweep-images-per-digit=0"], "--sweep-images-per-digit must be at least 2, not 0"),
    ("benchmark", ["--output={t}/b.json", "--classic-images-per-digit=-1"], "--classic-images-per-digit must be at least 0, not -1"),
    ("benchmark", ["--output={t}/b.json", "--checkpoint={t}/no"], "no such checkpoint: {t}/no"),
    ("train", ["--lr=-1"], "--lr must be a number from 0, not -1.0"),
    ("train", ["--lr=nan"], "--lr must be a number from 0, not nan"),
    ("train", ["--weight-decay=-1"], "--weight-decay must be a number from 0, not -1.0"),
    ("train", ["--warmup=-1"], "--warmup must be a number from 0, not -1"),
    ("train", ["--sample-every=-1"], "--sample-every must be a number from 0, not -1"),
    ("train", ["--min-snr-gamma=-1"], "--min-snr-gamma must be a number above 0, not -1.0"),
    ("train", [f"--seed={10**30}"], "--seed must be a whole number of at most 12 digits"),
    ("train", ["--ema=nan"], "--ema must be between 0.001 and 0.25, not [nan]"),
    ("train", ["--device=cpu", "--dtype=fp16"], "--dtype fp16 trains on a GPU only"),
    ("train", ["--batch-size=1000000000"], "--batch-size must be at most 1,000,000, not 1,000,000,000"),
    ("train", ["--min-snr-gamma=inf"], "--min-snr-gamma must be a number above 0, not inf"),
    ("classifier", ["--domain=svhn", "--data={t}/empty", "--epochs=0"], "--epochs must be at least 1, not 0"),
    ("classifier", ["--domain=svhn", "--data={t}/empty", "--batch-size=-1"], "--batch-size must be at least 1, not -1"),
    ("classifier", ["--domain=svhn", "--data={t}/empty", "--lr=nan"], "--lr must be a number from 0, not nan"),
    ("classifier", ["--domain=svhn", "--data={t}/empty", "--output={t}"], "cannot write the file {t}: it is a folder"),
    ("classifier", ["--domain=svhn", "--data={t}/empty", "--output={t}/c"], "cannot read {t}/empty/svhn/train.csv"),
    ("quality", ["--data={t}/empty", "--output={t}"], "cannot write the file {t}: it is a folder"),
    ("quality", [f"--data={MINI_DATA}", "--output={t}/r"], "mnistm has 50 validation images; more than 50 of each digit are needed"),
    ("make_mini", ["--output={t}/out", "--seed=-1"], "--seed must be at least 0, not -1"),
    ("make_mini", ["--output={t}/out", "--train=0"], "--train must be at least 1, not 0"),
    ("make_mini", ["--output={t}/file"], "cannot write into folder {t}/file"),
])
def test_bad_calls_end_in_one_line(call, places, module, arguments, said):
    fixed = [*TRAIN, f"--output={places / 'run'}"] if module == "train" else []
    code, _, err = call(module, *fixed, *(argument.format(t=places) for argument in arguments))
    lines = err.strip().splitlines()
    assert code == 1 and lines[-1].startswith("error: ") and said.format(t=places) in lines[-1], err
    assert len(lines) == 1 or module == "train"
    assert not list(places.glob("out/**/*.png")) and not list(places.glob("run/*"))


def test_images_that_are_not_finite_are_refused(call, tmp_path):
    code, _, err = call("inference", tmp_path / "out", *DRAW, "--guidance-weight=1e39")
    assert code == 1 and err.strip().splitlines()[-1].startswith("error: an image among mnistm/3_001 to mnistm/3_001 is not finite; try --dtype fp32 or"), err
    assert not list(tmp_path.glob("out/**/*.png"))


def test_a_batch_that_a_gpu_has_no_memory_for_is_halved(monkeypatch):
    """The images do not depend on it."""
    model, diffusion = load_generator(CHECKPOINT, torch.device("cpu"), torch.float32)
    jobs, config = all_jobs(2, ("svhn",), (3, 8)), DrawConfig(num_steps=2)
    whole = [image for _, image in generate(model, diffusion, jobs, config, 4, shown=False)]
    sizes, states = [], inference.states

    def short_of_memory(model, diffusion, batch, *others):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.cuda.OutOfMemoryError
        return states(model, diffusion, batch, *others)

    monkeypatch.setattr(inference, "states", short_of_memory)
    monkeypatch.setattr(device, "FITTED", {})
    halved = list(generate(model, diffusion, jobs, config, 4, shown=False))
    assert sizes == [4, 2, 1, 1, 1, 1] and [job for job, _ in halved] == jobs
    assert max(abs(a.astype(int) - b).max() for a, (_, b) in zip(whole, halved)) <= 1
    monkeypatch.setattr(inference, "states", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
    with pytest.raises(UserError, match="not enough memory for even one image"):
        list(generate(model, diffusion, jobs, config, 4, shown=False))


def test_a_folder_with_one_picture_of_each_domain_is_graded(call, places):
    """One picture has no covariance and no diversity."""
    for domain in DOMAINS:
        (places / "drawn" / domain / "4_001.png").unlink()
    code, out, err = call("evaluate", places / "drawn", "--data", places / "no", "--report", places / "grade")
    assert code == 0 and out.count(" nan ") >= 4, err
    assert json.loads((places / "grade" / "grade.json").read_text())["svhn"]["images"] == 1


@pytest.mark.parametrize("name", ["a\0b.png", '"a\nb.png"', "x" * 300, "../../no.png"])
def test_names_that_no_file_has_are_refused(tmp_path, name):
    for domain in DOMAINS:
        (tmp_path / domain / "data").mkdir(parents=True)
        (tmp_path / domain / "train.csv").write_text(f"image_name,label\n{name},1\n")
    with pytest.raises(UserError, match=r"train\.csv (names .* does not exist|line 2: expected an image name|is not a CSV file)") as error:
        load_digits(tmp_path, "train")
    assert "\n" not in str(error.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([10**9, 10**30, 16, 32]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2), max_leaves=5)
UNET = {"patch_size": 2, "widths": [16, 32], "num_blocks": 1, "attention_levels": [], "dropout": 0.0}
DIFFUSION = {"schedule": "cosine", "prediction": "v", "num_timesteps": 1000}


@quick
@given(unet=st.dictionaries(st.sampled_from(list(UNET)), JSON, max_size=2),
       diffusion=st.dictionaries(st.sampled_from(list(DIFFUSION)), JSON, max_size=1), anything=st.none() | JSON)
def test_any_settings_in_a_checkpoint_are_taken_or_refused(tmp_path, tiny_model, unet, diffusion, anything):
    """Without building what they ask for: a network of 10^9 blocks would never end."""
    content = {"unet": UNET | unet, "diffusion": DIFFUSION | diffusion} if anything is None else anything
    save_file(tiny_model.state_dict(), tmp_path / "a.safetensors", {"config": json.dumps(content)})
    try:
        model, _ = load_generator(tmp_path / "a.safetensors", "cpu", torch.float32)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tiny_model.state_dict().items())
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("settings_", ['{"unet"', "[" * 100_000, json.dumps({"unet": UNET | {"num_blocks": 10**9}, "diffusion": DIFFUSION}),
                                       json.dumps({"unet": UNET | {"widths": [10**5, 10**5]}, "diffusion": DIFFUSION}),
                                       json.dumps({"unet": UNET, "diffusion": DIFFUSION | {"num_timesteps": 10**12}})])
def test_settings_that_would_never_end_or_fit_are_refused_at_once(tmp_path, tiny_model, settings_):
    save_file(tiny_model.state_dict(), tmp_path / "a.safetensors", {"config": settings_})
    with pytest.raises(UserError, match=r"a\.safetensors"):
        load_generator(tmp_path / "a.safetensors", "cpu", torch.float32)


@pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: t.to("meta")])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_of_another_kind_are_refused(tmp_path, change):
    torch.save({"state_dict": {name: change(tensor) for name, tensor in CourseClassifier().state_dict().items()}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds conv1.weight as a tensor that is not dense"):
        load_classifier(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [3, {}, {"settings": None}, {"settings": [1]}, {"settings": {"lr": 1}}])
def test_a_state_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt (is not a training state|belongs to a run with other settings)"):
        load_state(tmp_path / "state.pt", {"lr": 2})


@pytest.mark.parametrize("error", [RuntimeError, OverflowError, NotImplementedError, KeyError])
def test_whatever_a_decoder_raises_names_the_picture(tmp_path, monkeypatch, error):
    """As those of damaged AVIF, Spider and DDS do, which a file called .png may hold."""
    def fail(*_, **__):
        raise error("damaged")

    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match=r"cannot read the picture .*a\.png"):
        read_image(tmp_path / "a.png")


def test_a_training_that_diverges_keeps_its_last_state_and_goes_on_from_it(call, tmp_path, monkeypatch):
    """Every loss after the first saved state is not finite, between two lines of the log; then it is cured; then the pictures are others."""
    rng, loss, run = np.random.default_rng(0), Diffusion.loss, tmp_path / "run"
    for domain in ("mnistm", "svhn"):
        (tmp_path / "digits" / domain / "data").mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(tmp_path / "digits" / domain / "data" / f"{i}.png")
        for split in ("train", "val"):
            (tmp_path / "digits" / domain / f"{split}.csv").write_text("image_name,label\n" + "".join(f"{i}.png,{i}\n" for i in range(8)))
    arguments = ["--data", tmp_path / "digits", "--output", run, "--size=tiny", "--batch-size=4", "--steps=6", "--save-every=2", "--sample-every=0",
                 "--validate-every=0", "--dtype=fp32", "--device=cpu"]

    def diverging(*args, **options):
        return loss(*args, **options) * (float("nan") if (run / "state.pt").exists() else 1)

    monkeypatch.setattr(Diffusion, "loss", diverging)
    for _ in range(2):
        code, _, err = call("train", *arguments)
        assert code == 1 and "the loss or the weights are not finite at step 4" in err.splitlines()[-1], err
        assert torch.load(run / "state.pt", weights_only=True)["step"] == 2 and load_model(run / "model.safetensors")[1]["training"]["steps"] == 2
    monkeypatch.setattr(Diffusion, "loss", loss)
    code, _, err = call("train", *arguments, "--warmup=7")
    assert code == 1 and "belongs to a run with other settings (warmup" in err
    code, _, err = call("train", *arguments)
    assert code == 0 and torch.load(run / "state.pt", weights_only=True)["step"] == 6, err
    Image.new("RGB", (28, 28), "red").save(tmp_path / "digits" / "svhn" / "data" / "3.png")
    code, _, err = call("train", *arguments, "--steps=8")
    assert code == 1 and "belongs to a run with other settings (pictures" in err and torch.load(run / "state.pt", weights_only=True)["step"] == 6


def test_crowded_and_killed_runs_leave_the_pictures_of_one_run(call, command, one_thread, tiny_checkpoint, tmp_path):
    check_crowded_and_killed(lambda output: [output, "--checkpoint", tiny_checkpoint, *DRAW], tmp_path, call, command, count=6, killed_at=4)


def test_charts_are_of_the_network_that_draws(call, tiny_checkpoint, tmp_path):
    """Results that do not tell their network are of the bundled one."""
    for name, told in (("old", {}), ("own", {"made_of": {"model": fingerprint(tiny_checkpoint)}})):
        (tmp_path / "results.json").write_text(json.dumps(told))
        code, _, err = call("p1_cfg_ddpm.figures", "--output", tmp_path / name, "--results", tmp_path / "results.json", "--pareto", tmp_path / "none",
                            "--checkpoint", tiny_checkpoint, "--steps", 2)
        if name == "old":
            assert code == 0 and "results.json is of another network than" in err and len(list((tmp_path / name).glob("*.png"))) == 6
        else:
            assert code == 1 and "is not what scripts/p1_benchmark.sh writes" in err  # it is read
