"""Killed, crowded out, or run in odd places: outputs are whole or not there, and what goes wrong is said in one line."""

import ast
import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MINI = ROOT / "hw2_data" / "mini"
PACKAGES = ("p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion")
WRITERS = {"save", "savefig", "save_file", "save_pretrained", "write_text", "write_bytes", "savez_compressed"}
DRAW = {  # problem: (module, arguments with OUT for the folder)
    "p1": ("p1_cfg_ddpm.inference", ["OUT", "--images-per-digit=1", "--digits", "3", "--steps=2"]),
    "p2": ("p2_ddim.inference", [MINI / "face" / "noise", "OUT", MINI / "face" / "UNet.pt", "--steps=2"]),
    "p3": ("p3_clip_textual_inversion.inference", [MINI / "textual_inversion" / "input.json", "OUT", "--num-images=1", "--steps=2"]),
}


@pytest.mark.parametrize("problem", DRAW)
def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing(problem, tmp_path, monkeypatch, capsys):
    """No file may grow beyond 100 bytes: the system refuses the write itself, as on a full disk. (capsys: what is printed must go into no file.)"""
    module, arguments = DRAW[problem]
    monkeypatch.setattr(sys, "argv", [module, *(str(tmp_path / "out") if argument == "OUT" else str(argument) for argument in arguments)])
    command, files = (importlib.import_module(name) for name in (module, f"{module.split('.')[0]}.files"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(SystemExit, match=f"^error: cannot write {tmp_path / 'out'}"):
            files.run(command.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def in_one_process(code, tmp_path, **options):
    """Runs code with the `files` modules of all three packages; they differ in nothing that this tests."""
    imports = "; ".join(f"from {package} import files as f{i}, pictures as p{i}" for i, package in enumerate(PACKAGES))
    script = (f"import os, sys, time, torch\nfrom PIL import Image\nfrom safetensors.torch import save_file\n{imports}\nALL = (f0, f1, f2)\n"
              f"PICTURES = {{f0: p0, f1: p1, f2: p2}}\n{code}")
    return subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_every_kind_of_write_is_refused_in_one_line(tmp_path):
    process = in_one_process("""
def write(files, kind, path):
    if kind == "picture":
        PICTURES[files].save_image(Image.effect_noise((64, 64), 50), path)
    elif kind == "json":
        files.write_json(path, list(range(1000)))
    else:
        with files.atomic_path(path) as temporary:
            if kind == "tensors":
                save_file({"a": torch.zeros(9999)}, temporary)
            elif kind == "pickle":
                torch.save({"a": torch.zeros(9999)}, temporary)
for i, files in enumerate(ALL):
    for kind in ("picture", "json", "tensors", "pickle"):
        path = f"{i}_{kind}." + {"picture": "png", "json": "json", "tensors": "safetensors", "pickle": "pt"}[kind]
        try:
            write(files, kind, path)
            print("written", path)
        except files.UserError as error:
            assert "cannot write" in str(error) and "\\n" not in str(error), error
print(os.listdir("."))
""", tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out == "[]\n", out + err


def test_a_kill_in_the_middle_of_a_write_leaves_the_file_before(tmp_path):
    process = in_one_process("""
for i, files in enumerate(ALL):
    files.write_json(f"{i}.json", "before")
    context = files.atomic_path(f"{i}.json")
    open(context.__enter__(), "w").write("half of")
    sys.stdout.write("x")
sys.stdout.flush()
time.sleep(60)
""", tmp_path)
    assert process.stdout.read(3) == "xxx"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [(tmp_path / f"{i}.json").read_text() for i in range(3)] == ['"before"\n'] * 3
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path.name not in ("0.json", "1.json", "2.json"))


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    """Not what is being written now, by whichever process, nor the user's files of similar names, however old."""
    process = in_one_process("""
for i, files in enumerate(ALL):
    os.mkdir(str(i))
    context = files.atomic_path(f"{i}/now.png")
    now = context.__enter__()
    gone = now.name.replace(str(os.getpid()), "4999999")
    other_machine = now.name.replace(".hw2-", ".hw2-f", 1)[:5] + now.name[5:].replace(now.name[5:13], "ffffffff", 1).replace(str(os.getpid()), "4999999")
    kept = sorted([".hidden", ".movie.mkv.part", ".a.png.part12345678.png", gone + "~", "x" + gone, other_machine, now.name])
    for name in [*kept, gone]:
        open(f"{i}/{name}", "a").close()
        os.utime(f"{i}/{name}", (0, 0))
    files.writable_folder(str(i))
    files.writable_file(f"{i}/new.json")
    assert sorted(os.listdir(str(i))) == kept, sorted(os.listdir(str(i)))
    sys.stdout.write("x")
    globals()[f"keep{i}"] = context
""", tmp_path)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out == "x" * 3, err


def writes_outside(tree):
    """Lines of calls that write a file, and are inside neither `with atomic_path(...)` nor a temporary folder."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(
                safe in ast.unparse(item.context_expr) for item in node.items for safe in ("atomic_path", "TemporaryDirectory")):
            inside |= {id(child) for child in ast.walk(node)}
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and id(node) not in inside
            and ast.unparse(node.func) != "self.save"
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) in WRITERS]


def test_every_write_goes_by_way_of_a_temporary_name():
    """Except the folders of models that the miniature's training ends with (models.py): the library that writes them takes a folder. And the set-up's stamp:
    a line, of which half means nothing. And the benchmark's pictures, in a temporary folder. And the problems on one page."""
    assert writes_outside(ast.parse("a.save(b)\nwith atomic_path(x) as y:\n    a.save(y)")) == [1]
    found = [f"{path.name}: {line}" for package in (*PACKAGES, "scripts") for path in sorted((ROOT / package).rglob("*.py"))
             if "tests" not in path.parts and path.name not in ("models.py", "setup.py", "benchmark.py", "minimal.py")
             for line in writes_outside(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == []


def test_an_interrupt_that_a_library_takes_for_an_error_is_still_one(tmp_path):
    process = in_one_process("""
import signal
from p2_ddim import guard

def main():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise f1.UserError("cannot load the weights") from None

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the foreground, wherever these tests run
guard.quiet_interrupts()
f1.run(main)
""", tmp_path)
    assert process.communicate(timeout=100) == ("", "stopped\n") and process.returncode == 130


@pytest.mark.parametrize("module, program, arguments", [
    ("p1_cfg_ddpm.figures", "-p1_figures", []), ("p2_ddim.figures", "-p2_figures", []),
    ("p3_clip_textual_inversion.figures", "-p3_figures", ["--runs", "r"]), ("p3_clip_textual_inversion.experiments.compare", "-p3_compare", ["--learned", "r"]),
    ("p3_clip_textual_inversion.zero_shot", "", [])])
def test_two_at_once_do_not_mix_their_files_in_one_folder(tmp_path, monkeypatch, module, program, arguments):
    """Of one program; another one's files are others, and it may."""
    command, files = (importlib.import_module(name) for name in (module, f"{module.split('.')[0]}.files"))
    for name in ("read_embeddings", "read_run"):
        monkeypatch.setattr(command, name, lambda *_: {}, raising=False)
    monkeypatch.setattr(command, "gather", lambda *_: ({}, {}, {}), raising=False)
    monkeypatch.setattr(sys, "argv", [module, "--output", str(tmp_path), *arguments])
    with files.lock(tmp_path, program), pytest.raises(SystemExit, match=f"^error: {tmp_path} is in use by process {os.getpid()} "):
        files.run(command.main)

    class Held(Exception):
        pass

    @contextlib.contextmanager
    def locked(*asked):
        with files.lock(*asked):
            raise Held
        yield

    monkeypatch.setattr(command, "lock", locked)
    with files.lock(tmp_path, "-another_program"), pytest.raises(Held):
        command.main()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("module, program, arguments", [("p1_cfg_ddpm.pareto", "-p1_pareto", []),
                                                        ("p2_ddim.sweep", "-p2_sweep", ["--measure", "distance"])])
def test_two_at_once_do_not_add_their_rows_to_one_file(tmp_path, monkeypatch, module, program, arguments):
    command, files = (importlib.import_module(name) for name in (module, f"{module.split('.')[0]}.files"))
    monkeypatch.setattr(command, "compare", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(sys, "argv", [module, "--output", str(tmp_path / "rows.json"), *arguments])
    with files.lock(tmp_path, program), pytest.raises(SystemExit, match=f"^error: {tmp_path} is in use by process {os.getpid()} "):
        files.run(command.main)
