"""The bundled miniatures of CLIP and of Stable Diffusion: they load in the usual ways, without a network, and do what the README says."""

import json
import socket

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from p3_clip_textual_inversion.clip import Grader, load_clip
from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.data import example_pictures
from p3_clip_textual_inversion.defaults import MINIATURE
from p3_clip_textual_inversion.embedding import add_words, expand, installed_folder, model_name
from p3_clip_textual_inversion.evaluate import clip_scores
from p3_clip_textual_inversion.files import MINI
from p3_clip_textual_inversion.formats.identity import identify
from p3_clip_textual_inversion.formats.words import gather
from p3_clip_textual_inversion.inference import DrawConfig, generate
from p3_clip_textual_inversion.model import MINI_SD, load_stable_diffusion
from p3_clip_textual_inversion.samplers import ImageNoise

INPUT = MINI / "textual_inversion" / "input.json"
GUIDANCE = MINIATURE.drawing.guidance_weight
WORDS = installed_folder(model_name(MINIATURE, identify(MINI_SD)))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def grader():
    return Grader()


def test_open_clip_loads_it_offline_and_gives_our_features_and_ids(offline):
    """Its tokenizer has to be told of the vocabulary: of a folder open_clip reads none but Hugging Face's."""
    name, texts = f"local-dir:{MINI / 'clip'}", ["a drawing of a fox", "Two dogs &amp; a cat!! it's 123", "a " * 60, ""]
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(MINI / "clip" / "bpe.txt.gz"))
    ours, own_transform, own_tokenizer = load_clip(str(MINI / "clip"))
    with torch.inference_mode():
        picture = Image.open(MINI / "clip_zeroshot" / "val" / "0_0.png").convert("RGB")
        pictures, own_pictures, ids, own_ids = transform(picture)[None], own_transform(picture)[None], tokenizer(texts), own_tokenizer(texts)
        assert pictures.equal(own_pictures) and ids.equal(own_ids)
        assert torch.allclose(model.eval().encode_image(pictures), ours.encode_image(pictures), atol=1e-5)
        assert torch.allclose(model.encode_text(ids), ours.encode_text(ids), atol=1e-5)


def test_diffusers_loads_it_offline_and_draws_the_same(offline):
    pipeline = StableDiffusionPipeline.from_pretrained(MINI_SD)  # as anyone would write it: all parts in one dtype
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise(0, ["x"], (4, 16, 16))()
    theirs = pipeline("a drawing of a fox", latents=noise, num_inference_steps=10, guidance_scale=4.0, output_type="np", height=64, width=64).images
    ours = list(generate(load_stable_diffusion(), ["a drawing of a fox"], ["x"], DrawConfig("ddim", 10, 3.0)))
    assert np.abs(ours[0].astype(int) - (theirs[0] * 255).round()).max() <= 1


def test_its_text_encoder_is_clips_text_tower():
    clip = open_clip.create_model(f"local-dir:{MINI / 'clip'}").eval()
    parts = load_stable_diffusion()
    ids = parts.tokens(["a drawing of a fox on a blue background", "a dog face next to a red apple"])
    seen = []
    handle = clip.ln_final.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    with torch.inference_mode():
        clip.encode_text(ids)
        hidden = parts.text_encoder(ids).last_hidden_state
    handle.remove()
    last = ids.argmax(dim=1).tolist()  # behind the end, the paddings differ: CLIP reads zeros there
    for ours, theirs, end in zip(hidden, seen[0], last):
        assert torch.allclose(ours[:end + 1], theirs[:end + 1], atol=1e-4)


def test_it_draws_what_it_is_asked_for(grader):
    """Eight pictures, each recognised among their eight names by the miniature of CLIP more often than not (chance: one)."""
    names = ["fox", "bus", "banana", "snowman", "rose", "guitar", "red heart", "frog"]
    pictures = generate(load_stable_diffusion(), [f"a drawing of a {name}" for name in names], names, DrawConfig(guidance_weight=GUIDANCE, num_steps=15))
    features = grader.of_pictures([Image.fromarray(picture) for picture in pictures])
    assert ((features @ grader.of_texts([f"a drawing of a {name}" for name in names]).T).argmax(1) == torch.arange(8)).sum() >= 5


@pytest.mark.parametrize("number", ["0", "1"])
def test_shipped_words_draw_their_concept(grader, number):
    """Eight pictures of each prompt are nearer to the examples with the learned word than with the words it started from, noise by noise, beyond chance."""
    concept = next(c for c in read_concepts(INPUT) if c.number == number)
    references = grader.of_pictures(example_pictures(INPUT.parent / number))
    vectors = gather([WORDS], [])[0]
    counts, names, config = {w: len(rows) for w, rows in vectors.items()}, list("abcdefgh"), DrawConfig(guidance_weight=GUIDANCE, num_steps=15)
    plain, learned = load_stable_diffusion(), load_stable_diffusion()
    add_words(learned, vectors)
    scores = []
    for parts, word in ((plain, concept.src_image), (learned, concept.token)):
        texts = [expand(prompt.replace(concept.token, word), counts) for prompt in concept.prompts]
        pictures = [Image.fromarray(p) for p in generate(parts, [text for text in texts for _ in names], names * len(texts), config)]
        scores.append(clip_scores(grader.of_pictures(pictures), references, references[0])[0])
    gain = scores[1] - scores[0]
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_sizes():
    """Both models together stay below 60 MB, and input.json names pictures and words that are there."""
    files = [path for folder in (MINI / "clip", MINI_SD) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    content = json.loads(INPUT.read_text())
    assert all(len(example_pictures(INPUT.parent / number)) == 5 for number in content)
    assert {entry["token_name"] for entry in content.values()} <= set(gather([WORDS], [])[0])
