"""Bad calls of the scripts that are no package's: one line that says what is wrong, and nothing half done."""

import errno
import importlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent


def refused(module, monkeypatch, *arguments):
    """What the script says as it stops."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    return stopped.value.code


@pytest.fixture
def archive(tmp_path):
    """A zip of one compressed picture, which ends in a table with a copy of the file's head."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("hw2_data/face/GT/00.png", bytes(range(256)) * 40)
    return tmp_path / "a.zip"


def damage(path, changes):
    content = bytearray(path.read_bytes())
    for position, value in changes.items():
        content[position] = value
    path.write_bytes(content)


def test_a_damaged_archive_leaves_nothing(archive, tmp_path, monkeypatch):
    """Its compressed data, which its reader calls zlib.error; and a mark that it were encrypted, RuntimeError."""
    download, whole = importlib.import_module("download_data"), archive.read_bytes()
    start = 30 + len("hw2_data/face/GT/00.png")  # after the head
    for changes in ({start: 0xFF, start + 1: 0xFF}, {start + 8: whole[start + 8] ^ 0xFF}, {6: 1, whole.index(b"PK\x01\x02") + 8: 1}):
        archive.write_bytes(whole)
        damage(archive, changes)
        said = refused(download, monkeypatch, "--archive", archive, "--output", tmp_path / "data")
        assert said.startswith(f"error: {archive} cannot be unpacked (") and said.endswith("; delete it and run this again") and "\n" not in said
        assert list((tmp_path / "data").iterdir()) == []


def test_a_full_disk_does_not_blame_the_archive(archive, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    said = refused(importlib.import_module("download_data"), monkeypatch, "--archive", archive, "--output", tmp_path / "data")
    assert "No space left on device" in said and said.endswith("; free some space and run this again") and archive.exists()


@pytest.mark.parametrize("arguments, said", [
    (["--output", "{t}/file"], "error: cannot make the folder {t}/file: File exists"),
    (["--output", "{t}/file/data"], "error: cannot make the folder {t}/file/data: Not a directory"),
    (["--output", "/proc/data"], "error: cannot make the folder /proc/data: No such file or directory"),
    (["--output", "{t}/data", "--archive", "{t}/no.zip"], "error: no such archive: {t}/no.zip"),
    (["--output", "{t}/data", "--archive", "{t}"], "error: cannot read the archive {t}: it is a folder"),
    (["--output", "{t}/data", "--archive", "{t}/file"], "error: {t}/file cannot be unpacked (File is not a zip file)"),
])
def test_bad_calls_of_the_download(tmp_path, monkeypatch, arguments, said):
    (tmp_path / "file").write_text("no archive")
    code = refused(importlib.import_module("download_data"), monkeypatch, *(argument.format(t=tmp_path) for argument in arguments))
    assert code.startswith(said.format(t=tmp_path)) and "\n" not in code


def test_the_quickstart_stops_where_a_stage_does(monkeypatch, capfd, tmp_path):
    said = refused(importlib.import_module("quickstart"), monkeypatch, "--output", "/dev/null/out")
    assert said == "error: cannot write into folder /dev/null/out: Not a directory"
    (tmp_path / "p1").write_bytes(b"a file")
    assert refused(importlib.import_module("quickstart"), monkeypatch, "--output", tmp_path) == 1
    out, err = capfd.readouterr()
    assert err.startswith(f"error: cannot write into folder {tmp_path / 'p1'}") and err.count("\n") == 1 and "P1 2/3" not in out


@pytest.mark.parametrize("content, said", [
    ("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[1]", "is no benchmark's"), ('{"rows": 3}', "is no benchmark's"),
    ('{"machine": {}, "rows": {"a": {"steps_per_second": "fast"}}}', "is no benchmark's"),
])
def test_a_damaged_result_stops_the_benchmarks_table(tmp_path, monkeypatch, content, said):
    benchmark = importlib.import_module("benchmark")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    (tmp_path / "p3_benchmark.json").write_text(content)
    code = refused(benchmark, monkeypatch, "--render")
    assert code.startswith("error: ") and said in code and "\n" not in code and str(tmp_path) in code
    assert [path.name for path in tmp_path.iterdir()] == ["p3_benchmark.json"]


@pytest.mark.parametrize("content, said", [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("{}", "is not what this script wrote")])
def test_a_damaged_grade_stops_the_quickstarts_table(tmp_path, monkeypatch, content, said):
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr(quickstart, "stage", lambda *_, **__: 0.0)
    for folder, name in (("p1_grade", "grade"), ("p2_grade", "grade"), ("p3_grade", "grade"), ("p3_challenge_grade", "grade"), ("p3_zero_shot", "results")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(content)
    code = refused(quickstart, monkeypatch, "--output", tmp_path)
    assert code.startswith("error: ") and said in code and "\n" not in code


def test_the_report_checks_the_folder_of_words_first(tmp_path, monkeypatch):
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "draw_everything", lambda _: pytest.fail("long work started"))
    assert refused(report, monkeypatch, "--words", tmp_path) == f"error: {tmp_path} is no folder of scripts/p3_train.sh: it has no 0/history.json"


def test_the_report_and_the_benchmarks_table_are_written_whole(tmp_path, monkeypatch):
    """No file may grow: what was there stays, and nothing else is left."""
    common = importlib.import_module("common")
    (tmp_path / "report.md").write_text("before")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=r"error: cannot write .*report\.md: No space left on device"):
        common.write_whole(tmp_path / "report.md", "after")
    assert (tmp_path / "report.md").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("package", ["p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion"])
def test_course_data_that_was_not_downloaded(package, monkeypatch, tmp_path):
    """The message tells the script that fetches it, but only where that would help: not for other folders, nor for what is bundled."""
    files = importlib.import_module(f"{package}.files")
    monkeypatch.setattr(files, "MINI", tmp_path / "hw2_data" / "mini")
    for look in (lambda path: files.existing_file(path, "checkpoint"), lambda path: files.existing_folder(path, "folder"), files.read_json):
        for place, script in (("hw2_data/face/UNet.pt", "data"), ("hw2_data/weights/sd-v1-4.ckpt", "weights"), ("hw2_data/mini/UNet.pt", ""), ("face", "")):
            with pytest.raises(files.UserError) as error:
                look(tmp_path / place)
            assert str(error.value).partition("; ")[2] == (f"bash scripts/download_{script}.sh fetches what belongs there" if script else "")


def test_digits_that_were_not_downloaded(monkeypatch, tmp_path):
    from p1_cfg_ddpm import data, files

    monkeypatch.setattr(files, "MINI", tmp_path / "hw2_data" / "mini")
    with pytest.raises(files.UserError, match=r"val\.csv}; bash scripts/download_data\.sh fetches what belongs there$"):
        data.load_digits(tmp_path / "hw2_data" / "digits", "train")
