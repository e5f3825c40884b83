"""Runs and grades the main job of each problem on the bundled models (P1: on the one that is installed), and says where the pictures are.

Run again, it keeps what is there and newer than the code and the data that it is made by.
"""

import argparse
import sys
import time
from pathlib import Path

from common import ROOT, UserError, fail, files, module, read_json, run

CHALLENGE_IMAGES = 6  # pictures an entry; who takes part draws 25


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out", help="folder for everything that is made (default: out)")
    args = parser.parse_args()
    out = args.output.resolve()
    try:
        files.writable_folder(out)
        with files.lock(out):
            play(out)
    except UserError as error:
        fail(str(error))


def play(out):
    """All stages, and the table of their scores."""
    face, prompts, challenge = files.MINI / "face", files.MINI / "textual_inversion" / "input.json", files.MINI / "challenge" / "prompts.json"
    pictures = {"p1": [out / "p1" / domain / f"{digit}_{i:03d}.png" for domain in ("mnistm", "svhn") for digit in range(10) for i in range(1, 51)],
                "p2": [out / "p2" / f"{noise.stem}.png" for noise in face.glob("noise/*.pt")],
                "p3": [out / "p3" / number / str(k) / f"source{number}_prompt{k}_{i}.png" for number, concept in read_json(prompts).items()
                       for k in range(len(concept["prompt"])) for i in range(25)],
                "p3_challenge": [out / "p3_challenge" / number / f"{i:02d}.png" for number in read_json(challenge) for i in range(CHALLENGE_IMAGES)]}
    digits = [stage("P1 1/3: draw 1,000 guided digits", pictures["p1"], "p1_cfg_ddpm.inference", out / "p1", "--overwrite"),
              stage("P1 2/3: grade them", [out / "p1_grade" / "grade.json"], "p1_cfg_ddpm.evaluate", out / "p1", "--report", out / "p1_grade",
                    after=pictures["p1"]),
              stage("P1 3/3: show them", [out / "p1_figures" / "p1_reverse_svhn.png"], "p1_cfg_ddpm.figures", "--output", out / "p1_figures")]
    faces = [stage("P2 1/2: draw ten faces", pictures["p2"], "p2_ddim.inference", face / "noise", out / "p2", face / "UNet.pt", "--overwrite"),
             stage("P2 2/2: grade them", [out / "p2_grade" / "comparison.png"], "p2_ddim.evaluate", out / "p2", face / "GT", "--report", out / "p2_grade",
                   after=pictures["p2"])]
    clip = [stage("P3 1/5: classify 500 pictures by CLIP", [out / "p3_zero_shot" / "examples.png"], "p3_clip_textual_inversion.zero_shot",
                  "--output", out / "p3_zero_shot")]
    words = [stage("P3 2/5: draw with learned words", pictures["p3"], "p3_clip_textual_inversion.inference", prompts, out / "p3", "--overwrite"),
             stage("P3 3/5: grade the pictures", [out / "p3_grade" / "best.png"], "p3_clip_textual_inversion.evaluate",
                   out / "p3", prompts, "--report", out / "p3_grade", after=pictures["p3"])]
    several = [stage("P3 4/5: draw the later challenge's prompts, of several concepts each", pictures["p3_challenge"], "p3_clip_textual_inversion.inference",
                     challenge, out / "p3_challenge", "--num-images", CHALLENGE_IMAGES, "--overwrite"),
               stage("P3 5/5: grade them", [out / "p3_challenge_grade" / "best.png"], "p3_clip_textual_inversion.evaluate", out / "p3_challenge", challenge,
                     "--report", out / "p3_challenge_grade", after=pictures["p3_challenge"])]
    p1, p2, p3, p3_challenge = (read_json(out / f"{problem}_grade" / "grade.json") for problem in ("p1", "p2", "p3", "p3_challenge"))
    zero_shot = read_json(out / "p3_zero_shot" / "results.json")
    try:
        rows = [("P1 guided DDPM on digits", f"accuracy {p1['mnistm']['accuracy']:.1%} MNIST-M, {p1['svhn']['accuracy']:.1%} SVHN", digits,
                 f"{out / 'p1_figures'}/p1_grid_mnistm.png, p1_grid_svhn.png"),
                ("P2 DDIM faces (miniature)", f"mean squared error {p2['mean_mse']:.4f} (limit 20)", faces, out / "p2_grade" / "comparison.png"),
                ("P3 CLIP zero-shot (miniature)", f"top-1 {zero_shot['top1']:.1%}, top-5 {zero_shot['top5']:.1%} of 50 classes", clip,
                 out / "p3_zero_shot" / "examples.png"),
                ("P3 learned words (miniature)", f"{p3['passed']} of {p3['judged']} prompts pass", words, out / "p3_grade" / "best.png"),
                ("P3 later challenge (miniature)", f"image score {p3_challenge['image_score']:.1f}, text score {p3_challenge['text_score']:.1f}", several,
                 out / "p3_challenge_grade" / "best.png")]
    except (LookupError, TypeError, ValueError) as error:
        fail(f"a grade in {out} is not what this script wrote ({type(error).__name__}: {error}); delete that folder and run this again")
    print(f"\n{'problem':30} {'score':42} {'seconds':>9}  pictures")
    for problem, score, seconds, pictures in rows:
        print(f"{problem:30} {score:42} {f'{sum(seconds):.0f}' if any(seconds) else 'as it was':>9}  {pictures}")
    print(f"\nthe report, with every figure and number: {ROOT / 'report' / 'index.html'}")


def stage(title, results, name, *arguments, after=()):
    """Runs one module of the project, unless all `results` are there and newer than its code, the data and judges, and the files `after`. Its seconds."""
    print(f"\n== {title}", flush=True)
    data = ROOT / "hw2_data"
    sources = [*(ROOT / name.split(".")[0]).rglob("*.*"), *(data / "mini").rglob("*.*"), *(data / "weights").glob("*"), *data.glob("digits/*/*.csv")]
    made_by = [path for path in sources if path.is_file() and "__pycache__" not in path.parts and ".cache" not in path.parts]
    newest = max(path.stat().st_mtime for path in [*made_by, *(path for path in after if path.is_file())])
    if all(path.is_file() and path.stat().st_size and path.stat().st_mtime > newest for path in results):
        print(f"kept: {results[-1].parent}")
        return 0.0
    started = time.perf_counter()
    code = module(name, *arguments)
    if code:
        sys.exit(code)
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
