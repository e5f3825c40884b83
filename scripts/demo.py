"""A page to play with, on this machine alone and without internet: guided digits, faces between two noises, learned words, classes of one's own.

The models are the bundled miniatures unless flags name others. Nothing of yours is written: uploads lie in a temporary folder, which goes when this ends.
"""

import argparse
import base64
import html
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from pathlib import Path

from PIL import Image, ImageDraw

from common import fail, files, run
from demo_drawing import BY_CLICKS, PLACES, USER_ERRORS, Classes, Digits, Faces, Words, png, small
from p1_cfg_ddpm.model import DOMAINS
from p2_ddim.data import MINI_DATA as FACES
from p3_clip_textual_inversion.data import read_data
from p3_clip_textual_inversion.device import describe
from p3_clip_textual_inversion.files import MINI, first_line
from p3_clip_textual_inversion.model import MINI_SD
from p3_clip_textual_inversion.places import arranged
from p3_clip_textual_inversion.provenance import HelpFormatter

CANVAS = 240  # pixels of the side of the square that is clicked at
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # by name alone: of this machine, none is fetched
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important }
.pictures { display: grid; gap: .6rem; grid-template-columns: repeat(var(--wide), minmax(0, 1fr)); margin: .4rem 0 }
.pictures figure { margin: 0 } .pictures img { width: 100%; border-radius: .4rem; display: block; background: var(--background-fill-secondary) }
.pictures img.tiny { image-rendering: pixelated }
.pictures figcaption { font-size: .78rem; color: var(--body-text-color-subdued); padding-top: .15rem; overflow-wrap: anywhere }
.status { display: flex; align-items: center; gap: .7rem; font-size: .85rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums }
.status progress { flex: 1; max-width: 16rem; height: .4rem; appearance: none; border: 0; border-radius: .2rem; overflow: hidden }
.status progress, .status progress::-webkit-progress-bar { background: var(--border-color-primary) }
.status progress::-webkit-progress-value { background: var(--color-accent) }
.status progress::-moz-progress-bar { background: var(--color-accent) }
.buttons { margin-bottom: .3rem } .buttons button { font-size: .95rem; padding: .5rem .4rem; flex: 0 1 8rem; min-width: 5.5rem; white-space: nowrap }
.digits .wrap { display: grid; grid-template-columns: repeat(5, 1fr) } .digits label { padding: .3rem .5rem }
.way { font-size: .85rem; color: var(--body-text-color-subdued); margin: .9rem 0 0 }
.failed { border-left: 3px solid #d33; padding: .5rem .8rem; border-radius: .2rem; background: var(--background-fill-secondary); overflow-wrap: anywhere }
.empty { border: 1px dashed var(--border-color-primary); border-radius: .6rem; padding: 3.5rem 1rem; text-align: center }
.empty, .noted { color: var(--body-text-color-subdued) }
details.command { margin-top: .9rem; font-size: .85rem } details.command summary { cursor: pointer; color: var(--color-accent) }
details.command pre { background: var(--background-fill-secondary); padding: .6rem .8rem; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-family: var(--font-mono) }
table.chances { width: 100%; border-collapse: collapse }
.chances td, .chances th, .chances tr, table.chances { padding: .25rem .5rem; border: 0 !important; text-align: left; font-weight: normal }
.chances td:last-child, .chances td:nth-child(3) { text-align: right; font-variant-numeric: tabular-nums }
.chances .bar { width: 55% } .chances .bar div { background: var(--color-accent); height: .7rem; border-radius: .2rem; min-width: 2px }
.seen { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 3fr); gap: 1rem; align-items: start }
@media (max-width: 640px) { .pictures { grid-template-columns: repeat(var(--narrow), minmax(0, 1fr)) } .seen { grid-template-columns: 1fr } }
"""
ABOUT = {
    "digits": r"""**Classifier-free guidance.** At each step the network is asked twice, with digit and domain and without:
$\;\hat\varepsilon = (1+w)\,\varepsilon_\theta(x_t, c) - w\,\varepsilon_\theta(x_t, \varnothing).\;$
At $w = 0$ it draws what it saw, doubtful digits too; the larger $w$, the clearer they are, and the more alike.
The *student* has learned what guided steps come to.""",
    "faces": r"""**DDIM.** From noise $x_T$ down,
$\;x_{t'} = \sqrt{\bar\alpha_{t'}}\,\hat x_0 + \sqrt{1-\bar\alpha_{t'}-\sigma^2}\,\hat\varepsilon + \sigma z.\;$
At $\eta = 0$ there is no fresh noise ($\sigma = 0$): the same noise is the same face. At $\eta = 1$ each step forgets more of it.
Between two noises, *slerp* goes along the sphere on which noise lies; *lerp* cuts through it, its length falls to 0.71, and its faces grow empty.""",
    "words": r"""**Textual inversion.** A learned word is a few new rows of the token table; the model itself is unchanged.
Guidance as with the digits: $\hat\varepsilon = (1+w)\,\varepsilon_\theta(x_t, \text{prompt}) - w\,\varepsilon_\theta(x_t, \varnothing)$;
diffusers calls $1 + w$ the scale.
For *a ... next to a ...*, each half of the picture can follow a prompt of its own.""",
    "classes": r"""**Zero-shot classification.** CLIP gives a picture and a caption a direction each, $u$ and $v_k$; the class is the caption that fits best:
$\;p_k = \mathrm{softmax}_k\,(s \cos(u, v_k)).\;$ The captions here are *{}*.""",
}


# --- what is seen, as HTML ---

def figures(pictures, wide, narrow):
    """Pictures in a grid. wide, narrow: columns on a screen and on a telephone."""
    def figure(name, data):
        tiny = ' class="tiny"' if int.from_bytes(data[16:20], "big") <= 64 else ""  # a PNG tells its width there
        return (f'<figure><img{tiny} src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{html.escape(name)}">'
                f"<figcaption>{html.escape(name)}</figcaption></figure>")
    return f'<div class="pictures" style="--wide: {wide}; --narrow: {narrow}">{"".join(figure(*picture) for picture in pictures)}</div>'


def shown(view, left, wide, narrow):
    """A `View`. left: seconds that the rest will take."""
    text = f"{view.total} steps, done" if view.t is None else f"step {view.done} of {view.total}, t = {view.t}, {left:.0f} s left"
    page = f'<div class="status"><progress max="{view.total}" value="{view.done}" aria-label="steps"></progress><span role="status">{text}</span></div>'
    page += figures(view.pictures, wide, narrow)
    page += f'<p class="noted">{html.escape(view.notes)}</p>' if view.notes else ""
    page += '<p class="way">On the way: what the network takes the first picture to be, at step t</p>' + figures(view.moments, 6, 3)
    command = html.escape(view.command)
    return page + (f'<details class="command"><summary>The same by command line</summary><pre>{command}</pre></details>' if view.command else "")


def failed(error):
    """An exception in one line; what is no mistake of the user's is also told in full on the terminal."""
    text = str(error) if isinstance(error, USER_ERRORS) else files.common_cause(error)
    if text is None:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {first_line(error)}"
    return f'<p class="failed" role="alert">{html.escape(text)}</p>'


def drawing(draw, wide, narrow):
    """A generator of pages, of a function that makes `View`s. An error is the last of them."""
    def pages(*inputs):
        started = time.perf_counter()
        try:
            for view in draw(*inputs):
                yield shown(view, (time.perf_counter() - started) / view.done * (view.total - view.done), wide, narrow)
        except Exception as error:
            yield failed(error)
    return pages


def stopped(page):
    """What stands there when a drawing is cancelled."""
    return re.sub(r'<span role="status">step (\d+) of (\d+)[^<]*', r'<span role="status">stopped after step \1 of \2', page or "")


def chances(classes, path, names):
    """The classes of a picture, as bars."""
    try:
        picture, found = classes.classify(path, names)
        seen = figures([(f"taken for: {found[0][0]}", png(small(picture)))], 1, 2)
    except Exception as error:
        return failed(error)
    rows = "".join(f'<tr><td>{html.escape(name)}</td><td class="bar"><div style="width: {100 * chance:.1f}%"></div></td><td>{chance:.1%}</td>'
                   f"<td>{cosine:.3f}</td></tr>" for name, chance, cosine in found[:12])
    more = f'<p class="noted">and {len(found) - 12} less likely</p>' if len(found) > 12 else ""
    table = f'<table class="chances"><tr><th>class</th><th></th><th>probability</th><th>cosine</th></tr>{rows}</table>{more}'
    return f'<div class="seen">{seen}<div>{table}</div></div>'


def canvas(points):
    """The square that is clicked at, with what was chosen so far."""
    picture = Image.new("RGB", (CANVAS, CANVAS), "#e8edf5")
    if len(points) == 2:
        picture.paste("#bcd3f7", tuple(round(edge * CANVAS) for edge in arranged(points)[1]))
    draw = ImageDraw.Draw(picture)
    for number, (x, y) in enumerate(points):
        draw.circle((x * CANVAS, y * CANVAS), 14, fill="#1f6feb")
        draw.text((x * CANVAS, y * CANVAS), str(number + 1), "white", anchor="mm", font_size=16)
    return picture


def clicked(points, x, y):
    """The points after a click at pixel (x, y): a third begins anew, and one on the first is passed over."""
    new = tuple(min(max(value / CANVAS, 0.0), 1.0) for value in (x, y))
    points = [] if len(points) == 2 else list(points)
    return points if points and max(abs(a - b) for a, b in zip(points[0], new)) < 0.05 else [*points, new]


# --- the page ---

def build(gr, digits, faces, words, classes, told):
    """The page, of what draws. gr: gradio; told: what models it has, in words."""
    one = {"concurrency_id": "one at a time", "concurrency_limit": 1, "show_progress": "hidden"}

    def about(name, captions=""):
        gr.Markdown(ABOUT[name].replace("{}", captions), latex_delimiters=[{"left": "$", "right": "$", "display": False}])

    def seed_of(value):
        return gr.Number(value, label="Seed", precision=0, minimum=0, maximum=2**53)

    def results(pages, seed, inputs):
        """The right column: buttons, and below them what is drawn of the inputs."""
        inputs = [*inputs, seed]
        with gr.Column(scale=5, min_width=300):
            with gr.Row(elem_classes="buttons"):
                draw, following, stop = gr.Button("Draw", variant="primary"), gr.Button("Next seed"), gr.Button("Stop")
            page = gr.HTML('<div class="empty">Press Draw.</div>')
        begun = [draw.click(pages, inputs, page, **one), following.click(None, seed, seed, js="seed => seed + 1").then(pages, inputs, page, **one)]
        stop.click(stopped, page, page, cancels=begun, queue=False, show_progress="hidden")

    with gr.Blocks(title="Diffusion and CLIP to play with", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(f"# Diffusion and CLIP to play with\n{told}")
        with gr.Tab("Digits"):
            about("digits")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    domain = gr.Radio(list(DOMAINS), value=DOMAINS[-1], label="Domain")
                    digit = gr.Radio([str(i) for i in range(10)], value="3", label="Digit", elem_classes="digits")
                    config = digits.networks[0][2]
                    weight = gr.Slider(0, 10, config.guidance_weight, step=0.5, label="Guidance weight w")
                    student = gr.Checkbox(label="Draw with the student", info="one evaluation of the network in place of twelve")
                    count = gr.Slider(1, 20, 10, step=1, label="How many")
                    seed = seed_of(config.seed)
                results(drawing(digits.draw, 5, 5), seed, [domain, digit, weight, student, count])
            student.change(lambda on: gr.Slider(value=digits.networks[on][2].guidance_weight, maximum=digits.networks[1][0].max_weight if on else 10),
                           student, weight, show_progress="hidden")
        with gr.Tab("Faces"):
            about("faces")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    names = list(faces.noises)
                    with gr.Row():
                        first = gr.Dropdown(names, value=names[0], label="Noise at alpha 0", min_width=120)
                        second = gr.Dropdown(names, value=names[min(1, len(names) - 1)], label="Noise at alpha 1", min_width=120)
                    alpha = gr.Slider(0, 1, 0.5, step=0.05, label="alpha between them")
                    eta = gr.Slider(0, 1, 0, step=0.05, label="eta, fresh noise")
                    steps = gr.Slider(1, 100, faces.config.num_steps, step=1, label="Steps", info="50 are the grader's convention")
                    seed = seed_of(0)
                results(drawing(faces.draw, 4, 2), seed, [first, second, alpha, eta, steps])
        with gr.Tab("Words"):
            about("words")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    prompts = words.examples()
                    prompt = gr.Textbox(prompts[0], label="Prompt", info=f"learned words: {', '.join(words.rows) or 'none'}", lines=2)
                    gr.Examples([[text] for text in prompts], prompt, label="Try")
                    place = gr.Dropdown(list(PLACES), value="anywhere", label='Of "a ... next to a ...", what stands where')
                    clicks = gr.State([])
                    with gr.Group(visible=False) as square:
                        target = gr.Image(canvas([]), format="png", interactive=False, label="click the first, then the second", buttons=[], height=CANVAS)
                    weight = gr.Slider(0, 12, words.config.guidance_weight, step=0.5, label="Guidance weight w")
                    steps = gr.Slider(1, 50, words.config.num_steps, step=1, label="Steps")
                    count = gr.Slider(1, words.config.batch_size, 4, step=1, label="How many")
                    seed = seed_of(0)
                results(drawing(words.draw, 4, 2), seed, [prompt, weight, steps, count, place, clicks])
            place.change(lambda chosen: gr.Group(visible=chosen == BY_CLICKS), place, square, show_progress="hidden")

            def click(points, event: gr.SelectData):
                points = clicked(points, *event.index)
                return points, canvas(points)
            target.select(click, clicks, [clicks, target], show_progress="hidden")
        with gr.Tab("Classes"):
            about("classes", ", ".join(classes.templates).format("..."))
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    paths, numbers, labels = read_data(MINI / "clip_zeroshot")
                    some = [paths[numbers.index(number)] for number in list(labels)[::5]]
                    upload = gr.File(label="A picture of yours", height=120)
                    gr.Examples([[str(path)] for path in some], upload, label="Or one of these")
                    text = gr.Textbox(", ".join(list(labels.values())[::5]), label="Classes, with commas between them", lines=3)
                with gr.Column(scale=5, min_width=300):
                    with gr.Row(elem_classes="buttons"):
                        button = gr.Button("Classify", variant="primary")
                    page = gr.HTML('<div class="empty">Choose a picture.</div>')
            gr.on([button.click, upload.change], lambda path, names: chances(classes, path, names), [upload, text], page, **one)
    return blocks


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="P1: a model.safetensors of p1_train.sh (default: the installed one, or the bundled one)")
    parser.add_argument("--unet", type=Path, default=FACES / "UNet.pt", help="P2: the network's state dict")
    parser.add_argument("--noises", type=Path, default=FACES / "noise", help="P2: folder of noises")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="P3: sd-v1-4.ckpt, another file of its layout, or a diffusers folder")
    parser.add_argument("--embeddings", action="append", default=None, metavar="WORDS", help="P3: a folder of learned words, or a file of one; may be given "
                        "several times (default: those that scripts/install.sh installed for this model)")
    parser.add_argument("--clip", default=str(MINI / "clip"), help="P3: a CLIP, as p3_clip.sh takes by --model")
    parser.add_argument("--pretrained", default=None, help="P3: its weights, where --clip is a model of open_clip")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--port", type=int, default=None, help="of this machine, where the page is (default: the first free one from 7860)")
    return parser.parse_args()


def serve(args, folder):
    """Loads the models and serves the page to this machine; returns it. folder: for what the page needs for a while."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:  # that could open the page to others, or more files to it
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    import gradio as gr

    digits, faces, words, classes = Digits(args), Faces(args), Words(args), Classes(args)
    mini = " The miniature knows drawings of things on plain grounds, and no photographs." if words.row.key == "miniature" else ""
    told = (f"All is computed on this machine ({describe(classes.grader.device)}): digits by {digits.networks[0][-1].name}, faces by {args.unet.name}, "
            f"pictures by {words.row.name}.{mini}")
    blocks = build(gr, digits, faces, words, classes, told)
    blocks.launch(server_name="127.0.0.1", server_port=args.port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False, mcp_server=False,
                  pwa=False, run_history=False, enable_monitoring=False, footer_links=[], max_file_size="50mb", css=CSS,
                  theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", **FONTS))
    return blocks


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary folder goes then, too
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        try:
            blocks = serve(args, folder)
        except USER_ERRORS as error:
            fail(str(error))
        print(f"open {blocks.local_url} in a browser of this machine; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            blocks.close()


if __name__ == "__main__":
    run(main)
