"""Runs and grades the main job of each problem on the bundled models, and says where the pictures are."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "out", help="folder for everything that is made")
    args = parser.parse_args()
    images, report, pictures = args.output / "p1", args.output / "p1_grade", args.output / "p1_figures"
    seconds = [stage("P1 1/3: draw 1,000 guided digits", "p1_cfg_ddpm.inference", images),
               stage("P1 2/3: grade them", "p1_cfg_ddpm.evaluate", images, "--report", report),
               stage("P1 3/3: show them", "p1_cfg_ddpm.figures", "--output", pictures)]
    scores = json.loads((report / "grade.json").read_text(encoding="utf-8"))
    print(f"\n{'problem':28} {'score':42} {'seconds':>7}  pictures")
    score = f"accuracy {scores['mnistm']['accuracy']:.1%} MNIST-M, {scores['svhn']['accuracy']:.1%} SVHN"
    print(f"{'P1 guided DDPM on digits':28} {score:42} {sum(seconds):7.0f}  {pictures / 'p1_grid_mnistm.png'}, {pictures / 'p1_grid_svhn.png'}")


def stage(title, module, *arguments):
    """Runs one module of the project; its seconds."""
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=False).returncode  # env.sh set PYTHONPATH
    if code:
        sys.exit(code)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
