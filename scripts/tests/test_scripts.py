"""The shell scripts, the set-up and the download."""

import importlib
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup():
    return importlib.import_module("setup")


@pytest.fixture
def download():
    return importlib.import_module("download_data")


def test_scripts_are_valid_and_documented():
    scripts = sorted(SCRIPTS.glob("*.sh"))
    assert len(scripts) >= 9
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert script.read_text().splitlines()[1].startswith("# ") or script.name == "env.sh"


def test_a_script_runs_from_any_folder_with_its_arguments(tmp_path):
    """Also with no HOME, and with an interpreter that has the requirements and no virtual environment around it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "PYTHONPATH")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(["bash", SCRIPTS / "p1_infer.sh", "out here", "--steps", "0"], check=False, **options)
    assert result.returncode != 0 and result.stderr.strip() == "error: --steps must be between 1 and 1000, not 0"
    result = subprocess.run(["bash", SCRIPTS / "p1_grade.sh", "out here"], check=False, **options)
    assert result.returncode != 0 and result.stderr.startswith("error: out here/mnistm does not exist") and result.stderr.count("\n") == 1


def test_setup_knows_what_is_installed(setup):
    assert setup.meets(sys.executable, ["numpy>=1.0", "pytest>=7"])
    assert not setup.meets(sys.executable, ["numpy>=999"])
    assert not setup.meets(sys.executable, ["no-such-package>=1"])


def test_setup_refuses_an_old_python(setup, monkeypatch):
    monkeypatch.setattr(setup.sys, "argv", ["setup.py"])
    monkeypatch.setattr(setup, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(SystemExit, match=r"is too old; install Python 99\.0 or newer"):
        setup.main()


def test_setup_refuses_a_full_disk(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3e8))
    with pytest.raises(SystemExit, match=r"only 0\.3 GB free"):
        setup.make_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_setup_reports_what_pip_says(setup, monkeypatch, tmp_path):
    for output, message in (("ERROR: [Errno 28] No space left on device", "the disk is full"), ("x\nERROR: No matching\ny", "No matching")):
        result = subprocess.CompletedProcess([], 1, "", output)
        monkeypatch.setattr(setup.subprocess, "run", lambda *_, result=result, **__: result)
        with pytest.raises(SystemExit, match=message):
            setup.install(tmp_path / "python", [setup.ROOT / "requirements.txt"])


def test_setup_in_an_unwritable_place_ends_in_one_line():
    result = subprocess.run([sys.executable, SCRIPTS / "setup.py"], check=False, env=os.environ | {"VENV": "/dev/null/venv"}, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr and "error: cannot make a virtual environment in /dev/null/venv" in result.stderr


def make_archive(path, download, leave_out=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name, count in download.EXPECTED.items():
            for i in range(count) if not name.endswith((".csv", ".json", ".pt")) and name not in leave_out else ():
                archive.writestr(f"hw2_data/{name}/{i}.png", b"x")
            if name.endswith((".csv", ".json", ".pt")) and name not in leave_out:
                archive.writestr(f"hw2_data/{name}", b"x")
    return path


def run(download, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["download_data.py", *map(str, arguments)])
    download.main()


def test_an_archive_is_unpacked_and_checked(download, monkeypatch, tmp_path, capsys):
    archive = make_archive(tmp_path / "a.zip", download)
    run(download, monkeypatch, "--archive", archive, "--output", tmp_path / "data")
    assert download.problems(tmp_path / "data") == [] and archive.exists()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["clip_zeroshot", "digits", "face", "textual_inversion"]
    run(download, monkeypatch, "--output", tmp_path / "data")
    assert "nothing to do" in capsys.readouterr().out


def test_bad_archives_end_in_one_line(download, monkeypatch, tmp_path):
    archive = make_archive(tmp_path / "a.zip", download, leave_out=["face/GT"])
    with pytest.raises(SystemExit, match=r"error: .*face/GT does not exist"):
        run(download, monkeypatch, "--archive", archive, "--output", tmp_path / "data")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"error: .*cannot be unpacked"):
        run(download, monkeypatch, "--archive", archive, "--output", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_no_internet_ends_in_one_line(download, monkeypatch, tmp_path):
    def no_network(**_):
        raise ConnectionError("name resolution failed\nand more")

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=no_network))
    with pytest.raises(SystemExit, match=r"error: the archive could not be downloaded \(name resolution failed\)\. Without internet") as error:
        run(download, monkeypatch, "--output", tmp_path)
    assert "\n" not in str(error.value)
