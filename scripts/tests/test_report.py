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


def test_numbers_come_from_the_results(report, tmp_path):
    (tmp_path / "results" / "p1.json").write_text('{"way, fast": {"share": 0.1234}, "list": [{"x": 2}], "by": {"50": 0.5}}')
    results = report.read_results(tmp_path / "results")
    assert report.fill_in("{p1[by][50]:.1f}", results) == "0.5"
    assert report.fill_in("{p1[way, fast][share]:.1%}, {p1[list][0][x]}, {{0..24}}, {p2[a][b]:.3f}", results) == "12.3%, 2, {0..24}, not measured here"
    assert report.fill_in("| {p2[a]:.1%} ({p2[b]:.1%} to {p2[c]:.1%}) | (56.5 %) |", results) == "| not measured here | (56.5 %) |"
    with pytest.raises(SystemExit, match="IndexError"):
        report.fill_in("{p1[list][7]}", results)
    (tmp_path / "results" / "bad.json").write_text("{")
    with pytest.raises(SystemExit, match=r"bad\.json: it is not JSON"):
        report.read_results(tmp_path / "results")


HOSTILE = ["<script>alert(1)</script>", "a</h1><img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "**bold** _it_ `code`",
           "![y](http://z/y.png)", "a | b\nc", "&lt;script&gt;", '" onmouseover="alert(1)', "{p1[name]}", "$body ${title}", "<!-- ", "http://a.b"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("text", ["# {p1[name]}\n", "Drawn with {p1[name]}.\n", "| a |\n| --- |\n| {p1[name]} |\n", "- {p1[list][0][name]}\n"])
def test_texts_from_files_are_shown_and_not_obeyed(report, tmp_path, name, text):
    (tmp_path / "results" / "p1.json").write_text(json.dumps({"name": name, "list": [{"name": name}]}))
    report.render(report.fill_in(text, report.read_results(tmp_path / "results")))
    template, page = report.PAGE, (tmp_path / "index.html").read_text()
    tags = {tag for tag in re.findall(r"<(\w+)", page) if tag not in re.findall(r"<(\w+)", template)}
    assert tags <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "div"} and page.count("<script") == template.count("<script")
    assert " ".join(name.split()) in html.unescape(re.sub(r"<[^>]*>", "", page))


def make_page(report, tmp_path):
    Image.new("RGB", (268, 90), "green").save(tmp_path / "figures" / "strip.png")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "figures" / "plain.png")
    report.render('# Title\n\n![a strip](figures/strip.png "slider columns 64 22 t 1,t 2,t 3")\n\n![plain](figures/plain.png)\n\n'
                  '![later](figures/none.png)\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n')
    return (tmp_path / "index.html").read_text(), (tmp_path / "report.md").read_text()


def test_the_page_is_self_contained(report, tmp_path):
    page, text = make_page(report, tmp_path)
    assert page.count("data:image/png;base64,") == 2 and "figures/" not in page and "http" not in page
    assert "<title>Title</title>" in page and '<div class="table"><table>' in page and "later: not drawn yet" in page
    settings = json.loads(html.unescape(re.search(r'data-slider="(.*?)"', page)[1]))
    assert settings == {"along": "columns", "left": 64, "top": 22, "step": 68, "width": 68, "height": 68, "full": 268, "labels": ["t 1", "t 2", "t 3"]}
    assert "![a strip](figures/strip.png)" in text and "*later: not drawn yet*" in text and "none.png" not in text and "slider" not in text


def test_the_text_of_the_project_can_be_filled_in(report):
    results = report.read_results(SCRIPTS.parent / "report" / "results")
    assert "{" not in report.fill_in((SCRIPTS.parent / "report" / "text.md").read_text(), results).replace("{digit}", "").replace("{}", "")


def test_the_page_in_a_browser(report, tmp_path):
    """No console errors, every image loads, the sliders move: in Chromium, where there is one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    pages = [tmp_path / "index.html", SCRIPTS.parent / "report" / "index.html"]
    make_page(report, tmp_path)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in pages:
            page, errors = browser.new_page(viewport={"width": 390, "height": 800}), []
            page.on("console", lambda message, errors=errors: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(path.as_uri())
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than a phone"
            figures = page.query_selector_all("figure[data-slider]")
            assert figures
            for figure in figures:
                settings = json.loads(figure.get_attribute("data-slider"))
                image, slider = figure.query_selector(".window img"), figure.query_selector("input")
                before = image.bounding_box()
                slider.evaluate("(input) => { input.value = 1; input.dispatchEvent(new Event('input')) }")
                after = image.bounding_box()
                assert (after["y"] < before["y"]) if settings["along"] == "rows" else (after["x"] < before["x"])
                assert figure.query_selector("output").evaluate("(output) => output.value") == settings["labels"][1]
            assert errors == []
        browser.close()


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
    filled = report.fill_in("{p2_course[mean_mse]} {p3_zero_shot[top1]:.0%} {p3_zero_shot_l14[top1]:.0%} {p3_zero_shot_b32[top1]:.0%}",
                            report.read_results(tmp_path / "results"))
    assert filled == ("1.5 20% 40% 20%" if online else "1.5 20% not measured here not measured here")


def test_report_script_says_what_is_wrong(report, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["report.py", "--render"])
    with pytest.raises(SystemExit, match="cannot read the report's parts"):
        report.main()
