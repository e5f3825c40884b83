"""The report: numbers put into the text, pictures and sliders into the page."""

import importlib
import json
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
    assert report.fill_in("{p1[way, fast][share]:.1%}, {p1[list][0][x]}, {{0..24}}, {p2[a][b]:.3f}", results) == "12.3%, 2, {0..24}, not measured"
    with pytest.raises(SystemExit, match="IndexError"):
        report.fill_in("{p1[list][7]}", results)
    (tmp_path / "results" / "bad.json").write_text("{")
    with pytest.raises(SystemExit, match=r"bad\.json is not JSON"):
        report.read_results(tmp_path / "results")


def make_page(report, tmp_path):
    Image.new("RGB", (334, 90), "green").save(tmp_path / "figures" / "strip.png")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "figures" / "plain.png")
    report.render('# Title\n\n![a strip](figures/strip.png "slider columns 64 22 68 64 64 t 1,t 2,t 3")\n\n![plain](figures/plain.png)\n\n'
                  '![later](figures/none.png)\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n')
    return (tmp_path / "index.html").read_text(), (tmp_path / "report.md").read_text()


def test_the_page_is_self_contained(report, tmp_path):
    page, text = make_page(report, tmp_path)
    assert page.count("data:image/png;base64,") == 2 and "figures/" not in page and "http" not in page
    assert "<title>Title</title>" in page and '<div class="table"><table>' in page and "later: not drawn yet" in page
    assert "![a strip](figures/strip.png)" in text and "slider" not in text


def test_the_text_of_the_project_can_be_filled_in(report):
    results = report.read_results(SCRIPTS.parent / "report" / "results")
    assert "{" not in report.fill_in((SCRIPTS.parent / "report" / "text.md").read_text(), results).replace("{digit}", "")


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


def test_report_script_says_what_is_wrong(report, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["report.py", "--render"])
    with pytest.raises(SystemExit, match="cannot read the report's parts"):
        report.main()
