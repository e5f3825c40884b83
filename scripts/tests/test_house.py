"""The map in the __init__.py of each folder and room: every file is on it, and imports only from the floors below its own."""

import argparse
import ast
import importlib
import re
import shutil
import subprocess

import pytest

from common import ROOT
from p1_cfg_ddpm.provenance import HelpFormatter

PACKAGES = ("p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion")


def floors_of(package):
    """{file or room: number of its floor}, by the map of a folder or of a room in it."""
    lines = re.findall(r"^ +(\d+)  (.*)$", importlib.import_module(package).__doc__, re.MULTILINE)
    return {name: int(number) for number, line in lines for name in re.findall(r"\w+", re.sub(r"\([^)]*\)", "", line))}


def rooms_of(package):
    return sorted(path.parent.name for path in (ROOT / package).glob("*/__init__.py") if path.parent.name != "tests")


def imports_of(path, level=1):
    """The names that a file imports from the folder it lies in, or (level 2) from the one around its room."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_is_short_and_imports_nothing_of_ours(package):
    text = (ROOT / package / "minimal.py").read_text()
    ours = {*PACKAGES, *(path.stem for path in (ROOT / package).glob("*.py"))}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in ours, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not ours & {alias.name.split(".")[0] for alias in node.names}, ast.unparse(node)
    assert len(text.splitlines()) <= 160


FOLDERS = (*PACKAGES, *(f"{package}.{room}" for package in PACKAGES for room in rooms_of(package)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_map_has_every_file_and_its_floors_hold(folder):
    package, _, room = folder.partition(".")
    floors, files = floors_of(folder), {path.stem: path for path in (ROOT / package / room).glob("*.py") if path.stem != "__init__"}
    assert floors.keys() == files.keys() | (set() if room else set(rooms_of(package)))
    for name, path in files.items():
        wrong = {other for other in imports_of(path) if floors[other] >= floors[name]}
        around = {other for other in imports_of(path, 2) if floors_of(package)[other] >= floors_of(package)[room]} if room else set()
        assert not wrong | around, f"{name} imports {wrong | around} from its own floor or above"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_is_short_and_the_floor_too(package):
    """A reader sees a folder at a glance; what only few readers need has a room."""
    assert len(importlib.import_module(package).__doc__.splitlines()) <= 20
    assert all(len(floors_of(folder)) <= 36 for folder in FOLDERS if folder.startswith(package))


def test_no_folder_imports_another_and_no_file_is_long():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert "tests" in path.parts or len(text.splitlines()) <= 350, path
            assert not re.search(rf"^\s*(from|import) ({'|'.join(other for other in PACKAGES if other != package)})\b", text, re.MULTILINE), path


def test_every_command_that_is_told_is_there():
    """In pages, docstrings, scripts and results: whoever copies it gets what it says."""
    pages = [path for kind in ("md", "py", "sh", "json") for path in ROOT.rglob(f"*.{kind}")
             if not {"runs", "out", ".venv", ".cache"} & set(path.relative_to(ROOT).parts)]
    told = {(name, path) for path in pages
            for name in re.findall(rf'(?:-m |run\.py" )((?:{"|".join(PACKAGES)})(?:\.\w+)+)', path.read_text(encoding="utf-8", errors="replace"))}
    assert len({name for name, _ in told}) > 30
    places = {f"{path}: {name}": ROOT / name.replace(".", "/") for name, path in told}
    assert not [told for told, place in places.items() if not place.with_suffix(".py").is_file() and not place.is_dir()]  # a room: the start of a name


@pytest.mark.skipif(not (shutil.which("git") and (ROOT / ".git").exists()), reason="needs git and a clone")
def test_nothing_else_lies_at_the_top():
    """Of what git keeps; a file that was left there by mistake is seen."""
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    top = {name.split("/")[0] for name in kept if name and not name.startswith(".")}
    assert top == {"README.md", "LICENSE", "requirements.txt", *PACKAGES, "hw2_data", "scripts", "report"}


def test_help_tells_each_default_once():
    """By the one formatter of the three folders; argparse's own says "(default: None)", also behind a default that is told in words."""
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    for flag, options in (("--a", {"default": None, "help": "first (default: by size)"}), ("--b", {"default": None, "help": "second"}),
                          ("--c", {"action": "store_true", "help": "third"}), ("--d", {"default": 4, "help": "fourth"}),
                          ("--e", {"default": [], "help": "fifth"}), ("--f", {"default": (1, 2), "help": "sixth"})):
        parser.add_argument(flag, **options)
    assert re.findall(r"\(default.*?\)", parser.format_help()) == ["(default: by size)", "(default: 4)", "(default: 1 2)"]
    files = [path for folder in (*PACKAGES, "scripts") for path in (ROOT / folder).rglob("*.py") if not {"tests", "provenance.py"} & set(path.parts)]
    assert not [path for path in files if "ArgumentDefaultsHelpFormatter" in path.read_text()]
