"""report/index.html in a real browser, with every fold open: nothing overlaps or sticks out, nothing fails, all is reached by keyboard and told in words."""

import json
import shutil
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent.parent / "report" / "index.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
OVERLAPS = """() => {  // labels of one row or column that touch each other, and blocks that lie on their next neighbour
  const found = [], text = span => { const range = document.createRange(); range.selectNodeContents(span); return range.getBoundingClientRect(); };
  const cross = (a, b) => a.width && b.width && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  for (const labels of document.querySelectorAll(".columns, .rows")) {
    const boxes = [...labels.children].map(text);
    boxes.forEach((box, i) => { if (i && cross(boxes[i - 1], box)) found.push(labels.className + ": " + labels.textContent); });
    const picture = labels.parentElement.querySelector(".window");
    if (cross(labels.getBoundingClientRect(), picture.getBoundingClientRect())) found.push("on its picture: " + labels.textContent);
  }
  for (const block of document.querySelectorAll("main > *, details > *, figure > *, .figures > *, .parts > *, .part > *")) {
    const next = block.nextElementSibling;
    if (next && cross(block.getBoundingClientRect(), next.getBoundingClientRect())) found.push([block, next].map(one => one.outerHTML.slice(0, 80)));
  }
  return found;
}"""
TOO_WIDE = """() => [...document.querySelectorAll("main *")].filter(element => element.getBoundingClientRect().right > innerWidth + 1
  && !element.closest(".table, .wide, .store, svg")).map(element => element.outerHTML.slice(0, 80))"""
PALE = """() => {  // texts whose contrast to what is behind them is below 4.5, the least that WCAG asks for
  const light = colour => { const [r, g, b] = colour.match(/[0-9.]+/g).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = element => { const own = getComputedStyle(element).backgroundColor;
                              return own === "rgba(0, 0, 0, 0)" && element.parentElement ? ground(element.parentElement) : own; };
  return [...document.querySelectorAll("p, a, code, th, td, h1, h2, h3, li, summary, figcaption, output, .columns span, blockquote p")].filter(element => {
    const [low, high] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5; }).map(element => element.outerHTML.slice(0, 80));
}"""
SMALL = """() => [...document.querySelectorAll("main *")].filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
  && parseFloat(getComputedStyle(element).fontSize) < 12).map(element => element.outerHTML.slice(0, 80))"""
UNLOADED = """async () => {
  const bad = [];
  for (const image of document.querySelectorAll("image")) {
    const copy = new Image();
    copy.src = image.getAttribute("href");
    await copy.decode().catch(() => {});
    if (copy.naturalWidth != image.getAttribute("width")) bad.push(image.id);
  }
  return bad;
}"""
UNTOLD = """() => [...document.querySelectorAll(".window, input, img, [role=region]")]
  .filter(element => !(element.getAttribute("aria-label") || element.alt || "").trim())
  .concat([...document.querySelectorAll("use")].filter(use => !document.querySelector("image" + use.getAttribute("href")))).map(element => element.outerHTML)"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser, width=1280, scheme="light", page_file=PAGE):
    """(the page, with every fold open; what went wrong and what was asked of the network so far)."""
    page, faults = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    return page, faults


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_can_be_read(browser, width, scheme):
    page, faults = opened(browser, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.evaluate(TOO_WIDE) == []
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(PALE) == []
    assert page.evaluate(SMALL) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    if width == 390:
        assert page.evaluate(UNLOADED) == [] and page.evaluate(UNTOLD) == []
    assert faults == []
    page.close()


def test_the_keyboard_opens_folds_and_moves_sliders(browser):
    page, faults = opened(browser, 390)
    fold = page.locator("details").first
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.get_attribute("open") is None
    page.keyboard.press("Space")
    assert fold.get_attribute("open") is not None
    sliders = page.locator(".slider").all()
    assert len(sliders) >= 3
    for slider in sliders:
        labels, box, step = (json.loads(slider.get_attribute(f"data-{name}")) for name in ("labels", "box", "step"))
        shown, picture = slider.locator("output"), slider.locator(".window")
        slider.locator("input").focus()
        for key, i in (("ArrowRight", 1), ("End", len(labels) - 1), ("ArrowLeft", len(labels) - 2), ("Home", 0)):
            page.keyboard.press(key)
            assert shown.text_content() == slider.locator("input").get_attribute("aria-valuetext") == labels[i]
            left, *rest = map(float, picture.get_attribute("viewBox").split())
            assert abs(left - box[0] - i * step) < 0.01 and rest == box[1:]
    assert sum("t = " in slider.get_attribute("data-labels") for slider in sliders) == 2, "the two reverse processes are labelled with their t"
    assert faults == []
    page.close()


def test_the_six_moments_stand_in_a_row_without_opening_anything(browser):
    page, _ = opened(browser, 390)
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = false; })")
    for domain in ("MNIST-M", "SVHN"):
        moments = page.locator(f'.sheet:has(.window[aria-label^="Reverse process of the first {domain} 0"])')
        labels = moments.locator(".columns span")
        assert moments.count() == 1 and moments.is_visible() and labels.count() == 6
        boxes = [label.bounding_box() for label in labels.all()]
        assert len({round(box["y"]) for box in boxes}) == 1 and boxes[-1]["x"] + boxes[-1]["width"] <= 390
        assert [text.startswith("t = ") for text in labels.all_text_contents()] == [True] * 5 + [False]
    page.close()
