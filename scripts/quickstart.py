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
    out, face = args.output, ROOT / "hw2_data" / "mini" / "face"
    digits = [stage("P1 1/3: draw 1,000 guided digits", "p1_cfg_ddpm.inference", out / "p1"),
              stage("P1 2/3: grade them", "p1_cfg_ddpm.evaluate", out / "p1", "--report", out / "p1_grade"),
              stage("P1 3/3: show them", "p1_cfg_ddpm.figures", "--output", out / "p1_figures")]
    faces = [stage("P2 1/2: draw ten faces", "p2_ddim.inference", face / "noise", out / "p2", face / "UNet.pt"),
             stage("P2 2/2: grade them", "p2_ddim.evaluate", out / "p2", face / "GT", "--report", out / "p2_grade")]
    prompts = ROOT / "hw2_data" / "mini" / "textual_inversion" / "input.json"
    clip = [stage("P3 1/3: classify 500 pictures by CLIP", "p3_clip_textual_inversion.zero_shot", "--output", out / "p3_clip")]
    words = [stage("P3 2/3: draw with learned words", "p3_clip_textual_inversion.inference", prompts, out / "p3"),
             stage("P3 3/3: grade the pictures", "p3_clip_textual_inversion.evaluate", out / "p3", prompts, "--report", out / "p3_grade")]
    p1, p2, p3 = (json.loads((out / f"{problem}_grade" / "grade.json").read_text(encoding="utf-8")) for problem in ("p1", "p2", "p3"))
    zero_shot = json.loads((out / "p3_clip" / "results.json").read_text(encoding="utf-8"))
    print(f"\n{'problem':29} {'score':42} {'seconds':>7}  pictures")
    score = f"accuracy {p1['mnistm']['accuracy']:.1%} MNIST-M, {p1['svhn']['accuracy']:.1%} SVHN"
    print(f"{'P1 guided DDPM on digits':29} {score:42} {sum(digits):7.0f}  {out / 'p1_figures'}/p1_grid_mnistm.png, p1_grid_svhn.png")
    score = f"mean squared error {p2['mean_mse']:.4f} (limit 20)"
    print(f"{'P2 DDIM faces (miniature)':29} {score:42} {sum(faces):7.0f}  {out / 'p2_grade' / 'comparison.png'}")
    score = f"top-1 {zero_shot['top1']:.1%}, top-5 {zero_shot['top5']:.1%} of 50 classes"
    print(f"{'P3 CLIP zero-shot (miniature)':29} {score:42} {sum(clip):7.0f}  {out / 'p3_clip' / 'examples.png'}")
    score = f"{p3['passed']} of {p3['judged']} prompts pass"
    print(f"{'P3 learned words (miniature)':29} {score:42} {sum(words):7.0f}  {out / 'p3_grade' / 'best.png'}")


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
