"""Bad calls of P2's commands, files that are none, and runs that are killed or crowded: one line, or whole files."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from p2_ddim import diffusion, figures
from p2_ddim.data import read_faces, read_noise, read_noises
from p2_ddim.evaluate import read_pairs
from p2_ddim.files import UserError
from p2_ddim.model import UNet, UNetConfig, load_unet
from p2_ddim.pictures import read_picture
from p2_ddim.state import load_state

from .tools import check_crowded_and_killed, quick


@pytest.fixture
def places(tmp_path):
    """A file, an empty folder, a checkpoint, folders of four noises, of one without pixels, and of a picture."""
    torch.manual_seed(0)
    (tmp_path / "file").write_text("no folder")
    for name in ("empty", "noise", "nothing", "pictures"):
        (tmp_path / name).mkdir()
    for i in range(4):
        torch.save(torch.randn(1, 3, 16, 16), tmp_path / "noise" / f"{i:02d}.pt")
    torch.save(torch.zeros(1, 3, 0, 0), tmp_path / "nothing" / "00.pt")
    torch.save(UNet(UNetConfig((32, 32), (), 1)).state_dict(), tmp_path / "UNet.pt")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "pictures" / "a.png")
    return tmp_path


ARGUMENTS = {  # what each command is called with before the bad argument, where that does not stand in a place of its own
    "inference": ["{t}/noise", "{t}/out", "{t}/UNet.pt"], "evaluate": [],
    "figures": ["--noise={t}/noise", "--checkpoint={t}/UNet.pt", "--output={t}/out", "--results={t}/out/r.json", "--steps=2"],
    "benchmark": ["--output={t}/b.json"],
    "train": ["--data={t}/pictures", "--image-size=16", "--widths", "32", "32", "--attention", "1", "--steps=1", "--batch-size=2", "--output={t}/run"],
}


def test_a_training_that_diverges_keeps_its_last_state_and_goes_on_from_it(call, tmp_path, monkeypatch):
    """Every loss after the first saved state is not finite, between two lines of the log; then it is cured; then the pictures are others."""
    rng, loss, run = np.random.default_rng(0), diffusion.loss, tmp_path / "run"
    (tmp_path / "faces").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "faces" / f"{i}.png")
    arguments = ["--data", tmp_path / "faces", "--output", run, "--image-size=16", "--widths=32", "--attention=0", "--batch-size=4", "--steps=6",
                 "--save-every=2", "--sample-every=0", "--validate-every=0", "--dtype=fp32", "--device=cpu"]
    monkeypatch.setattr(diffusion, "loss", lambda *args: loss(*args) * (float("nan") if (run / "state.pt").exists() else 1))
    for _ in range(2):
        code, _, err = call("train", *arguments)
        assert code == 1 and "the loss or the weights are not finite at step 4" in err.splitlines()[-1], err
        assert torch.load(run / "state.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(diffusion, "loss", loss)
    code, _, err = call("train", *arguments, "--warmup=7")
    assert code == 1 and "belongs to a run with other settings (warmup" in err
    code, _, err = call("train", *arguments)
    assert code == 0 and torch.load(run / "state.pt", weights_only=True)["step"] == 6, err
    Image.new("RGB", (16, 16), "red").save(tmp_path / "faces" / "3.png")
    code, _, err = call("train", *arguments, "--steps=8")
    assert code == 1 and "belongs to a run with other settings (pictures" in err and torch.load(run / "state.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize("arguments, where", [(["--output={t}/new"], "new"), (["--output={t}/report/figures/"], "report/results"),
                                              (["--output={t}/new", "--results={t}/own/r.json"], "own")])
def test_figures_elsewhere_leave_the_reports_numbers_alone(call, places, monkeypatch, arguments, where):
    """The numbers lie beside the figures, in the report's results only for the report's figures."""
    def stop(*_):
        raise figures.UserError("stop here")

    written = []
    monkeypatch.setattr(figures, "ROOT", places)
    monkeypatch.setattr(figures, "RESULTS", places / "report" / "results")
    monkeypatch.setattr(figures, "writable_file", written.append)
    monkeypatch.setattr(figures, "load_unet", stop)
    code, _, err = call("figures", *(a.format(t=places) for a in ["--noise={t}/noise", "--checkpoint={t}/UNet.pt", *arguments]))
    assert code == 1 and "stop here" in err and written == [places / where / ("r.json" if where == "own" else "p2_figures.json")], err


@pytest.mark.parametrize("module, arguments, said", [
    ("inference", ["--eta=nan"], "--eta must be between 0 and 1, not nan"),
    ("inference", ["--batch-size=0"], "--batch-size must be at least 1, not 0"),
    ("inference", ["--device=meta"], "the device 'meta' cannot be used"),
    ("evaluate", ["{t}/file", "{t}/pictures"], "no such folder: {t}/file"),
    ("evaluate", ["{t}/empty", "{t}/pictures"], "{t}/empty/a.png is missing"),
    ("evaluate", ["/", "{t}/pictures"], "/a.png is missing"),
    ("evaluate", ["{t}/pictures", "{t}/pictures", "--report={t}/file"], "cannot write into folder {t}/file"),
    ("figures", ["--iterations=0"], "--iterations must be at least 1, not 0"),
    ("figures", ["--noise={t}/nothing"], "{t}/nothing has 1 noises; the figures need four"),
    ("figures", ["--round-trips", "0", "9"], "--round-trips must be between 1 and 1000, not [0, 9]"),
    ("inference", ["--sampler=dpmpp_2m", "--spacing=logsnr", "--steps=900"], "error: --steps 900 do not fit between the noise levels"),
    ("train", ["--stop-when-flat=1", "--validate-every=0"], "--stop-when-flat goes by validations; give it a --validate-every above 0"),
    ("figures", ["--results={t}"], "cannot write the file {t}: it is a folder"),
    ("figures", ["--output={t}/file"], "cannot write into folder {t}/file"),
    ("figures", ["--checkpoint={t}/file"], "{t}/file cannot be read as a UNet checkpoint"),
    ("benchmark", ["--batch-size=0"], "--batch-size must be at least 1, not 0"),
    ("benchmark", ["--repeats=0"], "--repeats must be at least 1, not 0"),
    ("benchmark", ["--side=100"], "needs sides that are multiples of 32"),
    ("benchmark", ["--output={t}"], "cannot write the file {t}: it is a folder"),
    ("benchmark", ["--output={t}/file/x.json"], "cannot write into folder {t}/file"),
    ("train", ["--lr=-1"], "--lr must be a number from 0, not -1.0"),
    ("train", ["--weight-decay=nan"], "--weight-decay must be a number from 0, not nan"),
    ("train", ["--sample-every=-1"], "--sample-every must be a number from 0, not -1"),
    ("train", ["--max-weight=nan"], "--max-weight must be at least 1, not nan"),
    ("train", ["--attention", "9"], "--attention must be levels from 0 to 1"),
    ("train", [f"--seed={10**30}"], "--seed must be a whole number of at most 12 digits"),
    ("train", ["--device=cpu", "--dtype=fp16"], "--dtype fp16 trains on a GPU only"),
    ("train", ["--batch-size=1000000000", "--device=cpu", "--dtype=fp32"], "--batch-size must be at most 1,000,000, not 1,000,000,000"),
    ("train", ["--data={t}/file", "--device=cpu", "--dtype=fp32"], "no such folder of pictures: {t}/file"),
])
def test_bad_calls_end_in_one_line(call, places, module, arguments, said):
    code, _, err = call(module, *(argument.format(t=places) for argument in ARGUMENTS[module] + arguments))
    assert code == 1 and err.startswith("error: ") and err.strip().count("\n") == 0 and said.format(t=places) in err, err
    assert not list(places.glob("out/*")) and not list(places.glob("run/*"))


def test_a_noise_without_pixels_is_refused(call, places):
    code, _, err = call("inference", places / "nothing", places / "out", places / "UNet.pt")
    assert code == 1 and err == "error: 0x0 is no size for this network: it needs sides that are multiples of 2\n"


@pytest.mark.parametrize("tensor", [torch.zeros(1, 3, 8, 8).to_sparse(), torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1).expand(1, 3, 10**6, 10**6)])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_noises_of_another_kind_are_refused(tmp_path, tensor):
    """Also one number that says it were 10^12."""
    torch.save(tensor, tmp_path / "00.pt")
    with pytest.raises(UserError, match=r"00\.pt holds"):
        read_noise(tmp_path / "00.pt")


def test_noises_in_any_number_format_are_read(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64):
        torch.save(torch.full((3, 8, 8), 1.5).to(dtype), tmp_path / "00.pt")
        assert read_noise(tmp_path / "00.pt").eq(1.5).all() and read_noise(tmp_path / "00.pt").dtype == torch.float32


@pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: [t]])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_weights_of_another_kind_are_refused(tmp_path, change):
    torch.save({name: change(tensor) for name, tensor in UNet(UNetConfig((32,), (), 1)).state_dict().items()}, tmp_path / "UNet.pt")
    with pytest.raises(UserError, match=r"(holds .* as a tensor that is not dense|holds no tensors by name)"):
        load_unet(tmp_path / "UNet.pt")


@pytest.mark.parametrize("content", [3, {}, {"settings": None}, {"settings": [1]}, {"settings": {"lr": 1}}])
def test_a_state_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt (is not a training state|belongs to a run with other settings)"):
        load_state(tmp_path / "state.pt", {"lr": 2})


@settings(quick, max_examples=60)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), length=st.integers(0, 3000),
       changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=5))
def test_damaged_pictures_are_read_or_named(tmp_path, kind, length, changes):
    Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)).save(tmp_path / "whole", kind)
    content = bytearray((tmp_path / "whole").read_bytes()[:length])
    for position, value in changes:
        if content:
            content[position % len(content)] = value
    (tmp_path / "damaged").mkdir(exist_ok=True)
    (tmp_path / "damaged" / "a.png").write_bytes(content)
    for read in (lambda: read_picture(tmp_path / "damaged" / "a.png"), lambda: read_faces(tmp_path / "damaged", 8)[0]):
        try:
            assert np.asarray(read()).shape[2] == 3
        except UserError as error:
            assert "a.png" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("error", [RuntimeError, OverflowError, NotImplementedError])
def test_whatever_a_decoder_raises_names_the_picture(places, monkeypatch, error):
    """As those of damaged AVIF, Spider and DDS do, which a file called .png may hold."""
    def fail(*_, **__):
        raise error("damaged")

    monkeypatch.setattr(Image.Image, "convert", fail)
    for read in (lambda: read_picture(places / "pictures" / "a.png"), lambda: read_faces(places / "pictures", 8)):
        with pytest.raises(UserError, match=r"cannot read the picture .*a\.png"):
            read()


def test_crowded_and_killed_runs_leave_the_pictures_of_one_run(call, command, one_thread, places):
    def arguments(output):
        return [places / "noise", output, places / "UNet.pt", "--steps=2", "--batch-size=1"]

    check_crowded_and_killed(arguments, places, call, command, count=4, killed_at=3)


def test_half_written_files_of_a_killed_run_are_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "00.png")
    torch.save(torch.zeros(1, 3, 8, 8), tmp_path / "00.pt")
    for name in (".01.png.partx.png", ".01.pt.partx.pt"):
        (tmp_path / name).write_bytes(b"half")
    assert list(read_noises(tmp_path)) == ["00"] and list(read_pairs(tmp_path, tmp_path)[0]) == ["00.png"] and len(read_faces(tmp_path, 8)) == 1
