"""The shell scripts, the commands that anything tells, the set-up and the download."""

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest
import torch

from p1_cfg_ddpm import inference
from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.model import SIZES, UNet, save_model
from p1_cfg_ddpm.provenance import script_line

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


class Asked(Exception):
    """Raised in place of parsing: its argument is the parser."""


def asked(parser, *_):
    raise Asked(parser)


def parser_of(name, monkeypatch):
    """The parser of a module that is a command, as its main makes it."""
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", asked)
    monkeypatch.setattr(sys, "argv", [name])
    try:
        importlib.import_module(name).main()
    except Asked as caught:
        return caught.args[0]
    finally:
        monkeypatch.undo()


def all_of(parser):
    """The actions of a parser and of those of its commands."""
    for action in parser._actions:
        yield action
        for inner in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from all_of(inner)


def texts_of(path):
    """What a file tells: a page or a shell script as it is; of Python its strings, with {X} for what is put in, and its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        for name, value in re.findall(r'\b(\w+)="([^"\n]*)"', text):  # as pages shorten their lines
            text = re.sub(rf"\${name}\b", lambda _, value=value: value, text)
        return [text.replace("\\\n", " ")]
    nodes = list(ast.walk(ast.parse(text)))
    joined = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    inner = {id(part) for values in joined for part in values}
    whole = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner]
    parts = [node.value for node in whole] + ["".join(part.value if isinstance(part, ast.Constant) else "{X}" for part in values) for values in joined]
    return [part.replace("\\\n", " ") for part in [*parts, *re.findall(r"#.*", text)]]


TOLD = re.compile(r"(?:-m ((?:p1_cfg_ddpm|p2_ddim|p3_clip_textual_inversion)(?:\.\w+)+)|(\b[a-z]\w*\.sh)\b)")  # the start of a command
END = re.compile(r"`|  +#|\n|;| && | \(|\)|\"|, |: |\w+\.sh|$")
WHOLE = re.compile(r" *(?:[\w$./]*python|\$\(.*\)|bash|accelerate launch \S+ \S+|each \S*python) (?:\.?\.?scripts/)?")  # a line that begins with one


@pytest.mark.skipif(not (shutil.which("git") and (SCRIPTS.parent / ".git").exists()), reason="needs git and a clone")
def test_every_command_that_is_told_has_its_flags(monkeypatch):
    """In pages, docstrings, messages and comments; a line of its own is all of a command, and parses. Each flag says what it is for."""
    shell = {}
    for path in SCRIPTS.glob("*.sh"):
        started = re.search(r'exec "\$python" "\$scripts/(?:run\.py" (\S+)|(\w+)\.py")(.*) "\$@"', path.read_text())
        if started and path.name not in ("check.sh", "test.sh"):
            shell[path.name] = (started[1] or started[2], started[3].split())
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=SCRIPTS.parent, capture_output=True, text=True, check=True).stdout.split("\0")
    parsers, wrong, lines = {}, [], 0
    for path in (SCRIPTS.parent / name for name in kept if name.endswith((".md", ".py", ".sh")) and "/tests/" not in name):
        for text in texts_of(path):
            for found in TOLD.finditer(text):
                name, first = shell.get(found[2], (None, ())) if found[2] else (found[1], ())
                if name is None or importlib.util.find_spec(name).submodule_search_locations:  # a script that is none of these; a room, the start of a name
                    continue
                parser = parsers[name] = parsers.get(name) or parser_of(name, monkeypatch)
                told = text[found.end():END.search(text, found.end()).start()]
                known = {flag for action in all_of(parser) for flag in action.option_strings}
                if name.endswith("miniature.words"):
                    told = told.split(" -- ")[0]  # what follows is p3_train's
                wrong += [f"{path}: {name} has no {flag}" for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", told) if flag not in known]
                line = re.split(r"\n|  +#|  +writes| && ", text[found.end():])[0].split(" -- ")[0]
                if WHOLE.fullmatch(text[:found.start()].rpartition("\n")[2]) and not re.search(r"\{X\}|\[|\.\.\.|\$@", line):
                    lines += 1
                    try:
                        parser.parse_args([*first, *shlex.split(line)])
                    except (SystemExit, ValueError):
                        wrong.append(f"{path}: {name} does not take {line}")
    assert wrong == [], "\n".join(wrong)
    assert len(parsers) > 45 and lines > 60, (len(parsers), lines)
    for name, parser in parsers.items():
        assert not [action.dest for action in all_of(parser) if not (action.help or isinstance(action, argparse._SubParsersAction))], name
        assert parser.description.rstrip().endswith((".", "?")) or "\n" in parser.description, name


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_scripts_run_by_sh_are_run_by_bash(shell):
    result = subprocess.run([shell, SCRIPTS / "p1_grade.sh", "--no-such"], check=False, capture_output=True, text=True)
    assert result.returncode == 2 and "the following arguments are required: OUT" in result.stderr


def test_a_line_to_copy_is_right_where_one_stands(monkeypatch, tmp_path):
    root = SCRIPTS.parent
    for place, shown in ((root, "scripts/p1_grade.sh"), (root.parent, f"{root.name}/scripts/p1_grade.sh"), (tmp_path, f"{root}/scripts/p1_grade.sh")):
        monkeypatch.chdir(place)
        assert shlex.split(script_line("p1_grade.sh", "a b")) == ["bash", shown, "a b"]


def test_an_unended_training_is_told_where_it_is_installed(tmp_path, monkeypatch, capsys):
    install = importlib.import_module("install")
    monkeypatch.setattr(inference, "INSTALLED", tmp_path / "weights" / "installed.safetensors")
    (tmp_path / "weights").mkdir()
    for steps, said in ((3, "is of a training at step 3 of 5"), (5, "")):
        torch.manual_seed(0)
        save_model(tmp_path / "model.safetensors", UNet(SIZES["tiny"]), Diffusion(), {"steps": steps, "of_steps": 5})
        monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path)])
        install.main()
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


def test_setup_knows_what_is_installed(setup):
    assert setup.meets(sys.executable, ["numpy>=1.0", "pytest>=7"])
    assert not setup.meets(sys.executable, ["numpy>=999"])
    assert not setup.meets(sys.executable, ["no-such-package>=1"])


def test_setup_finds_a_torchvision_of_another_build(setup, monkeypatch, tmp_path, capsys):
    """A CPU build of torch, and the index's torchvision on it, meet every version: nothing of P3 could be imported."""
    for name, version in (("torch", "9.0+cpu"), ("torchvision", "9.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    module = tmp_path / "torchvision.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for text, good in (("", True), ("raise RuntimeError('operator torchvision::nms does not exist')", False)):
        module.write_text(text)
        assert setup.meets(sys.executable, ["torch>=2.9", "torchvision>=0.24"]) == good
    monkeypatch.setattr(setup, "install", lambda *_: None)
    monkeypatch.setattr(setup, "has_pip", lambda _: True)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setenv("VENV", str(tmp_path / "venv"))
    with pytest.raises(SystemExit, match=r"torch and torchvision in .*venv do not fit together"):
        setup.main()
    assert not capsys.readouterr().out


def test_a_second_call_waits_for_the_first_and_installs_nothing(setup, monkeypatch, tmp_path, capsys):
    """As many first calls at once, one for each of many folders."""
    venv = tmp_path / "venv"
    other = f"import setup, pathlib, sys\nwith setup.alone(pathlib.Path({str(venv)!r})):\n    print('alone', flush=True)\n    sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", other], cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "alone\n"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    answers = iter([False, True, True])  # nothing is there; the other call has installed it
    monkeypatch.setattr(setup, "meets", lambda *_: next(answers))
    monkeypatch.setattr(setup, "install", lambda *_: pytest.fail("installed twice"))
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setenv("VENV", str(venv))
    ends = threading.Timer(0.3, first.stdin.close)
    ends.start()
    setup.main()
    said = capsys.readouterr()
    assert first.wait(10) == 0 and said.out == f"{venv}/bin/python\n" and "another call is setting up: waiting for it" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["venv"]


def test_setup_makes_no_environment_by_an_old_python(setup, monkeypatch, tmp_path, capsys):
    """One that is there already has a Python of its own."""
    monkeypatch.setattr(setup.sys, "argv", ["setup.py"])
    monkeypatch.setattr(setup, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setenv("VENV", str(tmp_path / "venv"))
    with pytest.raises(SystemExit, match=r"is too old; install Python 99\.0 or newer"):
        setup.main()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    monkeypatch.setattr(setup, "meets", lambda python, _: python == tmp_path / "venv" / "bin" / "python")
    setup.main()
    assert capsys.readouterr().out == f"{tmp_path / 'venv' / 'bin' / 'python'}\n"


def test_an_old_python_beside_a_good_environment_is_no_trouble(tmp_path):
    """The whole script, of which env.sh reads one path; and env.sh takes the newer one of several."""
    (tmp_path / "scripts").mkdir()
    for path in (SCRIPTS / "setup.py", SCRIPTS / "common.py", SCRIPTS.parent / "requirements.txt"):
        shutil.copy(path, tmp_path / path.relative_to(SCRIPTS.parent))
    script = tmp_path / "scripts" / "setup.py"
    text = script.read_text(encoding="utf-8").replace("OLDEST_PYTHON = (3, 10)", "OLDEST_PYTHON = (99, 0)")
    assert "(99, 0)" in text
    script.write_text(text, encoding="utf-8")
    good = Path(sys.prefix) / "bin" / "python"
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=os.environ | {"VENV": sys.prefix})
    assert found.returncode == 0 and found.stdout == f"{good}\n", found
    for name, code in (("python3", 1), ("python3.12", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {code}\necho {name}\n')
        (tmp_path / name).chmod(0o755)
    line = f'PATH={shlex.quote(str(tmp_path))}:$PATH; source {shlex.quote(str(SCRIPTS / "env.sh"))}; echo "$python"'
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == "python3.12\n"


def test_setup_refuses_a_full_disk(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3e8))
    with pytest.raises(SystemExit, match=r"only 0\.3 GB free"):
        setup.make_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_setup_reports_what_pip_says(setup, monkeypatch, tmp_path):
    for output, message in (("ERROR: [Errno 28] No space left on device", "the disk is full"), ("x\nERROR: No matching\ny", "No matching"),
                            ("WARNING: Retrying after connection broken by 'X'\nERROR: No matching distribution", "cannot reach the package index")):
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
