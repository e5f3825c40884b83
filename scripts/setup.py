"""Finds or makes the environment of this project, and prints its interpreter. Plain Python: it runs before anything is installed.

An environment is good when it has every package of requirements.txt (with --dev also of requirements-dev.txt). Looked at in this
order: the folder in $VENV, .venv, the Python that runs this. Where none is good, the packages are installed into $VENV or .venv.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
NEEDED_GB = 2  # with a CPU build of torch; a CUDA build takes about 6

# Run by the interpreter in question: exits with 1 if a requirement (lines "name>=1.2") is not met.
CHECK = """
import sys
from importlib.metadata import PackageNotFoundError, version
def numbers(text):
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:3]]
for line in sys.argv[1:]:
    name, _, oldest = line.partition(">=")
    try:
        if numbers(version(name)) < numbers(oldest):
            sys.exit(1)
    except PackageNotFoundError:
        sys.exit(1)
"""


def main():
    parser = argparse.ArgumentParser(description="Sets up the environment of this project, and prints its interpreter.")
    parser.add_argument("--dev", action="store_true", help="also what the tests and the miniature's builders need")
    args = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        fail(f"Python {sys.version.split()[0]} is too old; install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer and run this again")
    files = [ROOT / "requirements.txt"] + ([ROOT / "scripts" / "requirements-dev.txt"] if args.dev else [])
    requirements = [line.split("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    requirements = [line for line in requirements if line]
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()

    venv = Path(os.environ.get("VENV") or ROOT / ".venv").absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / ".requirements"  # the digests that were found to be met, a line each
    if python.exists():
        if not (stamp.exists() and digest in stamp.read_text().split()):
            if not meets(python, requirements):
                install(python, files)
            with open(stamp, "a") as file:
                file.write(digest + "\n")
    elif not os.environ.get("VENV") and meets(sys.executable, requirements):
        python = sys.executable
    else:
        make_venv(venv)
        install(python, files)
        stamp.write_text(digest + "\n")
    print(python)


def meets(python, requirements):
    return subprocess.run([str(python), "-c", CHECK, *requirements], check=False, capture_output=True).returncode == 0


def make_venv(venv):
    folder = next(p for p in [venv, *venv.parents] if p.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        fail(f"only {free:.1f} GB free on the disk of {folder}; the packages take {NEEDED_GB} GB (with CUDA about 6). "
             "Free some, or set VENV to a folder elsewhere")
    say(f"making the virtual environment {venv}")
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False, capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        fail(f"cannot make a virtual environment in {venv}: {last_line(result)}")


def install(python, files):
    say(f"installing {' and '.join(str(f.relative_to(ROOT)) for f in files)} (once; some minutes)")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for file in files:
        command += ["-r", str(file)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        output = result.stdout + result.stderr
        if "No space left" in output:
            fail("the disk is full: free about 6 GB, or set VENV to a folder on another disk, and run this again")
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
    main()
