"""Interrupts commands that write, at random moments, and looks at what is left: whole files or none, and what was there before untouched. Run by hand.

    python scripts/tests/interrupts.py --count 200

A command that had ended before its moment came is not counted: it is begun again with an earlier one.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from p1_cfg_ddpm.files import LOCK, TEMPORARY  # noqa: E402

MINI = ROOT / "hw2_data" / "mini"
FACES, PROMPTS = MINI / "face", MINI / "textual_inversion" / "input.json"
COMMANDS = {  # a module, and its arguments with OUT for the folder, BEFORE for what it wrote when it was not interrupted
    "P1 draws": ("p1_cfg_ddpm.inference", ["OUT", "--images-per-digit=9", "--steps=2", "--batch-size=4"]),
    "P1 grades": ("p1_cfg_ddpm.evaluate", ["BEFORE", "--report", "OUT"]),
    "P1 trains": ("p1_cfg_ddpm.train", ["--data", MINI / "digits", "--output", "OUT", "--size=tiny", "--steps=400", "--batch-size=4", "--save-every=2",
                                        "--sample-every=9", "--validate-every=0"]),
    "P2 draws": ("p2_ddim.inference", [FACES / "noise", "OUT", FACES / "UNet.pt", "--steps=2", "--batch-size=1"]),
    "P2 grades": ("p2_ddim.evaluate", [FACES / "GT", FACES / "GT", "--report", "OUT"]),
    "P2 inverts": ("p2_ddim.edit", ["invert", FACES / "GT", "OUT", FACES / "UNet.pt", "--steps=2", "--batch-size=1"]),
    "P2 trains": ("p2_ddim.train", ["--data", FACES / "GT", "--output", "OUT", "--image-size=16", "--widths=32", "--attention=0", "--steps=400",
                                    "--batch-size=2", "--save-every=2", "--sample-every=9", "--validate-every=0"]),
    "P3 draws": ("p3_clip_textual_inversion.inference", [PROMPTS, "OUT", "--num-images=2", "--steps=2"]),
    "P3 learns": ("p3_clip_textual_inversion.train", [PROMPTS, "--output", "OUT", "--steps=60", "--batch-size=1", "--crops=1", "--save-every=1",
                                                      "--sample-every=20"]),
    "P3 classifies": ("p3_clip_textual_inversion.zero_shot", ["--output", "OUT", "--no-cache"]),
}


def damage(path):
    """What is wrong with a file, or None."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif not path.stat().st_size:
            return "empty"
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        return str(error)
    return None


def wrong(folder):
    """What an interrupt left that it must not: half a file, a temporary one, the lock, a file of the user's changed."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if TEMPORARY.fullmatch(path.name) or path.name == LOCK:
            found.append(f"left {path}")
        elif problem := damage(path):
            found.append(f"{path}: {problem}")
    if (folder / "thesis.txt").read_text() != "the user's" or (folder / ".movie.mkv.part").read_text() != "the user's":
        found.append("the user's file")
    return found


def command_of(name, folder, before):
    module, arguments = COMMANDS[name]
    places = {"OUT": folder, "BEFORE": before}
    return [sys.executable, str(ROOT / "scripts" / "run.py"), module, *(str(places.get(part, part)) for part in arguments)]


def interrupted(name, before, moment):
    """(exit code, what is wrong) of a command that was interrupted at a moment; (None, what is wrong) if it had ended before."""
    folder = Path(tempfile.mkdtemp()) / "out"
    folder.mkdir()
    for own in ("thesis.txt", ".movie.mkv.part"):
        (folder / own).write_text("the user's")
    process = subprocess.Popen(command_of(name, folder, before), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(moment)
    ended = process.poll() is not None
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=100)[1]
    problems = wrong(folder) + (["a traceback"] if "Traceback" in err else [])
    problems += [] if process.returncode in (0, 130, -2) else [f"exit code {process.returncode}: {err.strip()[-200:]}"]
    shutil.rmtree(folder.parent)
    return None if ended else process.returncode, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="interrupts in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=float, default=8.0, help="seconds after the start at most")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and what it starts would, too
    rng, faults, codes, late = random.Random(args.seed), [], {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        before = Path(temporary) / "before"
        subprocess.run(command_of("P1 draws", before, None), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in range(args.count):
            name, longest, code = list(COMMANDS)[number % len(COMMANDS)], args.longest, None
            while code is None:
                moment = rng.uniform(0.02, longest)
                code, problems = interrupted(name, before, moment)
                faults += [f"{name}: {problem}" for problem in problems]
                late, longest = late + (code is None), moment
                said = "had ended" if code is None else f"{code}"
                print(f"{number + 1} {name} at {moment:.2f} s: {said}" + "".join(f"; {problem}" for problem in problems), flush=True)
            codes[code] = codes.get(code, 0) + 1
    print(f"{args.count} interrupts, exit codes {codes}, {late} more had ended before; {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
