"""Nothing of the user's is deleted or overwritten, nothing in the folder one stands in is run, and all ends in one line and an honest exit code."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch._inductor.exc

from p1_cfg_ddpm.files import run

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
SHADOWS = ("torch", "numpy", "runpy", "json", "email", "signal", "PIL", "common", "sitecustomize2")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VENV")} | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def shell(script, *arguments, **options):
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 200} | options
    return subprocess.run(["bash", script, *map(str, arguments)], check=False, **options)


def snapshot(folder):
    """Every entry below a folder, with its content."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


def user_folder(path):
    """A folder with things of the user's in it, whose names are close to ours."""
    path.mkdir(parents=True, exist_ok=True)
    for name in (".movie.mkv.part", ".a.png.part1234.png", "thesis.txt", ".hw2-notes", "data.zip"):
        (path / name).write_text(f"the user's {name}")
        os.utime(path / name, (0, 0))
    return path


# --- the set-up ---

def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    """L1: the whole folder was removed."""
    before = snapshot(user_folder(tmp_path / "mine"))
    result = shell(SCRIPTS / "setup.sh", env=ENVIRONMENT | {"VENV": str(tmp_path / "mine")})
    assert result.returncode == 1 and "is no virtual environment" in result.stderr and "Traceback" not in result.stderr
    assert snapshot(tmp_path / "mine") == before


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_environment_removes_what_it_made_only(tmp_path, monkeypatch, there):
    setup, venv = importlib.import_module("setup"), tmp_path / "venv"
    if there:
        venv.mkdir()

    def fail(command, **_):
        venv.mkdir(exist_ok=True)
        (venv / "half").write_text("")
        return subprocess.CompletedProcess(command, 1, "", "no space")

    monkeypatch.setattr(setup.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="cannot make a virtual environment"):
        setup.make_venv(venv)
    assert venv.exists() == there


def test_an_environment_is_believed_for_what_it_has_and_not_for_a_stamp(tmp_path, monkeypatch, capsys):
    """T5: a stamp without packages, an environment killed before pip came; a good one that cannot be written to is used."""
    setup = importlib.import_module("setup")
    calls = []
    monkeypatch.setattr(setup, "make_venv", lambda venv: calls.append("make"))
    monkeypatch.setattr(setup, "install", lambda python, _: calls.append("install"))
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setenv("VENV", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".requirements").write_text("every digest")
    for meets, pip, wanted in ((False, False, ["make", "install"]), (False, True, ["install"]), (True, False, [])):
        calls.clear()
        monkeypatch.setattr(setup, "meets", lambda *_, meets=meets: meets or "install" in calls)
        monkeypatch.setattr(setup, "has_pip", lambda *_, pip=pip: pip)
        before = snapshot(tmp_path)
        setup.main()
        assert calls == wanted and snapshot(tmp_path) == before
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "bin" / "python")


# --- the download ---

@pytest.fixture
def archive(tmp_path):
    """The course's archive, of empty pictures, with fewer of them than there are."""
    download = importlib.import_module("download_data")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, count in download.EXPECTED.items():
            if name.endswith((".csv", ".json", ".pt")):
                file.writestr(f"hw2_data/{name}", b"x")
            else:
                for i in range(count):
                    file.writestr(f"hw2_data/{name}/{i}.png", b"x")
    return tmp_path / "a.zip"


def fetch(monkeypatch, *arguments):
    download = importlib.import_module("download_data")
    monkeypatch.setattr(sys, "argv", ["download_data.py", *map(str, arguments)])
    download.main()


@pytest.mark.parametrize("own", ["folder", "file", "link", "link to nothing"])
def test_what_stands_in_the_archives_way_is_kept(archive, tmp_path, monkeypatch, own):
    """L2: it was deleted, or a traceback."""
    data = user_folder(tmp_path / "data")
    other = user_folder(tmp_path / "other")
    face = data / "face"
    {"folder": lambda: user_folder(face), "file": lambda: face.write_text("mine"), "link": lambda: face.symlink_to(other),
     "link to nothing": lambda: face.symlink_to(tmp_path / "nowhere")}[own]()
    before, elsewhere = snapshot(data), snapshot(other)
    fetch(monkeypatch, "--archive", archive, "--output", data)
    after = snapshot(data)
    aside = next(name for name in after if name.startswith("face.before-"))
    assert {name.replace(aside, "face"): content for name, content in after.items()
            if name.startswith(aside) or not name.startswith(("face", "digits", "clip_zeroshot", "textual_inversion"))} == before
    assert snapshot(other) == elsewhere and importlib.import_module("download_data").problems(data) == []


@pytest.mark.parametrize("damage", ["cut off", "a part is missing", "no zip", "a web page"])
def test_an_archive_that_is_not_whole_moves_nothing(archive, tmp_path, monkeypatch, damage):
    data = user_folder(tmp_path / "data")
    user_folder(data / "face")
    before = snapshot(data)
    if damage == "a part is missing":
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "b.zip", "w") as new:
            for name in old.namelist():
                if "/face/noise" not in name:
                    new.writestr(name, b"x")
        archive = tmp_path / "b.zip"
    else:
        archive.write_bytes({"cut off": archive.read_bytes()[:9000], "no zip": b"no zip", "a web page": b"<!DOCTYPE html>"}[damage])
    with pytest.raises(SystemExit, match="error: "):
        fetch(monkeypatch, "--archive", archive, "--output", data)
    assert snapshot(data) == before and archive.exists()


def test_a_move_that_fails_puts_back_what_was_there(archive, tmp_path, monkeypatch):
    data = user_folder(tmp_path / "data")
    user_folder(data / "face")
    before, rename = snapshot(data), Path.rename

    def broken(self, target):
        if Path(target) == data / "face" and ".part" in str(self):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(KeyboardInterrupt):
        fetch(monkeypatch, "--archive", archive, "--output", data)
    after = snapshot(data)
    assert {name: content for name, content in after.items() if not name.startswith(("digits", "clip_zeroshot"))} == before


def test_a_second_download_says_who_holds_the_folder(archive, tmp_path, monkeypatch):
    from p1_cfg_ddpm import files

    (tmp_path / "data").mkdir()
    with files.lock(tmp_path / "data"), pytest.raises(SystemExit, match=rf"is in use by process {os.getpid()} "):
        fetch(monkeypatch, "--archive", archive, "--output", tmp_path / "data")
    fetch(monkeypatch, "--archive", archive, "--output", tmp_path / "data")
    assert not (tmp_path / "data" / files.LOCK).exists()


# --- where one stands ---

@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """A folder to stand in, with modules that leave a mark if they are run."""
    folder = tmp_path_factory.mktemp("trap")
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'RUN')!r}, 'a').write({name!r})\n")
    return folder


def test_every_script_goes_by_way_of_run():
    for path in SCRIPTS.glob("*.sh"):
        last = path.read_text(encoding="utf-8").splitlines()[-1]
        assert path.name in ("env.sh", "test.sh", "setup.sh") or last.startswith('exec "$python" "$scripts/'), path
    for path in [*SCRIPTS.glob("*.py"), *ROOT.glob("p*/**/*.py")]:
        assert 'sys.executable, "-m", f"' not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("script", ["p1_grade.sh", "p2_grade.sh", "download_data.sh"])
def test_no_script_runs_a_file_of_the_folder_one_stands_in(trap, script):
    """L5, T5: nor does an exported CDPATH lead astray. (Python 3.10, which has no -P, as any other: the path is changed before anything is imported.)"""
    result = shell(os.path.relpath(SCRIPTS / script, trap), "--help", cwd=trap, env=ENVIRONMENT | {"CDPATH": str(ROOT)})
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr
    assert not (trap / "RUN").exists(), (trap / "RUN").read_text()


@pytest.mark.parametrize("package", ["p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion"])
def test_another_python_than_the_projects_is_told(package):
    """One without its packages, as the system's is."""
    found = subprocess.run([sys.executable, "-S", "-m", f"{package}.minimal"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stderr.startswith(f"error: {sys.executable} has not the project's packages") and found.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["-m", "p2_ddim.evaluate"], [ROOT / "p2_ddim" / "guard.py", "p2_ddim.evaluate"]])
def test_nor_does_python_m(trap, command):
    """What is put into the way of the project's own modules; Python itself looks for runpy there before any of our code runs."""
    (trap / "runpy.py").unlink(missing_ok=True)
    result = subprocess.run([sys.executable, *command, "--help"], check=False, cwd=trap, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)
    assert result.returncode == 0 and not (trap / "RUN").exists(), result.stderr


def test_a_checkout_with_a_colon_in_its_path(tmp_path):
    """T5: a PYTHONPATH cannot say it."""
    copy = tmp_path / "a:b c"
    for name in ("scripts", "p1_cfg_ddpm", "p2_ddim"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "tests", "*.safetensors"))
    shutil.copyfile(ROOT / "requirements.txt", copy / "requirements.txt")
    result = shell(copy / "scripts" / "p2_grade.sh", "--help", cwd=tmp_path)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr


# --- honest exits ---

def grade(tmp_path, redirections="", environment=None):
    """`p2_grade.sh OUT GT` in a shell, with redirections."""
    if not (tmp_path / "out").exists():
        shutil.copytree(ROOT / "hw2_data" / "mini" / "face" / "GT", tmp_path / "out")
    line = f"set -o pipefail; bash '{SCRIPTS / 'p2_grade.sh'}' '{tmp_path / 'out'}' '{ROOT / 'hw2_data' / 'mini' / 'face' / 'GT'}' {redirections}"
    return subprocess.run(["bash", "-c", line], check=False, env=ENVIRONMENT | (environment or {}), capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("redirections, code, said", [
    ("| true", 1, "error: cannot write to the standard output: Broken pipe"), ("> /dev/full", 1, "error: cannot write to the standard output: No space left"),
    ("2>&-", 0, ""), (">&-", 0, ""), ("> /dev/null 2> /dev/full", 0, ""), (">&- 2>&- <&-", 0, "")])
def test_a_grade_is_written_whatever_becomes_of_what_is_printed(tmp_path, redirections, code, said):
    """T4: a closed pipe cost the grade, closed streams and full disks were tracebacks. (A pipe that is closed late is no error.)"""
    result = grade(tmp_path, redirections)
    assert result.returncode in {code, 0 if "|" in redirections else code}, result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr and (result.returncode == 0 or said in result.stderr)
    assert (tmp_path / "out_grade" / "grade.json").is_file() and (tmp_path / "out_grade" / "comparison.png").is_file()


def test_a_plain_terminal_shows_what_it_can(tmp_path):
    here = tmp_path / "mär\x1b[31mz"
    result = grade(here, environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}) if here.mkdir() is None else None
    assert result.returncode == 0 and "m\\xe4r\\x1b[31mz" in result.stdout and "\x1b" not in result.stdout, result.stderr


def interrupted(command, after, tmp_path):
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("name", ["p1_cfg_ddpm.train", "p3_clip_textual_inversion.inference"])
def test_ctrl_c_while_libraries_are_imported(tmp_path, name):
    """T3: a traceback. (No argument is given: once all is imported, it would end with 2.)"""
    code, err = interrupted([sys.executable, SCRIPTS / "run.py", name, "--unknown"], 0.5, tmp_path)
    assert (code, err) == (130, "stopped\n") or code == 2, err


def test_every_entry_point_goes_by_way_of_run():
    """So that each has the same exits: main() is never called bare, but on the pages that import nothing of ours."""
    for path in [*ROOT.glob("p*/**/*.py"), *SCRIPTS.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text and path.name not in ("guard.py", "run.py", "minimal.py"):
            assert "    run(main)" in text.split('__name__ == "__main__"')[1], path


@pytest.mark.parametrize("error, said", [
    (torch._inductor.exc.InvalidCxxCompiler(), "torch.compile failed (No working C++ compiler found"),
    (RuntimeError("value cannot be converted to type float without overflow"), "a number is too large to compute with"),
    (MemoryError(), "not enough memory"), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory")])
def test_what_fails_in_a_library_for_a_reason_of_the_users_is_one_line(error, said):
    def main():
        raise error

    with pytest.raises(SystemExit, match=rf"^error: .*{re.escape(said)}"):
        run(main)
