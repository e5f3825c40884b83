"""The report: numbers put into the text, pictures and sliders into the page."""

import html
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(tmp_path, monkeypatch):
    """scripts/report.py, working in an empty folder."""
    module = importlib.import_module("report")
    monkeypatch.setattr(module, "REPORT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "figures").mkdir()
    return module


def results_of(report, tmp_path, **files):
    """The report's results, as if runs had written these files."""
    for name, content in files.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content))
    return report.read_results(tmp_path / "results")


def test_numbers_come_from_the_results(report, tmp_path):
    content = {"way, fast": {"share": 0.1234}, "list": [{"x": 2}, {"x": 5}], "by": {"50": 0.5}, "none": None, "p": 1.2e-9, "many": 12345}
    results = results_of(report, tmp_path, p1_benchmark=content)
    for text, filled in {
        '{{ p1_benchmark.by["50"]|fixed(1) }}': "0.5",
        '{{ p1_benchmark["way, fast"].share|percent }}, {{ p1_benchmark.list[0].x }}, {0..24}': "12.3\xa0%, 2, {0..24}",
        "{{ share(0.5, [0.4, 0.6], 0, '+') }} {{ p1_benchmark.p|small }} {{ p1_benchmark.many }}": "+50\xa0%\xa0(+40\xa0%\xa0to\xa0+60\xa0%) 1.2e-09 12,345",
        '{{ p1_benchmark.list|map(attribute="x")|mean|fixed(1) }} {{ p1_benchmark.list|map(attribute="x")|lowest }}': "3.5 2",
        "{% for row in p1_benchmark.list %}\n| {{ row.x }} |\n{% endfor %}\nend": "| 2 |\n| 5 |\nend",
        "{{ p2_course.a.b|fixed(3) }}; {{ p1_benchmark.none|percent }}; {{ share(p2_course.a, p2_course.b) }}": "; ".join(["not measured here"] * 3),
        "{% for a, b in p2_course.rows|items %}{{ a }}{% endfor %}{{ p2_course.rows|map(attribute='x')|mean|fixed }}": "not measured here",
    }.items():
        assert report.fill_in(text, results) == filled, text


@pytest.mark.parametrize("text, told", [
    ("a\n{{ p1_benchmark.list[7].x }}", "line 2, asks for what report/results has not: UndefinedError: list object has no element 7"),
    ("{{ p1_benchmark.misspelt|percent }}", "line 1, asks for what report/results has not: UndefinedError: 'dict object' has no attribute 'misspelt'"),
    ("{{ share(p1_benchmark.misspelt, [0, 1]) }}", "'misspelt'"), ("{{ p1_benchmark.misspelt }}", "'misspelt'"),
    ("{{ p1_benchmark.list|map(attribute='y')|mean|fixed }}", "has no attribute 'y'"),
    ("{{ unknown_file.x|fixed }}", "'unknown_file' is undefined"), ("{{ source('unknown') }}", "KeyError: 'unknown'"),
    ("{{ p1_benchmark.share }}", "0.5 needs a format"), ("{{ p1_benchmark.list }}", "needs a format"), ("{{ p1_benchmark.name|fixed }}", "ValueError"),
    ("\n\n{% for %}", "line 3")])
def test_what_the_results_have_not_is_one_line(report, tmp_path, text, told):
    results = results_of(report, tmp_path, p1_benchmark={"list": [{"x": 2}], "share": 0.5, "name": "a"})
    with pytest.raises(SystemExit, match=f"^error: report/text/p1.md, .*{re.escape(told)}"):
        report.fill_in(text, results, "report/text/p1.md")
    (tmp_path / "results" / "p2_course.json").write_text("{")
    with pytest.raises(SystemExit, match=r"p2_course\.json: it is not JSON"):
        report.read_results(tmp_path / "results")


def test_the_command_stands_beside_the_number(report, tmp_path):
    machine = {"device": "A <b> card", "threads": 1, "date": "2026-01-02"}
    several = {"distance": {"machine": machine | {"threads": 2}}}
    results = results_of(report, tmp_path, p1_benchmark={"machine": machine}, p2_samplers=several, p2_exact={"a": 1})
    filled = report.fill_in('{{ source("p1_benchmark") }}|{{ source("p2_samplers", "--near 2") }}|{{ source("p2_exact") }}|{{ source("p2_course") }}', results)
    assert filled.split("|") == ["`bash scripts/p1_benchmark.sh` (A &#60;b&#62; card, 1 thread, 2026-01-02)",
                                 "`python -m p2_ddim.sweep --near 2` (A &#60;b&#62; card, 2 threads, 2026-01-02)",
                                 "`python -m p2_ddim.edit measure --count 4 --batch-size 4`", "`bash scripts/report.sh`"]


@pytest.mark.parametrize("own, shown", [("bash scripts/p2_figures.sh --pairs 4 --steps 20 50", "bash scripts/p2_figures.sh --pairs 4 --steps 20 50"),
                                        *((other, "bash scripts/p2_figures.sh") for other in ("rm -r x", "bash scripts/p2_figures.sh`<b>", 3))])
def test_the_command_is_the_one_that_was_given(report, tmp_path, own, shown):
    """And nothing else that a file may hold."""
    assert report.fill_in('{{ source("p2_figures") }}', results_of(report, tmp_path, p2_figures={"command": own})) == f"`{shown}`"


HOSTILE = ["<script>alert(1)</script>", "a</h1><img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "**bold** _it_ `code`",
           "![y](http://z/y.png)", "a | b\nc", "&lt;script&gt;", '" onmouseover="alert(1)', "{{ p1_benchmark.name }}", "{% raw %}", "<!-- ", "http://a.b"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("text", ["# {{ p1_benchmark.name }}\n", "Drawn with {{ p1_benchmark.name }}.\n", "| a |\n| --- |\n| {{ p1_benchmark.name }} |\n",
                                  "- {{ p1_benchmark.list[0].name }}\n"])
def test_texts_from_files_are_shown_and_not_obeyed(report, tmp_path, name, text):
    empty = page_of(report, tmp_path, "# a\n")
    page = page_of(report, tmp_path, report.fill_in(text, results_of(report, tmp_path, p1_benchmark={"name": name, "list": [{"name": name}]})))
    tags = {tag for tag in re.findall(r"<(\w+)", page) if tag not in re.findall(r"<(\w+)", empty)}
    assert tags <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "div"} and page.count("<script") == empty.count("<script")
    assert " ".join(name.split()) in html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("name", HOSTILE)
def test_texts_of_pictures_are_shown_and_not_obeyed(report, tmp_path, name):
    """The labels in a PNG are the file's, whoever made it."""
    draw_sheet(tmp_path / "figures" / "sheet.png", titles=[name, "b"], left=[name, "b"], above=[name, name])
    draw_sheet(tmp_path / "figures" / "strip.png", left=[name, "b"], above=[name, name])
    page = page_of(report, tmp_path, '# a\n\n![alt](figures/sheet.png "told")\n\n![alt](figures/strip.png#slider "told")\n')
    assert page.count("<script") == 1 and "onerror" not in re.sub(r'"[^"]*"|>[^<]*<', "", page)
    assert html.unescape(page).count(name) >= 5


def page_of(report, tmp_path, text):
    shutil.copyfile(SCRIPTS.parent / "report" / "template.html", tmp_path / "template.html")
    report.render(text)
    return (tmp_path / "index.html").read_text()


def draw_sheet(path, **labels):
    pictures = importlib.import_module("p1_cfg_ddpm.pictures")
    pictures.save_image(pictures.sheet([[Image.new("RGB", (40, 30), colour) for colour in ("green", "blue")] for _ in range(2)], **labels), path)


def test_sheets_and_charts_know_their_parts(tmp_path):
    """The pixels that a PNG names are those of the pictures, their labels the given ones; a title is not cut off; panels are equally large."""
    pictures = importlib.import_module("p1_cfg_ddpm.pictures")
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    pictures.save_image(pictures.sheet([[red, blue], [blue]], titles=["a title that is longer than its row", "b"], left=["l", 2]), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as sheet:
        parts = json.loads(sheet.text["parts"])
        assert [(part["title"], part["rows"], part["columns"]) for part in parts] == [("a title that is longer than its row", ["l"], []), ("b", ["2"], [])]
        colours = [[sheet.getpixel((x + 24 * i + d, y + 9)) for i in range(w // 24) for d in (0, 19)] for x, y, w, h in (part["box"] for part in parts)]
        assert colours == [[(255, 0, 0)] * 2 + [(0, 0, 255)] * 2, [(0, 0, 255)] * 2] and sheet.width > 150
    path = pictures.chart([lambda axis, i=i: axis.set(title=f"panel {i}") for i in range(3)], tmp_path / "b.png", size=(2, 1))
    with Image.open(path) as chart:
        assert [(part["box"], part["label"]) for part in json.loads(chart.text["parts"])] == [
            ([0, 0, 240, 120], "panel 0"), ([240, 0, 240, 120], "panel 1"), ([0, 120, 240, 120], "panel 2")] and chart.size == (480, 240)
    pictures.save_image(red, tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").text == {}


def test_the_page_is_self_contained(report, tmp_path):
    draw_sheet(tmp_path / "figures" / "strip.png", left=["x_t", "x0"], above=["t = 9", "t = 1"])
    draw_sheet(tmp_path / "figures" / "titled.png", titles=["one way", "another"])
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "figures" / "plain.png")
    page = page_of(report, tmp_path, '# Title\n\n![a strip](figures/strip.png "told & shown")\n\n![it moves](figures/strip.png#slider)\n\n'
                   '![plain](figures/plain.png)\n\n![some](<figures/titled.png#only=one way> "part")\n\n![later](figures/none.png)\n\n'
                   "## Part\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    text = (tmp_path / "report.md").read_text()
    assert page.count("data:image/png;base64,") == 3 and "figures/" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert "<title>Title</title>" in page and "<table>" in page and "later: not drawn yet" in page and '<a href="#part">Part</a>' in page
    boxes = re.findall(r'viewBox="([^"]*)"', page)
    left = Image.open(tmp_path / "figures" / "strip.png").width - 88
    assert boxes == [f"{left} 20 88 68", f"{left} 20 40.0 68", "0 0 50 40", "4 24 88 34"], "strip, its first column, plain, the first title's"
    assert re.findall(r"<span>(.*?)</span>", page) == ["t = 9", "t = 1", "x_t", "x0", "x_t", "x0"] and page.count('class="title"') == 1
    (slider,) = re.findall(r'data-labels="(.*?)" data-box="(.*?)" data-step="(.*?)"', page)
    assert [json.loads(html.unescape(value)) for value in slider] == [["t = 9", "t = 1"], [left, 20, 40.0, 68], 44.0]
    assert "<figcaption>told &amp; shown</figcaption>" in page
    assert "![a strip](figures/strip.png)\n\n*told & shown*" in text and "*later: not drawn yet*" in text and "none.png" not in text
    assert "it moves: [on the page](index.html)." in text and "[some](figures/titled.png)" in text and "png#" not in text


def test_the_committed_report_is_what_its_results_say(report, tmp_path):
    """Whoever changes words, numbers or figures renders again: bash scripts/report.sh --render."""
    folder = SCRIPTS.parent / "report"
    for name in ("figures", "results"):
        (tmp_path / name).rmdir()
        (tmp_path / name).symlink_to(folder / name)
    page = page_of(report, tmp_path, report.prose(report.read_results(folder / "results")))
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text(), "report/report.md is older than its text or numbers"
    assert page == (folder / "index.html").read_text(), "report/index.html is older than its text, numbers, figures or template"


def test_the_text_says_so_where_nothing_was_measured(report, tmp_path):
    filled = report.prose(report.read_results(tmp_path / "results"))
    assert filled.count("not measured here") > 40 and "{" not in filled.replace("{digit}", "") and "Undefined" not in filled


def test_one_source_of_words_a_sentence_a_line(report):
    """Lines that a person can read and a diff can show; and in each section, beside the numbers of a file of results, the command that measures it."""
    text = "".join(path.read_text() for path in report.TEXTS)
    assert max(map(len, text.splitlines())) <= 400
    for line in text.splitlines():
        words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\*\*[^*]*\*\*|!\[.*", "", line)
        assert line.startswith(("|", ">", "- ", "#")) or not re.search(r"[a-z)]\. [A-Z]", words), f"two sentences in one line: {line}"
    for section in re.split(r"(?m)^##+ ", text)[1:]:
        used, told = set(re.findall(r"\b(p\d_\w+)\b(?=[.\[|)])", section)), set(re.findall(r'source\("(\w+)"', section))
        missing = {name for name in used & set(report.RESULTS) if report.RESULTS[name] not in {report.RESULTS[other] for other in told}}
        assert not missing, f"{section.splitlines()[0]}: no source(...) of {missing}"


@pytest.mark.parametrize("online, here", [(True, False), (False, False), (True, True)])
def test_the_courses_data_is_taken_in_where_it_is(report, monkeypatch, tmp_path, online, here):
    """The face network draws and is graded; CLIP's real weights are asked for, or taken from where they were put, and the report does without them."""
    monkeypatch.setattr(report, "COURSE_DATA", tmp_path / "course")
    (tmp_path / "course" / "clip_zeroshot").mkdir(parents=True)
    (tmp_path / "course" / "face").mkdir()
    (tmp_path / "course" / "face" / "UNet.pt").touch()
    weights = [tmp_path / "course" / "weights" / f"{name}.pt" for name in ("ViT-B-32", "ViT-L-14")]
    for path in weights if here else ():
        path.parent.mkdir(exist_ok=True)
        path.touch()
    calls = []

    def stage(title, module, *arguments, needed=True):
        calls.append((module, *map(str, arguments)))
        if module == "p2_ddim.evaluate":
            (Path(arguments[-1]) / "grade.json").write_text('{"mean_mse": 1.5}')
        if module == "p3_clip_textual_inversion.zero_shot" and (needed or online):
            output = Path(arguments[-1])
            folders = [output] if needed else [output / "ViT-B-32", output / "ViT-L-14"]
            (output / "models.json").write_text("[]")
            for i, folder in enumerate(folders):
                folder.mkdir(exist_ok=True)
                (folder / "results.json").write_text(json.dumps({"top1": 0.2 * (i + 1)}))
                for name in ("examples", "confusion", "calibration", "retrieval"):
                    (folder / f"{name}.png").touch()
        return needed or online

    monkeypatch.setattr(report, "stage", stage)
    report.draw_everything(None)
    face = tmp_path / "course" / "face"
    assert ("p2_ddim.figures", "--noise", str(face / "noise"), "--checkpoint", str(face / "UNet.pt")) in calls
    (course,) = (call for call in calls if "--data" in call)
    models = [course[i + 1] for i, flag in enumerate(course) if flag == "--model"]
    assert models == ([str(path) for path in weights] if here else ["ViT-B-32", "ViT-L-14"]) and ("--pretrained" in course) == (not here)
    numbers = ("p2_course.mean_mse", "p3_zero_shot.top1", "p3_zero_shot_l14.top1", "p3_zero_shot_b32.top1")
    filled = report.fill_in(" ".join(f"{{{{ {name}|fixed(1) }}}}" for name in numbers), report.read_results(tmp_path / "results"))
    assert filled == ("1.5 0.2 0.4 0.2" if online else "1.5 0.2 not measured here not measured here")


def test_report_script_says_what_is_wrong(report, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["report.py", "--render"])
    with pytest.raises(SystemExit, match="cannot put the report's parts together"):
        report.main()
