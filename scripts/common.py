"""What the scripts share: from P1's files.py and guard.py, which need Python alone, and starting a module of the project."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from p1_cfg_ddpm import files, guard  # noqa: E402
from p1_cfg_ddpm.files import UserError, atomic_path, run  # noqa: E402, F401

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # one of the scripts is run, and not imported by a test
    guard.open_streams()
    guard.quiet_interrupts()


def fail(text):
    sys.exit(f"error: {files.shown(text)}")


def read_json(path, make=dict):
    """The content of a JSON file that a run wrote. make: what objects become, of their dict."""
    try:
        return files.read_json(path, make)
    except UserError as error:
        fail(f"{error}; run the script that writes it again")


def write_whole(path, text):
    try:
        files.write_whole(path, text)
    except UserError as error:
        fail(str(error))


def module(name, *arguments):
    """Runs a module of the project, and returns its exit code. It is interrupted with this program, and has then said so."""
    return guard.call([sys.executable, ROOT / "scripts" / "run.py", name, *arguments])
