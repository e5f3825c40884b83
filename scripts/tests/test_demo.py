"""The page to play with: its pictures are the commands' files; in a real browser, where gradio and Chromium are there."""

import importlib.util
import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from common import files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def args_of(monkeypatch, *flags):
    demo = pytest.importorskip("demo")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--device", "cpu", *flags])
    return demo.parse_args()


@pytest.fixture
def files_of(monkeypatch):
    """Runs a command that writes files."""
    def run_here(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments), "--device", "cpu"])
        importlib.import_module(module).main()
    return run_here


def last_of(views):
    *_, last = views
    return last


def test_digits_are_the_command_s(tmp_path, monkeypatch, files_of):
    drawing = importlib.import_module("demo_drawing")
    view = last_of(drawing.Digits(args_of(monkeypatch)).draw("svhn", "3", 3.0, True, 2, 5))
    files_of("p1_cfg_ddpm.inference", tmp_path, "--domains", "svhn", "--digits", 3, "--images-per-digit", 2, "--guidance-weight", 3, "--seed", 5,
             "--student")
    for name, data in view.pictures:
        assert (tmp_path / name).read_bytes() == data
    assert len(view.pictures) == 2 and view.t is None and "p1_infer.sh" in view.command


def test_faces_are_the_command_s(tmp_path, monkeypatch, files_of):
    drawing, args = importlib.import_module("demo_drawing"), args_of(monkeypatch)
    view = last_of(drawing.Faces(args).draw("00", "01", 0.5, 0.5, 2, 4))
    noises = tmp_path / "noise"
    noises.mkdir()
    shutil.copy(args.noises / "00.pt", noises)
    files_of("p2_ddim.inference", noises, tmp_path / "out", args.unet, "--eta", 0.5, "--steps", 2, "--seed", 4)
    first, *others = (np.asarray(Image.open(io.BytesIO(data)), int) for _, data in view.pictures)
    with Image.open(tmp_path / "out" / "00.png") as image:  # in a batch of four a float's last bit may differ, and so a grey level
        assert np.abs(first - np.asarray(image, int)).max() <= 1 and image.text == Image.open(io.BytesIO(view.pictures[0][1])).text
    assert all(np.abs(first - other).max() > 30 for other in others)
    with pytest.raises(drawing.UserError, match="alpha must be"):
        last_of(drawing.Faces(args).draw("00", "01", 1.5, 0.0, 2, 4))


def test_words_are_the_command_s_and_places_differ(tmp_path, monkeypatch, files_of):
    drawing, args = importlib.import_module("demo_drawing"), args_of(monkeypatch)
    words, prompt = drawing.Words(args), "a <new1> next to a red apple"
    view = last_of(words.draw(prompt, 2.5, 2, 2, "anywhere", [], 7))
    files.write_json(tmp_path / "prompt.json", {"0": {"token_name": "<new1>", "prompt": [prompt]}})
    files_of("p3_clip_textual_inversion.inference", tmp_path / "prompt.json", tmp_path / "out", args.checkpoint, "--num-images", 2, "--guidance-weight", 2.5,
             "--steps", 2, "--seed", 7)
    for i, (_, data) in enumerate(view.pictures):
        assert (tmp_path / "out" / "0" / "0" / f"source0_prompt0_{i}.png").read_bytes() == data
    by_clicks = last_of(words.draw(prompt, 2.5, 2, 2, drawing.BY_CLICKS, [(0.5, 0.2), (0.5, 0.8)], 7))
    assert by_clicks.pictures[0][1] != view.pictures[0][1] and by_clicks.command.endswith("--regions 'a <new1>=0,0,1,0.5' 'a red apple=0,0.5,1,1'")
    files_of("p3_clip_textual_inversion.inference", tmp_path / "prompt.json", tmp_path / "placed", args.checkpoint, "--num-images", 2, "--guidance-weight", 2.5,
             "--steps", 2, "--seed", 7, "--regions", "a <new1>=0,0,1,0.5", "a red apple=0,0.5,1,1")
    for i, (_, data) in enumerate(by_clicks.pictures):
        assert (tmp_path / "placed" / "0" / "0" / f"source0_prompt0_{i}.png").read_bytes() == data
    with pytest.raises(drawing.USER_ERRORS, match="two things"):
        words.draw("a <new1>", 3.0, 2, 1, "first left, second right", [], 0)


def test_classes_of_one_s_own(tmp_path, monkeypatch):
    drawing, args = importlib.import_module("demo_drawing"), args_of(monkeypatch)
    classes, folder = drawing.Classes(args), files.MINI / "clip_zeroshot"
    number, name = next(iter(json.loads((folder / "id2label.json").read_text()).items()))
    _, found = classes.classify(folder / "val" / f"{number}_0.png", f"{name}, a spoon,  a spoon")
    assert found[0][0] == name and len(found) == 2 and sum(chance for _, chance, _ in found) == pytest.approx(1)
    (tmp_path / "no.png").write_text("<html>")
    for path, names, said in ((None, "a, b", "choose a picture first"), (folder / "val" / f"{number}_0.png", "one", "give two to 1,000 different classes"),
                              (tmp_path / "no.png", "a, b", r"cannot read the picture .*no\.png")):
        with pytest.raises(drawing.USER_ERRORS, match=said):
            classes.classify(path, names)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None or CHROMIUM is None, reason="needs gradio (scripts/requirements-demo.txt) and Chromium")
def test_the_page_in_a_browser(tmp_path, monkeypatch):
    """Each tab draws; nothing asks another machine; a wrong picture is one line."""
    sync_api = pytest.importorskip("playwright.sync_api")
    demo, args = importlib.import_module("demo"), args_of(monkeypatch, "--port", "7899")
    blocks = demo.serve(args, str(tmp_path))
    try:
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
            page, asked, errors = browser.new_page(viewport={"width": 700, "height": 900}), [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(blocks.local_url)
            for tab, button, wanted in (("Digits", "Draw", 10), ("Faces", "Draw", 4), ("Words", "Draw", 4)):
                page.get_by_role("tab", name=tab).click()
                panel = page.get_by_role("tabpanel").filter(visible=True)
                panel.get_by_role("button", name=button, exact=True).click()
                panel.get_by_text("steps, done").wait_for(timeout=120_000)
                assert panel.locator(".pictures").first.locator("img").count() == wanted
            page.get_by_role("tab", name="Classes").click()
            bad = tmp_path / "bad.png"
            bad.write_text("<html>")
            page.locator("input[type=file]").first.set_input_files(bad)
            page.locator(".failed").first.wait_for(timeout=60_000)
            assert page.evaluate("document.documentElement.scrollWidth") <= 700
            assert not errors and all(url.startswith((blocks.local_url, "data:", "blob:")) for url in asked), (errors, asked)
            browser.close()
    finally:
        blocks.close()
