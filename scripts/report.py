"""Makes the report: report/report.md, and report/index.html, one self-contained page, of report/text/ and the numbers of report/results/*.json.

The texts are Jinja templates in Markdown; the page is by report/template.html. Before that the figures are drawn again, and CLIP classifies (some minutes;
--render leaves this out). Where the course's data is in hw2_data/, its face network draws P2's figures and is graded, and its pictures are classified too, by
OpenAI's CLIP from hw2_data/weights or the hub: a matter for a GPU. Benchmarks and trainings are not run again: scripts/benchmark.sh, p3_train.sh and
p3_several.sh do that.
"""

import argparse
import base64
import html
import json
import re
import shutil
import tempfile
import traceback
from pathlib import Path

import jinja2
import markdown
from markupsafe import Markup
from PIL import Image

from common import ROOT, UserError, atomic_path, fail, module, read_json, run, write_whole

REPORT = ROOT / "report"
COURSE_DATA = ROOT / "hw2_data"
COURSE_MODELS = {"ViT-B-32": "b32", "ViT-L-14": "l14"}  # that the assignment asks for, and their names in report/results
TEXTS = [REPORT / "text" / f"{name}.md" for name in ("intro", "p1", "p2", "p3")]
RESULTS = {  # what they may take numbers from, and the command that measures it
    "p1_benchmark": "bash scripts/p1_benchmark.sh",
    "p1_pareto": "python -m p1_cfg_ddpm.pareto",
    "p2_benchmark": "bash scripts/p2_benchmark.sh",
    "p2_course": "bash scripts/report.sh",
    "p2_exact": "python -m p2_ddim.edit measure --count 4 --batch-size 4",
    "p2_figures": "bash scripts/p2_figures.sh",
    "p2_quality": "python -m p2_ddim.quality --dtype bf16",
    "p2_samplers": "python -m p2_ddim.sweep",
    "p3_benchmark": "bash scripts/p3_benchmark.sh",
    "p3_compare": "python -m p3_clip_textual_inversion.experiments.compare --learned runs/p3 runs/p3_seed1 runs/p3_seed2",
    "p3_dreambench": "bash scripts/p3_dreambench.sh",
    "p3_miniature": "python -m p3_clip_textual_inversion.miniature.scores --judge runs/judge",
    "p3_several": "bash scripts/p3_several.sh",
    "p3_together": "python -m p3_clip_textual_inversion.miniature.together",
    "p3_words": "python -m p3_clip_textual_inversion.miniature.words",
    "p3_zero_shot": "bash scripts/report.sh --only zero-shot",
    "p3_zero_shot_b32": "bash scripts/report.sh --only zero-shot",
    "p3_zero_shot_l14": "bash scripts/report.sh --only zero-shot",
    "memory": "bash scripts/memory.sh",
}
MISSING = "not measured here"
JINJA = {"undefined": jinja2.StrictUndefined, "autoescape": True, "trim_blocks": True, "lstrip_blocks": True}


class Missing(jinja2.ChainableUndefined):
    """What stands for the results of a run that has not happened: what is looked up in it, to any depth, is as little measured; loops over it do nothing."""

    def __str__(self):
        return MISSING


def read_results(folder):
    """{name: content} of RESULTS' JSON files, `Missing` for those that are not there."""
    return {name: read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else Missing(name=name) for name in RESULTS}


def measured(value):
    """Whether there is a number. A misspelt key is an error, as it is no number that a run could bring."""
    if isinstance(value, jinja2.Undefined):
        return str(value) != MISSING
    return value is not None


def put(value):
    """What {{ }} puts into the text. Texts, which come from files and may hold anything, are shown letter by letter, in Markdown and in HTML."""
    if isinstance(value, Markup):
        return value
    if not measured(value):
        return Markup(MISSING)
    if isinstance(value, str):
        return Markup(re.sub(r"[^\w\s.,:;%/@=+(){}'-]", lambda match: f"&#{ord(match[0])};", " ".join(value.split())).replace("_", "&#95;"))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.60} needs a format, such as |fixed(1) or |percent")
    return Markup(f"{value:,}")


def fixed(value, digits=0, sign=""):
    """A number with so many digits after the point; sign "+" shows it always."""
    return Markup(f"{value:{sign},.{digits}f}") if measured(value) else Markup(MISSING)


def percent(value, digits=1, sign=""):
    return Markup(f"{100 * value:{sign}.{digits}f}\N{NO-BREAK SPACE}%") if measured(value) else Markup(MISSING)


def small(value):
    """A number of any size by two digits, such as a p."""
    return Markup(f"{value:.2g}") if measured(value) else Markup(MISSING)


def share(value, interval, digits=1, sign=""):
    """A percentage and its interval, which stay on one line."""
    if not measured(value):
        return Markup(MISSING)
    return Markup("{} ({} to {})".replace(" ", "\N{NO-BREAK SPACE}")).format(*(percent(number, digits, sign) for number in (value, *interval)))


def source(name, results, flags=""):
    """The command that measures a file of results, and on what it did."""
    command, content = f"{RESULTS[name]} {flags}".strip(), results[name]
    if not measured(content):
        return Markup(f"`{command}`")
    parts = [part for part in (content, *content.values()) if isinstance(part, dict)]
    own = str(next((part["command"] for part in parts if "command" in part), ""))  # as it was given, where the file tells it
    if re.fullmatch(re.escape(RESULTS[name]) + r"[\w ./=+'-]*", own):  # a file may hold anything
        command = own
    machine = next((part["machine"] for part in parts if "machine" in part), {})
    told = [str(machine[key]) for key in ("device", "date") if key in machine]
    threads = [f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"] if "threads" in machine else []
    on = put(", ".join([*told[:1], *threads, *told[1:]]))
    return Markup(f"`{command}`" + (f" ({on})" if on else ""))


def prose(results):
    """The report's words with the results' numbers in place, Markdown."""
    return "".join(fill_in(path.read_text(encoding="utf-8"), results, f"report/text/{path.name}") for path in TEXTS)


def fill_in(text, results, name="the text"):
    """The text, a Jinja template, with the results' numbers in place. One line tells what it asks for and the results do not have."""
    environment = jinja2.Environment(finalize=put, keep_trailing_newline=True, **JINJA)
    environment.filters |= {"fixed": fixed, "percent": percent, "small": small, "mean": lambda values: reduced(values, lambda v: sum(v) / len(v)),
                            "lowest": lambda values: reduced(values, min)}
    environment.globals |= {"share": share, "source": lambda name, flags="": source(name, results, flags), **results}
    try:
        return environment.from_string(text).render()
    except (jinja2.TemplateError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        fail(f"{name}, line {line}, asks for what report/results has not: {type(error).__name__}: {error}")


def reduced(values, by):
    """by(values), where they are there."""
    values = list(values)
    return by(values) if values else Missing()


def figure_of(address, alt, caption, seen):
    """What template.html needs to show a picture: its file as a data URL and its parts, as its own text tells them, as columns and rows of labels around
    a box of pixels. address: figures/NAME.png, where "#only=TEXT" leaves those parts whose title has the text, and "#slider" shows a column at a time."""
    name, _, fragment = address.partition("#")
    path = REPORT / name
    with Image.open(path) as image:
        parts, chart, (width, height) = json.loads(image.text.get("parts", "[]")), "Matplotlib" in image.text.get("Software", ""), image.size
    whole = not parts
    parts = [{"title": "", "label": "", "columns": [], "rows": []} | part for part in parts or [{"box": [0, 0, width, height]}]]
    if fragment.startswith("only="):
        parts = [part for part in parts if fragment.removeprefix("only=") in part["title"]] or parts
    first = path.stem not in seen
    seen.add(path.stem)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"id": path.stem, "first": first, "url": url, "width": width, "height": height, "alt": alt, "caption": caption, "chart": chart,
            "parts": parts, "whole": whole, "slider": fragment == "slider" and len(parts) == 1 and bool(parts[0]["columns"])}


def render(text):
    """Writes report.md and index.html. A picture that is not there is said to be missing."""
    pictures = re.compile(r'!\[([^\]]*)\]\(<?(figures/[^#)>"]*?)(#[^)>"]*)?>?(?: "([^"]*)")?\)')
    text = pictures.sub(lambda match: match[0] if (REPORT / match[2]).is_file() else f"*{match[1]}: not drawn yet*\n", text)
    write_whole(REPORT / "report.md", pictures.sub(as_markdown, text))
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(REPORT), **JINJA)
    converter, seen = markdown.Markdown(extensions=["tables", "toc", "md_in_html"]), set()
    body = converter.convert(text)
    body = body.replace("<table>", '<div class="table" tabindex="0" role="region" aria-label="table"><table>').replace("</table>", "</table></div>")
    intro, heading, rest = body.partition("<h2")
    (title,) = converter.toc_tokens or [{"name": "Report", "children": []}]
    page = environment.get_template("template.html").render(title=html.unescape(title["name"]), contents=title["children"], intro=pieces(intro, seen),
                                                            body=pieces(heading + rest, seen))
    write_whole(REPORT / "index.html", page)


def pieces(body, seen):
    """HTML as a list: its text, safe, and for paragraphs of pictures the list of what template.html needs to show them."""
    result = []
    for part in re.split(r"(<p>(?:<img [^>]*>\s*)+</p>)", body):
        tags = [{name: html.unescape(value) for name, value in re.findall(r'(\w+)="([^"]*)"', tag)} for tag in re.findall(r"<img [^>]*>", part)]
        result.append([figure_of(tag["src"], tag.get("alt", ""), tag.get("title", ""), seen) for tag in tags] or Markup(part))
    return result


def as_markdown(match):
    """A picture in report.md: its caption is written below it; a slider moves only on the page, and of a part the whole is linked."""
    alt, path, fragment, caption = match.groups()
    told = f"\n\n*{caption}*\n" if caption else "\n"
    if fragment:
        return f"{alt}: [on the page](index.html)." if fragment == "#slider" else f"[{alt}]({path}){told}"
    return f"![{alt}]({path}){told}"


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
    command, pictures = "p3_clip_textual_inversion.zero_shot", COURSE_DATA / "clip_zeroshot"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stage("CLIP zero-shot, miniature", command, "--templates", "drawing", "drawing7", "plain", "photo", "course", "imagenet7", "openai80",
              "--transductive", "--shots", 1, 2, 4, "--output", folder)
        keep(folder / "results.json", REPORT / "results" / "p3_zero_shot.json")
        for name in ("examples", "confusion", "calibration", "retrieval"):
            keep(folder / f"{name}.png", REPORT / "figures" / f"p3_zero_shot_{name}.png")
        if pictures.is_dir():
            files = [COURSE_DATA / "weights" / f"{name}.pt" for name in COURSE_MODELS]
            there = all(path.is_file() for path in files)
            flags = [part for model in (files if there else COURSE_MODELS) for part in ("--model", model)] + ([] if there else ["--pretrained", "openai"])
            captions = ("photo", "plain", "course", "imagenet7", "openai80")
            if stage("CLIP zero-shot, the course's data", command, "--data", pictures, *flags, "--templates", *captions, "--transductive", "--output", folder,
                     needed=False):
                for model, name in COURSE_MODELS.items():
                    keep(folder / model / "results.json", REPORT / "results" / f"p3_zero_shot_{name}.json")
                keep(folder / list(COURSE_MODELS)[-1] / "examples.png", REPORT / "figures" / "p3_zero_shot_course.png")


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only put text, numbers and figures together again")
    parser.add_argument("--words", type=Path, default=None, metavar="DIR", help="a folder of scripts/p3_train.sh, whose figures to draw")
    parser.add_argument("--only", choices=["zero-shot"], default=None, help="draw and measure this part only; the others keep their figures and numbers")
    args = parser.parse_args()
    if args.words and not (args.words / "0" / "history.json").is_file():
        fail(f"{args.words} is no folder of scripts/p3_train.sh: it has no 0/history.json")
    if args.render and (args.words or args.only):
        fail("--render draws nothing; leave it out to draw what --words or --only name")
    if args.only and args.words:
        fail("--only zero-shot draws that part alone; leave it, or --words, out")
    if args.only:
        draw_zero_shot()
    elif not args.render:
        draw_everything(args.words)
    try:
        render(prose(read_results(REPORT / "results")))
    except (OSError, jinja2.TemplateError, LookupError, ValueError, TypeError) as error:
        fail(f"cannot put the report's parts together: {type(error).__name__}: {error}")
    print(f"wrote {REPORT / 'report.md'} and {REPORT / 'index.html'}")


if __name__ == "__main__":
    run(main)
