"""The parsers under hypothesis: whatever stands in a file that someone else wrote or damaged, it is read or refused in one line; no other error, nothing run.

Each valid file is cut off and changed at random; and what stands in it, where that is a structure, is any other structure. The readers of a problem's own files
have theirs in its test_fuzz.py.
"""

import contextlib
import importlib
import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from p1_cfg_ddpm import data, files, pictures, provenance, state, tensors
from p3_clip_textual_inversion import custom_diffusion, model
from p3_clip_textual_inversion import files as files3
from p3_clip_textual_inversion.formats import checkpoint, hugging_face, identity, open_clip_folder, words

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
ERRORS = (files.UserError, files3.UserError)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def numpy_bytes(save_as, *arrays, **named):
    file = io.BytesIO()
    save_as(file, *arrays, **named)
    return file.getvalue()


def png(**texts):
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("hw2_data/face/GT/00.png", bytes(range(256)) * 4)
    return file.getvalue()


def damaged(content):
    """Bytes cut short, with a few of them changed."""
    @st.composite
    def strategy(draw):
        changed = bytearray(content[:draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
        for position, value in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)):
            if changed:
                changed[position % len(changed)] = value
        return bytes(changed)
    return strategy()


def answer(read, *arguments):
    """What a reader gives; None where it refuses in one line. Everything else fails the test."""
    try:
        return read(*arguments)
    except ERRORS as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) > 10
        return None


def unpacked(path):
    """What the download makes of an archive, whose refusal is an exit."""
    module = importlib.import_module("download_data")
    folder = path.parent / "data"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(SystemExit):
        module.unpack(path, folder)
        raise AssertionError("it is not the course's archive")
    said = str(sys.exc_info()[1] or "")
    assert "\n" not in said and list(folder.iterdir()) == []


def cached(path):
    """The digits beside a cache of that content: as read from the pictures, whatever it is."""
    folder = path.parent / "digits"
    if not folder.exists():
        (folder / "svhn" / "data").mkdir(parents=True)
        Image.new("RGB", (28, 28), "red").save(folder / "svhn" / "data" / "0.png")
        (folder / "svhn" / "train.csv").write_text("image_name,label\n0.png,1\n")
    data.load_digits(folder, "train", ("svhn",))
    name, = (folder / ".cache").iterdir()
    name.write_bytes(path.read_bytes())
    images = data.load_digits(folder, "train", ("svhn",)).images
    assert images.shape == (1, 28, 28, 3) and (images[0, 0, 0].tolist() == [255, 0, 0] or path.read_bytes()[-2352:] == images.tobytes())


NETWORK = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(2, 2), "to_v": torch.nn.Linear(2, 2)})})
DIGITS = np.zeros((2, 28, 28, 3), np.uint8)
MADE = {"program": "p", "settings": {"seed": 1}, "made_of": {"model": "m"}, "of": {"prompt": "a"}}
RECORD = {"made": MADE, "pictures": {"a.png": {"prompt": "a"}}, "batches": [["a.png"]], "where": {"threads": 1}}
STATE = {"settings": {"lr": 1}, "step": 1, "history": [], "recent": []}
READERS = {  # what reads it, and a file that it takes
    "json": (files.read_json, json.dumps(RECORD).encode()),
    "utf-16 json": (files.read_json, json.dumps(RECORD).encode("utf-16")),
    "tensors": (lambda path: tensors.read_tensors(path, "file"), saved({"a": torch.ones(2)})),
    "old tensors": (lambda path: tensors.read_tensors(path, "file"), saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)),
    "foreign tensors": (checkpoint.read_checkpoint, saved({"state_dict": {"a": torch.ones(2)}, "callbacks": (1, "x")})),
    "safetensors": (tensors.load_weights, save({"a": torch.ones(2)}, {"config": '{"b": 1}'})),
    "model": (identity.identify, save({"conv_in.weight": torch.ones(2)})),
    "state": (lambda path: state.load_state(path, {"lr": 1}), saved(STATE)),
    "word": (words.read_words, saved({"string_to_param": {"*": torch.ones(1, 8)}, "name": "a"})),
    "projections": (lambda path: custom_diffusion.read_projections(path, NETWORK), saved({"attn2.to_k.weight": torch.ones(2, 2)})),
    "npz of digits": (lambda path: data.load_archive(path, "train", ("svhn",)), numpy_bytes(np.savez_compressed, svhn_train=DIGITS, svhn_train_label=[1, 2])),
    "npy of digits": (lambda path: data.load_archive(path, "train", ("svhn",)), numpy_bytes(np.save, DIGITS)),
    "cache": (cached, numpy_bytes(np.save, DIGITS[:1])),
    "cache of a zip": (cached, numpy_bytes(np.savez, DIGITS)),
    "download": (unpacked, archive()),
    "picture": (pictures.read_picture, png()),
    "record of a picture": (provenance.read_made, png(settings=json.dumps(MADE))),
}


@pytest.mark.parametrize("reader", READERS)
@quick
@given(content=st.data())
def test_a_damaged_file(tmp_path, reader, content):
    read, valid = READERS[reader]
    (tmp_path / "file").write_bytes(content.draw(damaged(valid) | st.binary(max_size=100)))
    answer(read, tmp_path / "file")


CONFIGS = {
    "open_clip": (lambda path: open_clip_folder.check_config(files3.read_json(path), path),
                  {"model_cfg": {"embed_dim": 8, "vision_cfg": {"layers": 1, "width": 8, "image_size": 8, "patch_size": 4},
                                 "text_cfg": {"layers": 1, "width": 8, "heads": 1, "vocab_size": 9, "context_length": 8}},
                   "preprocess_cfg": {"mean": [0, 0, 0]}}),
    "Stable Diffusion": (model.check_config, {"sample_size": 8, "layers_per_block": 2, "block_out_channels": [32, 64], "act_fn": "silu"}),
    "how pictures are prepared": (lambda path: hugging_face.transform_of(files3.read_json(path), 224, False, path.parent),
                                  {"resample": 3, "size": {"shortest_edge": 224}, "crop_size": 224, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5]}),
    "schedule": (lambda path: model.check_schedule(files3.read_json(path), path), {"trained_betas": None, "timestep_spacing": "leading"}),
}


@st.composite
def altered(draw, content):
    """A structure in which some values, at any depth, are any others, and some names are new."""
    if isinstance(content, dict) and content and draw(st.booleans()):
        changed = dict(content)
        key = draw(st.sampled_from(sorted(content)))
        changed[draw(st.just(key) | st.text(max_size=4))] = draw(altered(content[key]))
        return changed
    return draw(JSON | st.sampled_from([10**9, 10**30, -1, 0.5, "../x", "hub/model", [1] * 99]))


@pytest.mark.parametrize("kind", CONFIGS)
@quick
@given(content=st.data())
def test_a_configuration_of_anything(tmp_path, kind, content):
    check, valid = CONFIGS[kind]
    (tmp_path / "config.json").write_text(json.dumps(content.draw(altered(valid))), encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(AttributeError, TypeError, KeyError, ValueError, AssertionError):  # `load_clip` and `load_folder` make one line of these
        answer(check, tmp_path / "config.json")


@quick
@given(made=altered(MADE), record=altered(RECORD))
def test_a_record_of_anything_is_another_programs_or_refused(tmp_path, made, record):
    """What the text of a picture and the hidden file of its folder say is neither believed without a look nor an error of ours."""
    (tmp_path / "a.png").write_bytes(png(settings=json.dumps(made)))
    (tmp_path / provenance.RECORD).write_text(json.dumps(record), encoding="utf-8", errors="surrogatepass")
    found = provenance.read_made(tmp_path / "a.png")
    assert found is None or all(isinstance(found[part], dict) for part in ("settings", "made_of", "of"))
    answer(provenance.check_made, tmp_path, [tmp_path / "a.png"], {"a.png": {"prompt": "a"}})
    ours = provenance.Made("p", {"seed": 1}, {"model": "m"})
    answer(provenance.claim, tmp_path, ours, {"a.png": {"prompt": "a"}, "b.png": {}}, 1, {})
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("content", [np.zeros((1, 28, 28, 3), np.int64), np.zeros((2, 28, 28, 3), np.uint8), np.zeros((1, 28, 28), np.uint8), np.uint8(3)])
def test_a_cache_of_other_pictures_is_not_believed(tmp_path, content):
    (tmp_path / "file").write_bytes(numpy_bytes(np.save, content))
    cached(tmp_path / "file")


@pytest.mark.parametrize("wrong", [{"pictures": {"a.png": 3}}, {"pictures": []}, {"batches": {}}, {"batches": ["a.png"]}, {"where": 1}, {"made": {}}])
def test_a_record_that_is_none_is_refused(tmp_path, wrong):
    files.write_json(tmp_path / provenance.RECORD, RECORD | wrong)
    with pytest.raises(files.UserError, match="is not a record of this project's"):
        provenance.read_record(tmp_path)


@pytest.mark.parametrize("wrong", [{"mean": [0, 0]}, {"mean": ["a", 0, 0]}, {"mean": "abc"}, {"std": [1, 1, 0]}, {"std": [1, 1, None]}, {"mode": "L"}])
def test_numbers_of_a_configuration_are_numbers(tmp_path, wrong):
    content = CONFIGS["open_clip"][1] | {"preprocess_cfg": wrong}
    with pytest.raises(files3.UserError, match=next(iter(wrong))):
        open_clip_folder.check_config(content, tmp_path)


def test_a_small_archive_that_says_it_holds_gigabytes(tmp_path):
    """It is not unpacked to find out."""
    content = bytearray(numpy_bytes(np.savez_compressed, svhn_train=DIGITS, svhn_train_label=[1, 2]))
    place = content.index(b"PK\x01\x02") + 24  # in its table of contents: the size of the first file
    content[place:place + 4] = (4_100_000_000).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(files.UserError, match="it holds more than any digits"):
        data.load_archive(tmp_path / "a.npz", "train", ("svhn",))


NAMES = ["string_to_param", "*", "name", "tokens", "embeddings", "token_ids", "learned_embeds", "delta", "initializer_token", "state_dict", "model", "ema",
         "unet", "modifier_token", "attn2.to_k.weight", "u", "v", "settings", "step", "<new1>", "clip_g", "states", "range", "steps", "conv1.weight"]
VALUES = st.recursive(st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(
    [torch.ones(2), torch.ones(1, 8), torch.ones(2, 8), torch.tensor(1.0), torch.ones(1, 8).half(), torch.ones(2, 2, dtype=torch.int8), torch.ones(0, 8),
     torch.full((1, 8), float("nan")), torch.ones(1).expand(9, 10**9)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.integers(0, 3) | st.sampled_from(NAMES), inner, max_size=4), max_leaves=8)


@settings(quick, max_examples=80)
@given(content=VALUES)
def test_a_torch_file_of_anything(tmp_path, content):
    """Every reader of tensors, given any structure of them."""
    from p1_cfg_ddpm.classifier import load_classifier
    from p2_ddim.data import read_noise
    from p2_ddim.files import UserError as UserError2
    from p2_ddim.model import load_unet

    path = tmp_path / "a.pt"
    path.write_bytes(saved(content))
    for read in (load_classifier, read_noise, load_unet, checkpoint.read_checkpoint, words.read_words, lambda path: state.load_state(path, {"lr": 1}),
                 lambda path: custom_diffusion.read_projections(path, NETWORK), lambda path: words.gather([path], ["<new1>"], width=8)):
        with contextlib.suppress(UserError2):
            answer(read, path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_that_begins_like_a_pickle(tmp_path, length):
    """A safetensors file begins with its header's length: 0x280, 0x380, ... are a pickle's first bytes, too."""
    content = save({"a": torch.ones(2)}, {"note": ""})
    content = save({"a": torch.ones(2)}, {"note": " " * (length - int.from_bytes(content[:8], "little"))})
    assert content[0] == 0x80 and int.from_bytes(content[:8], "little") == length
    (tmp_path / "a.safetensors").write_bytes(content)
    assert tensors.read_tensors(tmp_path / "a.safetensors", "word")["a"].tolist() == [1, 1]
