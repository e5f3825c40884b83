"""Results know what made them: pictures of two makings are never mixed nor graded as something else, each can be drawn again, and no run writes over what is
not its own."""

import importlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import MINI, ROOT, lock
from p1_cfg_ddpm.model import SIZES, save_model
from p1_cfg_ddpm.model import UNet as DigitUNet
from p1_cfg_ddpm.provenance import report_file
from p2_ddim.model import UNet, UNetConfig
from p3_clip_textual_inversion.embedding import save_embedding
from p3_clip_textual_inversion.tests.conftest import tiny_clip, tiny_sd  # noqa: F401

P1, P2, P3 = "p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion"
ERRORS = "is not overwritten|choose another"


@dataclass
class Problem:
    """draw, grade: arguments with OUT for the folder; names: of its pictures."""
    package: str
    draw: list
    grade: list
    names: list


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command in this process; returns (exit code, stdout, stderr)."""
    def run(package, module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        AcceleratorState._reset_state(True)
        code = 0
        try:
            importlib.import_module(f"{package}.files").run(importlib.import_module(f"{package}.{module}").main)
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
            print(stopped.code, file=sys.stderr)
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def places(tmp_path, tiny_sd):  # noqa: F811
    """What is drawn from and learned from, untrained and tiny: {problem: `Problem`}, made once a test."""
    torch.manual_seed(0)
    save_model(tmp_path / "tiny.safetensors", DigitUNet(SIZES["tiny"]), Diffusion())
    for name in ("noise", "references", "concepts/0", "words", "digits"):
        (tmp_path / name).mkdir(parents=True)
    torch.save(UNet(UNetConfig((32,), (), 1)).state_dict(), tmp_path / "UNet.pt")
    for i in range(2):
        torch.save(torch.randn(1, 3, 16, 16), tmp_path / "noise" / f"0{i}.pt")
        Image.new("RGB", (16, 16), "red").save(tmp_path / "references" / f"0{i}.png")
        Image.effect_noise((70, 70), 50).convert("RGB").save(tmp_path / "concepts" / "0" / f"{i}.png")
    (tmp_path / "concepts" / "input.json").write_text(json.dumps({"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1>"]}}))
    save_embedding(tmp_path / "words" / "new1.safetensors", "<new1>", torch.ones(1, 32))
    return {
        P1: Problem(P1, ["OUT", "--checkpoint", tmp_path / "tiny.safetensors", "--images-per-digit=1", "--digits", 3, 4, "--steps=2"],
                    ["OUT", "--report", tmp_path / "grade", "--data", tmp_path / "no"],
                    [f"{domain}/{digit}_001.png" for domain in ("mnistm", "svhn") for digit in (3, 4)]),
        P2: Problem(P2, [tmp_path / "noise", "OUT", tmp_path / "UNet.pt", "--steps=2"], ["OUT", tmp_path / "references", "--report", tmp_path / "grade"],
                    ["00.png", "01.png"]),
        P3: Problem(P3, [tmp_path / "concepts" / "input.json", "OUT", tiny_sd, "--embeddings", tmp_path / "words", "--num-images=2", "--steps=1"],
                    ["OUT", tmp_path / "concepts" / "input.json", "--num-images=2", "--report", tmp_path / "grade", "--model", MINI / "clip"],
                    [f"0/0/source0_prompt0_{i}.png" for i in range(2)])}


def contents(folder, names):
    return [(folder / name).read_bytes() for name in names]


@pytest.mark.parametrize("package", [P1, P2, P3])
def test_results_of_two_makings_are_not_mixed(call, places, tmp_path, package):
    problem, out, other = places[package], tmp_path / "out", tmp_path / "other"

    def draw(folder, *flags, seed=0):
        return call(package, "inference", *(folder if part == "OUT" else part for part in problem.draw), "--seed", seed, *flags)

    def graded(said):
        code, _, err = call(package, "evaluate", *(out if part == "OUT" else part for part in problem.grade))
        assert code == 1 and err.startswith("error: ") and said in err and err.count("\n") == 1, err
        assert not (tmp_path / "grade" / "grade.json").exists()

    for folder, seed in ((out, 0), (other, 1)):
        code, _, err = draw(folder, seed=seed)
        assert code == 0, err
    first, second = contents(out, problem.names), contents(other, problem.names)
    assert draw(out)[0] == 0 and contents(out, problem.names) == first

    code, _, err = draw(out, seed=1)
    assert code == 1 and "was made otherwise (settings seed 0 is now 1); choose another folder, or --overwrite" in err and contents(out, problem.names) == first

    one = out / problem.names[1]
    one.write_bytes(b"")  # a disk that was full
    assert draw(out)[0] == 0 and contents(out, problem.names) == first

    with Image.open(one) as image:
        Image.new("RGB", image.size, "red").save(one)
    theirs = one.read_bytes()
    for flags in ((), ("--overwrite",)):
        code, _, err = draw(out, *flags)
        assert code == 1 and f"{one} was not drawn by this project" in err and one.read_bytes() == theirs
    graded("was made otherwise than the rest (by another program)")

    one.write_bytes((other / problem.names[1]).read_bytes())
    graded("was made otherwise than the rest (settings seed 0 is now 1)")
    one.unlink()
    if package == P3:  # the course's grader insists on their number
        graded("is missing")
    else:
        code, _, err = call(package, "evaluate", *(out if part == "OUT" else part for part in problem.grade))
        assert code == 0 and "pictures that its run was to draw" in err, err
        assert json.loads((tmp_path / "grade" / "grade.json").read_text())["made"]["settings"]["seed"] == 0

    code, _, err = draw(out, "--overwrite", seed=1)
    assert code == 0 and contents(out, problem.names) == second, err


def test_what_overwriting_would_remove_is_told(call, places, tmp_path):
    """One domain drawn beside another of other settings: the first would be mixed with it, and goes."""
    out, (folder, *draw) = tmp_path / "out", places[P1].draw
    assert folder == "OUT" and call(P1, "inference", out, *draw, "--domains", "mnistm")[0] == 0
    code, _, err = call(P1, "inference", out, *draw, "--domains", "svhn", "--seed", 1)
    assert code == 1 and "--overwrite to draw it anew, which removes 2 that are not drawn now" in err and len(list(out.rglob("*.png"))) == 2, err
    assert call(P1, "inference", out, *draw, "--domains", "svhn", "--seed", 1, "--overwrite")[0] == 0 and not list(out.glob("mnistm/*.png"))


@pytest.mark.parametrize("package", [P1, P2])
def test_another_programs_pictures_where_ours_were_are_graded(call, places, tmp_path, package):
    problem, out = places[package], tmp_path / "out"
    assert call(package, "inference", *(out if part == "OUT" else part for part in problem.draw))[0] == 0
    for name in problem.names:
        with Image.open(out / name) as image:
            pixels = image.convert("RGB")
        pixels.save(out / name)
    code, _, err = call(package, "evaluate", *(out if part == "OUT" else part for part in problem.grade))
    assert code == 0 and "tells of pictures that are not there any more: these are another program's" in err, err
    assert json.loads((tmp_path / "grade" / "grade.json").read_text())["made"] is None


def test_problems_and_folders_within_do_not_stand_in_each_others_way(call, places, tmp_path):
    """One OUT for all three, and one for P1 in it: nothing is refused, nor removed by --overwrite, and each problem knows its own."""
    out = tmp_path / "out"

    def draw(package, folder, *flags):
        code, _, err = call(package, "inference", *(folder if part == "OUT" else part for part in places[package].draw), *flags)
        assert code == 0, err

    def others():
        return {path: path.read_bytes() for path in out.rglob("*.png") if path.relative_to(out).as_posix() not in places[P1].names}

    for package, folder in ((P1, out), (P1, out / "within"), (P2, out), (P3, out)):
        draw(package, folder)
    before = others()
    assert len(before) == sum(len(problem.names) for problem in places.values())
    draw(P1, out, "--overwrite", "--seed", 1)
    assert others() == before
    for package, problem in places.items():
        made = importlib.import_module(f"{package}.provenance").check_made(out, [out / name for name in problem.names])
        assert made["program"] == f"{package}.inference" and made["settings"]["seed"] == (package == P1)


@pytest.mark.parametrize("package", [P1, P2, P3])
def test_a_picture_is_drawn_again_byte_for_byte(call, places, tmp_path, package):
    """In the batch that it was drawn in; and over no file of the user's."""
    problem, again = places[package], tmp_path / "again.png"
    assert call(package, "inference", *(tmp_path / "out" if part == "OUT" else part for part in problem.draw))[0] == 0
    picture = tmp_path / "out" / problem.names[1]
    code, out, err = call(package, "redraw", picture, "--output", again)
    assert code == 0 and "byte for byte" in out and again.read_bytes() == picture.read_bytes(), out + err
    provenance = importlib.import_module(f"{package}.provenance")
    (tmp_path / "out" / provenance.RECORD).rename(tmp_path / "out" / provenance.BEFORE)  # as folders of before have it
    code, out, err = call(package, "redraw", picture, "--output", again)
    assert code == 0 and "byte for byte" in out and again.read_bytes() == picture.read_bytes(), out + err

    def batches(*flags):
        assert call(package, "inference", *(tmp_path / "out" if part == "OUT" else part for part in problem.draw), *flags)[0] == 0
        return json.loads((tmp_path / "out" / importlib.import_module(f"{package}.provenance").RECORD).read_text())["batches"]

    picture.unlink()
    assert batches() == [problem.names] and picture.read_bytes() == again.read_bytes()
    assert batches("--batch-size=1") == [problem.names, *([name] for name in problem.names if package != P3)]  # which leaves what is there
    again.write_text("the user's")
    code, _, err = call(package, "redraw", picture, "--output", again)
    assert code == 1 and "was not drawn by this project, and is not overwritten" in err and again.read_text() == "the user's"
    if package == P3:  # away from its folder, whose record tells where the words are
        alone = tmp_path / "alone.png"
        alone.write_bytes(picture.read_bytes())
        code, out, err = call(package, "redraw", alone, "--output", tmp_path / "third.png")
        assert code == 1 and "give it by --checkpoint" in err, out + err
    if package == P2:  # the noises moved
        (tmp_path / "noise").rename(tmp_path / "moved")
        code, _, err = call(package, "redraw", picture, "--output", tmp_path / "third.png")
        assert code == 1 and "no such folder of noises" in err
        code, _, err = call(package, "redraw", picture, "--output", tmp_path / "third.png", "--noises", tmp_path / "moved")
        assert code == 0, err
    code, _, err = call(package, "redraw", picture, "--output", picture)
    assert code == 1 and "is the picture itself" in err
    Image.new("RGB", (28, 28)).save(again)
    code, _, err = call(package, "redraw", again)
    assert code == 1 and "does not tell how it was made" in err


@pytest.mark.parametrize("package", [P1, P2])
def test_a_picture_of_the_bundled_network_is_drawn_again_wherever_that_lay(call, places, tmp_path, package):
    """A checkout that was moved: its record has the path of before."""
    bundled = importlib.import_module(f"{P1}.inference").CHECKPOINT if package == P1 else MINI / "face" / "UNet.pt"
    moved = tmp_path / bundled.name
    moved.write_bytes(bundled.read_bytes())
    p1, p2 = [tmp_path / "out", "--checkpoint", moved, "--images-per-digit=1", "--digits=3"], [tmp_path / "noise", tmp_path / "out", moved]
    assert call(package, "inference", *(p1 if package == P1 else p2), "--steps=2")[0] == 0
    moved.unlink()
    picture = next((tmp_path / "out").rglob("*.png"))
    code, out, err = call(package, "redraw", picture, "--output", tmp_path / "again.png")
    assert code == 0 and "byte for byte" in out and "another" not in err, out + err


def test_another_model_of_the_same_words_is_another_model(call, places, tmp_path):
    """A finetuning may leave alone the token table and the first convolution, by which a model is known to its words."""
    problem, (input_json, _, source, *flags) = places[P3], places[P3].draw
    copy = importlib.import_module("shutil").copytree(source, tmp_path / "sd")
    assert call(P3, "inference", input_json, tmp_path / "out", copy, *flags)[0] == 0
    before = contents(tmp_path / "out", problem.names)
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    code, _, err = call(P3, "inference", input_json, tmp_path / "out", copy, *flags)
    assert code == 1 and "was made otherwise (made_of weights" in err and contents(tmp_path / "out", problem.names) == before, err


@pytest.mark.parametrize("package, module, arguments, kept", [
    (P1, "train", "--data={mini}/digits --output={t}/run --size=tiny --steps=1", "run/model.safetensors"),
    (P1, "distill", "--teacher={t}/tiny.safetensors --data={mini}/digits --output={t}/run --size=tiny --steps=1 --paths=2", "run/model.safetensors"),
    (P2, "train", "--data={t}/references --output={t}/run --image-size=16 --widths=32 --attention=0 --steps=1 --batch-size=1", "run/UNet.pt"),
    (P3, "train", "{t}/concepts/input.json --checkpoint={sd} --output={t}/run --steps=1 --batch-size=1", "run/new1.safetensors"),
    (P2, "edit", "invert {t}/references {t}/noise {t}/UNet.pt", "noise/00.pt"),
    (P3, "train", "{t}/concepts/input.json --checkpoint={sd} --output={t}/concepts --steps=1 --batch-size=1", "concepts/0/0.png"),
    (P3, "inference", "{t}/concepts/input.json {t}/concepts {sd} --embeddings={t}/words", "concepts/0/0.png"),
    (P2, "inference", "{t}/noise {t}/references {t}/UNet.pt --steps=2", "references/00.png"),
    (P2, "evaluate", "{t}/references {t}/references --report={t}/references", "references/00.png"),
    (P1, "inference", "{t}/digits --checkpoint={t}/tiny.safetensors --steps=2", "digits/svhn/data/1.png"),
])
def test_nothing_that_is_not_this_runs_is_overwritten(call, places, tmp_path, tiny_sd, package, module, arguments, kept):  # noqa: F811
    """Results whose state is gone, noises, references, example pictures."""
    path = tmp_path / kept
    if not path.exists():
        path.parent.mkdir(parents=True)
        path.write_text("the user's")
    before = {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()}
    code, _, err = call(package, module, *(part.format(t=tmp_path, mini=MINI, sd=tiny_sd) for part in arguments.split()))
    assert code == 1 and any(said in err for said in ERRORS.split("|")) and "Traceback" not in err, err
    assert {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()} == before


@pytest.mark.parametrize("package, module, arguments", [
    (P1, "inference", "{t}/run --checkpoint={t}/tiny.safetensors --steps=2 --digits=3"),
    (P1, "train", "--data={mini}/digits --output={t}/run --size=tiny --steps=1"),
    (P1, "distill", "--teacher={t}/tiny.safetensors --data={mini}/digits --output={t}/run --size=tiny --steps=1"),
    (P2, "inference", "{t}/noise {t}/run {t}/UNet.pt --steps=2"), (P2, "edit", "invert {t}/references {t}/run {t}/UNet.pt"),
    (P2, "train", "--data={t}/references --output={t}/run --image-size=16 --widths=32 --attention=0 --steps=1 --batch-size=1"),
    (P3, "inference", "{t}/concepts/input.json {t}/run {sd} --embeddings={t}/words --num-images=1 --steps=1"),
    (P3, "train", "{t}/concepts/input.json --checkpoint={sd} --output={t}/run --steps=1 --batch-size=1"),
    (P3, "miniature.train", "clip --drawings={t}/no --output={t}/run"),
])
def test_a_second_run_into_a_folder_says_who_has_it(call, places, tmp_path, tiny_sd, package, module, arguments):  # noqa: F811
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        code, _, err = call(package, module, *(part.format(t=tmp_path, mini=MINI, sd=tiny_sd) for part in arguments.split()))
    assert code == 1 and "is in use by process " in err.splitlines()[-1], err
    assert not [path for path in Path(tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.parametrize("package", [P1, P2, P3])
def test_copies_that_a_user_made_are_never_removed(call, places, tmp_path, package):
    """Of pictures that a folder's run drew, elsewhere below it and among the drawn ones; those that the run itself drew and does not draw any more are."""
    problem, out = places[package], tmp_path / "out"

    def draw(*flags):
        return call(package, "inference", *(out if part == "OUT" else part for part in problem.draw), *flags)

    assert draw()[0] == 0
    first, *_, last = problem.names
    best, beside = out / "best" / "favourite.png", (out / first).with_name("favourite.png")
    best.parent.mkdir()
    best.write_bytes((out / first).read_bytes())
    assert draw("--seed", 1, "--overwrite")[0] == 0 and best.is_file()
    beside.write_bytes((out / first).read_bytes())
    before = contents(out, problem.names)
    code, _, err = draw("--seed", 2, "--overwrite")
    assert code == 1 and f"{beside} was made otherwise" in err and "move it away" in err and "--overwrite" not in err, err
    assert beside.is_file() and contents(out, problem.names) == before
    beside.unlink()
    if package == P2:
        (tmp_path / "noise" / "01.pt").unlink()
        assert draw("--seed", 2, "--overwrite")[0] == 0 and not (out / last).exists()


def test_the_report_tells_of_what_is_bundled_alone(tmp_path):
    """A measurement of one's own network, or pictures, lies beside it."""
    bundled = ROOT / "p1_cfg_ddpm" / "weights" / "small.safetensors"
    assert report_file(None, "x.json", bundled, bundled) == ROOT / "report" / "results" / "x.json"
    assert report_file(None, "x.json", tmp_path, bundled) == Path("runs/x.json")
    assert report_file(tmp_path / "y.json", "x.json", bundled, bundled) == tmp_path / "y.json"


@pytest.mark.parametrize("package", [P1, P2, P3])
def test_the_command_that_comes_next_can_be_copied(call, places, tmp_path, package):
    problem, out = places[package], tmp_path / "a folder's"
    code, said, err = call(package, "inference", *(out if part == "OUT" else part for part in problem.draw))
    assert code == 0 and str(out) in shlex.split(said.splitlines()[-1].removeprefix("next: ")), said + err
