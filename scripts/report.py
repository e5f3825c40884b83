"""Renders report/text.md, with the numbers of report/results/*.json put in, as report/report.md and as one self-contained page, report/index.html.

Before that it draws the figures again and classifies by CLIP (some minutes; --render leaves this out). Where the course's data is in hw2_data/, its face
network draws P2's figures and is graded, and its pictures are classified too, by OpenAI's CLIP from the hub: a matter for a GPU. Benchmarks and trainings are
not run again: scripts/benchmark.sh, p3_train.sh, p3_multi.sh are.
"""

import argparse
import base64
import html
import json
import re
import shutil
import string
import tempfile
from pathlib import Path

import markdown
from PIL import Image

from common import ROOT, UserError, atomic_path, fail, module, read_json, run, write_whole

REPORT = ROOT / "report"
COURSE_DATA = ROOT / "hw2_data"
COURSE_MODELS = {"ViT-B-32": "b32", "ViT-L-14": "l14"}  # that the assignment asks for, and their names in report/results
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1d2127; --ground: #fff; --line: #d4d9df; --soft: #f3f5f7; --accent: #1f6feb }
@media (prefers-color-scheme: dark) { :root { --text: #e3e6ea; --ground: #15181c; --line: #353b43; --soft: #1f242a; --accent: #79b0ff } }
body { margin: 0 auto; padding: 1rem; max-width: 54rem; font: 1rem/1.6 system-ui, sans-serif; color: var(--text); background: var(--ground) }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .6rem } h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem }
a { color: var(--accent) } code { background: var(--soft); padding: .1em .3em; border-radius: .25em; font-size: .9em; overflow-wrap: anywhere }
.table { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 } th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left }
th { background: var(--soft) } figure { margin: 1.2rem 0 } figure img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem }
figcaption { font-size: .9rem; opacity: .8 } .window { overflow: hidden; position: relative; max-width: 100%; border-radius: .3rem; background: #fff }
.window img { position: absolute; max-width: none } label { display: flex; gap: .8rem; align-items: center; margin: .4rem 0; flex-wrap: wrap }
input[type=range] { flex: 1; min-width: 10rem; accent-color: var(--accent) } output { min-width: 6rem }
</style>
<body>
$body
<script>
for (const figure of document.querySelectorAll("figure[data-slider]")) {
  const s = JSON.parse(figure.dataset.slider), range = figure.querySelector("input"), image = figure.querySelector(".window img");
  const box = figure.querySelector(".window"), out = figure.querySelector("output");
  const show = () => {
    const zoom = Math.min(3, box.parentElement.clientWidth / s.width), i = Number(range.value);
    const cell = s.along === "rows" ? [s.left, s.top + i * s.step] : [s.left + i * s.step, s.top];
    box.style.width = s.width * zoom + "px"; box.style.height = s.height * zoom + "px";
    image.style.width = s.full * zoom + "px"; image.style.left = -cell[0] * zoom + "px"; image.style.top = -cell[1] * zoom + "px";
    image.style.imageRendering = zoom > 1 ? "pixelated" : "auto"; out.value = s.labels[i];
  };
  range.addEventListener("input", show); window.addEventListener("resize", show); show();
}
</script>
</html>
"""


MISSING = "not measured here"


class Missing(dict):
    """What stands for the results of a run that has not happened: every key, to any depth, reads "not measured here"."""

    def __missing__(self, key):
        return self[str(key)] if isinstance(key, int) and str(key) in self else Missing()  # JSON's keys are texts, format's digits numbers

    def __format__(self, spec):
        return MISSING


def read_results(folder):
    """{file name: content} of every JSON."""
    results = Missing()
    for path in sorted(folder.glob("*.json")):
        results[path.stem] = read_json(path, Missing)
    return results


class Filler(string.Formatter):
    """Numbers are put in as they are formatted; texts, which come from files and may hold anything, so that they are shown letter by letter, in Markdown
    and in HTML."""

    def format_field(self, value, spec):
        formatted = super().format_field(value, spec)
        if isinstance(value, (int, float, Missing)):
            return formatted
        return re.sub(r"[^\w\s.,:;%/@=-]", lambda match: f"&#{ord(match[0])};", " ".join(formatted.split())).replace("_", "&#95;")


def fill_in(text, results):
    """The text with {file[key][key]:format} replaced by numbers; {{ and }} are braces."""
    try:
        return re.sub(rf" \({MISSING}( to {MISSING})?\)", "", Filler().vformat(text, (), results))  # an interval of nothing
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        fail(f"report/text.md asks for a number that report/results has not: {type(error).__name__}: {error}")


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def figure(match):
    """<img> of a Markdown picture -> a <figure>; with a title "slider ...", one with a slider over the picture's columns or rows."""
    attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[0]))
    path, caption = REPORT / attributes["src"], attributes.get("alt", "")
    title = html.unescape(attributes.get("title", ""))
    if not title.startswith("slider "):
        return f'<figure><img src="{data_url(path)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    along, left, top, labels = title.removeprefix("slider ").split(" ", 3)
    left, top, labels = int(left), int(top), [label.strip() for label in labels.split(",")]
    with Image.open(path) as image:  # what is right of `left` and below `top` is shared evenly by the labels
        width, height = image.width - left, image.height - top
        step = (width if along == "columns" else height) // len(labels)
        settings = {"along": along, "left": left, "top": top, "step": step, "width": step if along == "columns" else width,
                    "height": step if along == "rows" else height, "full": image.width, "labels": labels}
    return (f'<figure data-slider="{html.escape(json.dumps(settings))}"><div class="window"><img src="{data_url(path)}" alt="{caption}"></div>'
            f'<label><input type="range" min="0" max="{len(labels) - 1}" value="0" aria-label="{caption}"><output></output></label>'
            f"<figcaption>{caption}</figcaption></figure>")


def render(text):
    """Writes report.md and index.html. A picture that is not there is said to be missing."""
    text = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)", lambda match: match[0] if (REPORT / match[2]).is_file() else f"*{match[1]}: not drawn yet*\n", text)
    write_whole(REPORT / "report.md", re.sub(r'(\]\([^)\s]+) "slider [^"]*"\)', r"\1)", text))
    body = markdown.markdown(text, extensions=["tables"])
    body = re.sub(r"<table>.*?</table>", lambda match: f'<div class="table">{match[0]}</div>', body, flags=re.DOTALL)
    body = re.sub(r"(?:<p>)?<img [^>]*/?>(?:</p>)?", figure, body)
    title = re.search(r"<h1>(.*?)</h1>", body)
    write_whole(REPORT / "index.html", string.Template(PAGE).substitute(title=title[1] if title else "Report", body=body))


def stage(title, name, *arguments, needed=True):
    """Runs a module of the project. Whether it succeeded; where it is needed, its failure is the report's."""
    print(f"== {title}", flush=True)
    failed = module(name, *arguments)
    if failed and needed:
        fail(f"{name} failed; the report was not written")
    return not failed


def keep(path, to):
    try:
        with atomic_path(to) as temporary:
            shutil.copyfile(path, temporary)
    except UserError as error:
        fail(str(error))


def draw_zero_shot():
    """The miniature on its pictures; where the course's are there, OpenAI's two models on them, from hw2_data/weights or the hub."""
    module, pictures = "p3_clip_textual_inversion.zero_shot", COURSE_DATA / "clip_zeroshot"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stage("CLIP zero-shot, miniature", module, "--templates", "drawing", "drawing7", "plain", "photo", "course", "imagenet7", "openai80",
              "--transductive", "--shots", 1, 2, 4, "--output", folder)
        keep(folder / "results.json", REPORT / "results" / "p3_zero_shot.json")
        for name in ("examples", "confusion", "calibration", "retrieval"):
            keep(folder / f"{name}.png", REPORT / "figures" / f"p3_zero_shot_{name}.png")
        if pictures.is_dir():
            files = [COURSE_DATA / "weights" / f"{name}.pt" for name in COURSE_MODELS]
            models = files if all(path.is_file() for path in files) else COURSE_MODELS
            flags = [part for model in models for part in ("--model", model)] + ([] if models is files else ["--pretrained", "openai"])
            captions = ("photo", "plain", "course", "imagenet7", "openai80")
            if stage("CLIP zero-shot, the course's data", module, "--data", pictures, *flags, "--templates", *captions, "--transductive", "--output", folder,
                     needed=False):
                for model, name in COURSE_MODELS.items():
                    keep(folder / model / "results.json", REPORT / "results" / f"p3_zero_shot_{name}.json")
                keep(folder / "models.json", REPORT / "results" / "p3_zero_shot_models.json")
                keep(folder / model / "examples.png", REPORT / "figures" / "p3_zero_shot_course.png")


def draw_everything(words):
    faces = COURSE_DATA / "face"
    stage("figures of P1", "p1_cfg_ddpm.figures")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if (faces / "UNet.pt").is_file():
            stage("figures of P2, the course's network", "p2_ddim.figures", "--noise", faces / "noise", "--checkpoint", faces / "UNet.pt")
            stage("P2, the course's faces", "p2_ddim.inference", faces / "noise", folder / "faces", faces / "UNet.pt")
            stage("P2, their grade", "p2_ddim.evaluate", folder / "faces", faces / "GT", "--report", folder)
            keep(folder / "grade.json", REPORT / "results" / "p2_course.json")
        else:
            stage("figures of P2, miniature", "p2_ddim.figures")
    draw_zero_shot()
    if words:
        stage("figures of P3", "p3_clip_textual_inversion.figures", "--runs", words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only put text, numbers and figures together again")
    parser.add_argument("--words", type=Path, default=None, metavar="DIR", help="a folder of scripts/p3_train.sh, whose figures to draw")
    parser.add_argument("--only", choices=["zero-shot"], default=None, help="draw and measure this part only; the others keep their figures and numbers")
    args = parser.parse_args()
    if args.words and not (args.words / "0" / "history.json").is_file():
        fail(f"{args.words} is no folder of scripts/p3_train.sh: it has no 0/history.json")
    if args.only:
        draw_zero_shot()
    elif not args.render:
        draw_everything(args.words)
    try:
        render(fill_in((REPORT / "text.md").read_text(encoding="utf-8"), read_results(REPORT / "results")))
    except OSError as error:
        fail(f"cannot read the report's parts: {error}")
    print(f"wrote {REPORT / 'report.md'} and {REPORT / 'index.html'}")


if __name__ == "__main__":
    run(main)
