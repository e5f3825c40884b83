"""Finds or makes the environment of this project, and prints its interpreter. Plain Python: it runs before anything is installed.

An environment is good when it has every package of requirements.txt (with --dev also of requirements-dev.txt, with --demo of
requirements-demo.txt). Looked at in this order: the folder in $VENV, .venv, the Python that runs this. Where none is good, the
packages are installed into $VENV or .venv.
"""

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
NEEDED_GB = 2  # with a CPU build of torch; a CUDA build takes about 6

# Run by the interpreter in question: exits with 1 if a requirement (lines "name>=1.2") is not met.
CHECK = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]  # nothing from the folder one stands in
from importlib.metadata import PackageNotFoundError, version
def numbers(text):
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:3]]
for line in sys.argv[1:]:
    name, _, oldest = line.partition(">=")
    try:
        if numbers(version(name)) < numbers(oldest):
            sys.exit(1)
        if name == "torchvision" and version(name).partition("+")[2] != version("torch").partition("+")[2]:  # one of them a CPU build
            import torchvision  # which often fails then, and ends this
    except PackageNotFoundError:
        sys.exit(1)
"""


def main():
    parser = argparse.ArgumentParser(description="Sets up the environment of this project, and prints its interpreter.")
    parser.add_argument("--dev", action="store_true", help="also what the tests and the miniature's builders need")
    parser.add_argument("--demo", action="store_true", help="also what the page to play with needs")
    args = parser.parse_args()
    files = [ROOT / "requirements.txt"] + [ROOT / "scripts" / f"requirements-{name}.txt" for name in ("dev", "demo") if getattr(args, name)]
    requirements = [line.split("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    requirements = [line for line in requirements if line]

    venv = Path(os.environ.get("VENV") or ROOT / ".venv").absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if os.path.exists(python) and meets(python, requirements):
        pass
    elif not os.environ.get("VENV") and not os.path.exists(python) and sys.version_info >= OLDEST_PYTHON and meets(sys.executable, requirements):
        python = sys.executable
    else:
        with alone(venv):
            if not (os.path.exists(python) and meets(python, requirements)):  # another call may have installed them meanwhile
                if not has_pip(python):  # none yet, or one whose making was interrupted
                    if sys.version_info < OLDEST_PYTHON:
                        fail(f"Python {sys.version.split()[0]} is too old; install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer and run this again")
                    make_venv(venv)
                install(python, files)
        if not meets(python, requirements):
            fail(f"torch and torchvision in {Path(python).parent.parent} do not fit together, as one of them is a CPU build: install both anew from one "
                 "package index, or set VENV to a new folder")
    print(python)


@contextmanager
def alone(venv):
    """Around the making of an environment: a second call, such as one for each of many folders, waits for the first."""
    folder = next(p for p in [venv, *venv.parents][1:] if os.path.isdir(p))
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)  # a folder can be locked itself, and no file is left
    except (ImportError, OSError):  # another system, or a folder that tells nobody what is in it
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another call is setting up: waiting for it")
            with suppress(OSError):  # a disk that knows no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def meets(python, requirements):
    return works([str(python), "-c", CHECK, *requirements])


def has_pip(python):
    return os.path.exists(python) and works([str(python), "-m", "pip", "--version"])


def works(command):
    """Whether a command succeeds; it runs in the project's folder, since Python's -m looks first where it stands."""
    try:
        return subprocess.run(command, check=False, capture_output=True, cwd=ROOT).returncode == 0
    except OSError:  # no program, or one of another kind of machine
        return False


def make_venv(venv):
    ours = not os.path.lexists(venv)
    if not ours and not (venv / "pyvenv.cfg").is_file() and not is_empty(venv):
        fail(f"{venv} is there and is no virtual environment; set VENV to an empty or a new folder")
    folder = next(p for p in [venv, *venv.parents] if os.path.exists(p))
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        fail(f"only {free:.1f} GB free on the disk of {folder}; the packages take {NEEDED_GB} GB (with CUDA about 6). "
             "Free some, or set VENV to a folder elsewhere")
    say(f"making the virtual environment {venv}")
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        if ours:
            shutil.rmtree(venv, ignore_errors=True)
        if "ensurepip is not" in result.stdout + result.stderr:  # Debian's Python comes in parts
            fail("this Python lacks its module venv: sudo apt install python{}.{}-venv, and run this again".format(*sys.version_info))
        fail(f"cannot make a virtual environment in {venv}: {last_line(result)}")


def is_empty(folder):
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def install(python, files):
    say(f"installing {' and '.join(str(f.relative_to(ROOT)) for f in files)} (once; some minutes)")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for file in files:
        command += ["-r", str(file)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        output = result.stdout + result.stderr
        if "No space left" in output:
            fail("the disk is full: free about 6 GB, or set VENV to a folder on another disk, and run this again")
        if not os.access(Path(python).parent, os.W_OK):
            fail(f"{Path(python).parent.parent} lacks packages of requirements.txt and cannot be written to; set VENV to a folder of your own")
        if "connection broken" in output:
            fail("pip cannot reach the package index: is there internet? (a mirror or a proxy: PIP_INDEX_URL, HTTPS_PROXY)")
        fail(f"pip could not install the packages: {last_line(result)}")


def last_line(result):
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1].strip()


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(text):
    sys.exit(f"error: {text}")


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        main()  # says so, unless there is an environment already, which has a Python of its own
    else:
        from common import run

        run(main)
