"""What demo.py's page shows: pictures by the functions of the graded commands, with their defaults, seen step by step.

For a seed they are the files that the command beside them writes, byte for byte (of faces, four of which are drawn at a time, a grey level may differ).
Nothing here knows of the page, and nothing is written but to temporary folders.
"""

import argparse
import io
import json
import math
import os
import shlex
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common import UserError, files
from p1_cfg_ddpm import inference as p1
from p2_ddim import inference as p2
from p2_ddim.data import read_noises
from p2_ddim.interpolation import lerp, slerp
from p2_ddim.model import load_unet
from p3_clip_textual_inversion import inference as p3
from p3_clip_textual_inversion.clip import Grader, reads_thumbnails, text_classifier
from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.device import name_of, pick_device, pick_dtype
from p3_clip_textual_inversion.embedding import check_models, expand, find_words, told_model
from p3_clip_textual_inversion.files import fingerprint, note
from p3_clip_textual_inversion.formats.words import gather
from p3_clip_textual_inversion.lora import find_loras
from p3_clip_textual_inversion.pictures import read_picture, save_image, to_uint8
from p3_clip_textual_inversion.places import arranged, things_told
from p3_clip_textual_inversion.provenance import Made, script_line
from p3_clip_textual_inversion.tensors import tensor_fingerprint
from p3_clip_textual_inversion.zero_shot import TEMPLATES

MOMENTS = 6  # of the way from noise to picture, shown in a row
BY_CLICKS = "by two clicks"
USER_ERRORS = (UserError, p2.UserError, p3.UserError)  # each folder has its own
PLACES = {"anywhere": None, "first left, second right": ((0.25, 0.5), (0.75, 0.5)), "first right, second left": ((0.75, 0.5), (0.25, 0.5)), BY_CLICKS: None}


class View(NamedTuple):
    """What is seen of a drawing after a step, the one that started at x_t; t is None once all is done.

    pictures: [(name, bytes of a PNG)]; moments: likewise, of the first picture on its way; command: that draws the same; notes: to be read."""
    done: int
    total: int
    t: int | None
    pictures: list
    moments: list
    command: str = ""
    notes: str = ""


def parsed(add_arguments, *flags):
    """What a command's own parser makes of flags: so the defaults are the command's."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def png(picture, settings=None):
    """The bytes of the file that a command writes of a picture, uint8 [H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        save_image(picture, Path(folder) / "a.png", settings)
        return (Path(folder) / "a.png").read_bytes()


def small(picture, side=256):
    """A picture, PIL or uint8 [H, W, 3], at most of that side."""
    image = Image.fromarray(np.asarray(picture))
    image.thumbnail((side, side))
    return image


@torch.inference_mode()
def watch(states, total, names, decode, settings, command="", notes=""):
    """A `View` after each of a sampler's states. decode: float [B, C, H, W] -> uint8 [B, H, W, 3]; settings: for each picture, what its PNG holds.

    On the way the network's guess of the clean picture is shown, at every step where decoding is cheap."""
    chosen = {round(i * (total - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}
    pictures, moments, seen, cost = [], [], -math.inf, 0.0
    for number, state in enumerate(states):
        started = time.perf_counter()
        if number in chosen or started - seen > 4 * cost:
            guess = decode(state.x0)
            pictures = [(name, png(small(picture))) for name, picture in zip(names, guess)]
            moments = [*moments, (f"t = {state.t}", pictures[0][1])] if number in chosen else moments
            seen = time.perf_counter()
            cost = seen - started
        yield View(number + 1, total, state.t, pictures, moments)
    if not state.x.isfinite().all():
        raise UserError("a picture is not finite; try a smaller guidance weight")
    last = [(name, png(picture, own)) for name, picture, own in zip(names, decode(state.x), settings)]
    yield View(total, total, None, last, moments, command, notes)


class Digits:
    """P1: guided digits of the network, or of its student."""

    def __init__(self, args):
        own = ["--checkpoint", args.model] if args.model else []
        self.networks = [p1.load_with_settings(parsed(p1.add_arguments, "--device", args.device, *flags)) for flags in (own, ["--student"])]
        self.own = own

    def draw(self, domain, digit, weight, student, count, seed):
        model, diffusion, config, _, checkpoint = self.networks[bool(student)]
        config = replace(config, guidance_weight=weight, seed=int(seed))
        if model.config.times and not 0 <= weight <= model.max_weight:
            raise UserError(f"the guidance weight of the student must be between 0 and {model.max_weight:g}, which it has learned, not {weight:g}")
        jobs = p1.all_jobs(int(count), (domain,), (int(digit),))
        made = Made("p1_cfg_ddpm.inference", asdict(config) | {"dtype": name_of(next(model.parameters()).dtype)}, {"model": fingerprint(checkpoint)})
        command = shell("p1_infer.sh", "OUT", "--domains", domain, "--digits", digit, "--images-per-digit", len(jobs), "--guidance-weight", weight,
                        "--seed", config.seed, *(["--student"] if student else self.own), *([] if model.config.times else ["--tries", 1]))
        return watch(p1.states(model, diffusion, jobs, config), config.num_steps, [f"{job.name}.png" for job in jobs], to_uint8,
                     [made.as_json()] * len(jobs), command)


class Faces:
    """P2: faces of two noises and of what lies between them."""

    def __init__(self, args):
        self.config, self.device, self.dtype, _ = p2.draw_settings(parsed(p2.add_arguments, "--device", args.device))
        self.unet, self.noises, self.args = load_unet(args.unet, self.device), read_noises(args.noises), args
        p2.check_size(self.unet.config, next(iter(self.noises.values())).shape)

    def draw(self, first, second, alpha, eta, steps, seed):
        try:
            config = replace(self.config, num_steps=int(steps), eta=eta)
        except ValueError as error:
            raise UserError(str(error)) from None
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be between 0 and 1, not {alpha:g}")
        a, b = self.noises[first], self.noises[second]
        x = torch.stack([a, slerp(a, b, alpha), lerp(a, b, alpha), b])
        names = [f"{first}.png", f"slerp at {alpha:g}", f"lerp at {alpha:g}", f"{second}.png"]
        between = {0: first, 1: second}.get(alpha, f"{alpha:g}")  # whose fresh noise it gets, as p2_figures has it
        noise = p2.ImageNoise(int(seed), [first, between, between, second], x.shape[1:], self.device)
        made = Made("p2_ddim.inference", asdict(config) | {"seed": int(seed), "dtype": name_of(self.dtype)}, {"model": fingerprint(self.args.unet)})
        ends = [made.with_own({"noise": fingerprint(Path(self.args.noises) / f"{name}.pt")}).as_json() for name in (first, second)]
        command = shell("p2_infer.sh", self.args.noises, "OUT", self.args.unet, "--eta", eta, "--steps", config.num_steps, "--seed", int(seed))
        lengths = [f"{name}, length {(own.norm() / math.sqrt(own.numel())):.2f}" for name, own in zip(names, x)]
        return watch(config.states(self.unet, x.to(self.device), noise, self.dtype), config.num_steps, lengths, p2.to_pictures,
                     [ends[0], None, None, ends[1]], command)


class Words:
    """P3: pictures of prompts with learned words."""

    def __init__(self, args):
        own = parsed(lambda parser: (parser.add_argument("--checkpoint"), p3.add_arguments(parser)), "--checkpoint", args.checkpoint, "--device", args.device)
        self.config, device, self.row, self.model = p3.settings_of(own)
        self.args, self.rows, initials, origin = args, {}, {}, {}
        try:
            learn = f"bash scripts/p3_train.sh --checkpoint {args.checkpoint} --output runs/words, then bash scripts/install.sh runs/words"
            sources = args.embeddings or [find_words(self.model, learn)]
            self.rows, initials, origin = gather(sources, [], (), own.width, self.model)
        except UserError as error:
            if args.embeddings:
                raise
            note(f"{error}; until then there are ordinary words only")
        for line in check_models({path: (word, told_model(metadata)) for word, (path, metadata) in origin.items()}, list(self.rows), self.model):
            print(line)
        self.weights_left_out = bool(find_loras((), origin))
        if self.weights_left_out:
            note("the weights of low rank beside the words are left out on this page; p3_infer.sh draws with them")
        self.prints = {word: (f"{initials[word]}+" if word in initials else "") + tensor_fingerprint(rows) for word, rows in self.rows.items()}
        self.parts = (p3.load_with_words(args.checkpoint, device, self.config, self.rows, None, initials) if self.rows
                      else p3.load(args.checkpoint, device, self.config))
        self.counts, self.weights = {word: len(rows) for word, rows in self.rows.items()}, p3.weights_fingerprint(args.checkpoint)

    def examples(self):
        """Prompts to begin with: those of the model's own input.json whose words are there, and one of two ordinary things."""
        concepts = read_concepts(self.row.input) if self.row.input.is_file() else []
        return [prompt for concept in concepts if concept.token in self.rows for prompt in concept.prompts] + [
            f"a {self.row.ordinary[0]} next to a {self.row.several.ordinary}"]

    def draw(self, prompt, weight, steps, count, place, clicks, seed):
        if not prompt.strip():
            raise UserError("the prompt is empty")
        points = clicks if place == BY_CLICKS else PLACES[place]
        if place == BY_CLICKS and len(clicks) < 2:
            raise UserError("click twice into the square: where the first thing of the prompt should be, and where the second")
        regions = ()
        if points:
            things = [prompt[start:end] for start, end, _ in things_told(prompt, list(self.rows))]
            if len(things) != 2:
                raise UserError('places are for a prompt of two things, "a ... next to a ..."; for others choose "anywhere"')
            regions = tuple(zip(things, arranged(points)))
        config = replace(self.config, guidance_weight=weight, num_steps=int(steps), seed=int(seed), regions=regions)
        text = expand(prompt, self.counts)
        plans = p3.plans_of([text], config, self.counts)
        with redirect_stderr(io.StringIO()) as notes:
            p3.check_lengths(self.parts, [text], self.counts)
        token = next((word for word in self.counts if word in prompt), "")
        own = [{"prompt": prompt, "token": token, "number": i, "words": {word: self.prints[word] for word in self.counts if word in prompt}}
               for i in range(int(count))]
        made = Made("p3_clip_textual_inversion.inference", config.told(), {"model": self.model, "weights": self.weights})
        with torch.inference_mode():
            guided = p3.regional(self.parts, [plans.get(text, ())] * len(own), p3.encoded(self.parts, p3.texts_of(plans)))
            states = p3.states(self.parts, self.parts.encode_text([text]).expand(len(own), -1, -1), [p3.noise_name(one) for one in own], config, guided)
        return watch(states, config.num_steps, [f"picture {i}" for i in range(len(own))], lambda x: to_uint8(self.parts.decode(x)),
                     [made.with_own(one).as_json() for one in own], self.command(prompt, token, len(own), config) if token else "", notes.getvalue())

    def command(self, prompt, token, count, config):
        concept = json.dumps({"0": {"token_name": token, "prompt": [prompt]}})
        words = [part for source in self.args.embeddings or () for part in ("--embeddings", source)]
        return f"echo {shlex.quote(concept)} > prompt.json\n" + shell(
            "p3_infer.sh", "prompt.json", "OUT", self.args.checkpoint, *words, "--num-images", count, "--guidance-weight", config.guidance_weight,
            "--steps", config.num_steps, "--seed", config.seed, *(["--lora-scale", 0] if self.weights_left_out else []),
            *(["--regions"] if config.regions else []),
            *(f"{thing}={','.join(f'{edge:g}' for edge in box)}" for thing, box in config.regions))


class Classes:
    """P3: which of some captions fits a picture best."""

    def __init__(self, args):
        device = pick_device(args.device)
        self.grader = Grader(args.clip, args.pretrained, device, pick_dtype("auto", device, among=("bf16",)))
        self.templates = TEMPLATES["drawing" if reads_thumbnails(args.clip) else "photo"]

    def classify(self, path, classes):
        """(the picture, [(class, probability, cosine)], the likeliest first) of a file and names with commas between them."""
        names = list(dict.fromkeys(" ".join(name.split()) for name in classes.split(",") if name.strip()))
        if path is None:
            raise UserError("choose a picture first")
        if not 2 <= len(names) <= 1000:
            raise UserError(f"give two to 1,000 different classes, with commas between them, not {len(names)}")
        picture = read_picture(path)
        directions = text_classifier(self.grader.clip, self.grader.tokenizer, names, self.templates, self.grader.device).cpu()
        cosines = (self.grader.of_pictures([picture]) @ directions.T).double()[0]
        scale, bias = self.grader.logits
        chances = (scale * cosines).softmax(0) if bias is None else (scale * cosines + bias).sigmoid()
        return picture, [(names[i], chances[i].item(), cosines[i].item()) for i in chances.argsort(descending=True, stable=True).tolist()]


def shell(script, *arguments):
    """A command line; paths in the project are told from its folder."""
    words = [f"{a:g}" if isinstance(a, float) else str(a) for a in arguments]
    words = [str(Path(word).relative_to(files.ROOT)) if word.startswith(f"{files.ROOT}{os.sep}") else word for word in words]
    return script_line(script, *words)
