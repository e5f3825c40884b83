"""Interrupts commands that write, at random moments, and looks at what is left: whole files or none, and what was there before untouched. Run by hand.

    python scripts/tests/interrupts.py --count 200
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from p1_cfg_ddpm.files import LOCK, TEMPORARY  # noqa: E402

MINI = ROOT / "hw2_data" / "mini"
COMMANDS = {  # a module, and its arguments with OUT for the folder
    "P1 draws": ("p1_cfg_ddpm.inference", ["OUT", "--images-per-digit=2", "--digits", "3", "--steps=2"]),
    "P2 draws": ("p2_ddim.inference", [MINI / "face" / "noise", "OUT", MINI / "face" / "UNet.pt", "--steps=2"]),
    "P2 grades": ("p2_ddim.evaluate", [MINI / "face" / "GT", MINI / "face" / "GT", "--report", "OUT"]),
    "P3 draws": ("p3_clip_textual_inversion.inference", [MINI / "textual_inversion" / "input.json", "OUT", "--num-images=1", "--steps=2"]),
    "P3 classifies": ("p3_clip_textual_inversion.zero_shot", ["--output", "OUT"]),
}


def wrong(folder):
    """What an interrupt left that it must not: half a picture, a temporary file, the lock, a file of the user's changed."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if TEMPORARY.fullmatch(path.name) or path.name == LOCK:
            found.append(f"left {path}")
        elif path.suffix == ".png":
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError as error:
                found.append(f"{path}: {error}")
    if (folder / "thesis.txt").read_text() != "the user's" or (folder / ".movie.mkv.part").read_text() != "the user's":
        found.append("the user's file")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="interrupts in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=float, default=8.0, help="seconds after the start at most")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and what it starts would, too
    rng, faults, codes = random.Random(args.seed), [], {}
    for number in range(args.count):
        name = list(COMMANDS)[number % len(COMMANDS)]
        module, arguments = COMMANDS[name]
        folder = Path(tempfile.mkdtemp()) / "out"
        folder.mkdir()
        for own in ("thesis.txt", ".movie.mkv.part"):
            (folder / own).write_text("the user's")
        command = [sys.executable, str(ROOT / "scripts" / "run.py"), module, *(str(folder) if part == "OUT" else str(part) for part in arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(0.02, args.longest))
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=100)[1]
        codes[process.returncode] = codes.get(process.returncode, 0) + 1
        problems = wrong(folder) + (["a traceback"] if "Traceback" in err else [])
        problems += [] if process.returncode in (0, 130, -2) else [f"exit code {process.returncode}"]
        faults += [f"{name}: {problem}" for problem in problems]
        shutil.rmtree(folder.parent)
        print(f"{number + 1} {name}: {process.returncode}" + "".join(f"; {problem}" for problem in problems), flush=True)
    print(f"{args.count} interrupts, exit codes {codes}, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
