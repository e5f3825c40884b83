"""Every reader of the project x every kind of bad file: one line that names the file and says what is wrong, no traceback, no code of the file run, no wait.

What is given is written by `BYTES` and `ENTRIES`, which reader it is given to by `READERS`; a row of the table is a test. All in this process, in
milliseconds each. Readers that are the same file in the three folders (test_common_ground.py) stand here once.
"""

import io
import json
import os
import pickle
import signal
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from p1_cfg_ddpm import classifier, model, state
from p1_cfg_ddpm import data as digits
from p1_cfg_ddpm import files as files1
from p1_cfg_ddpm import pictures as pictures1
from p2_ddim import data as noises
from p2_ddim import evaluate as faces
from p2_ddim import files as files2
from p2_ddim import model as unet
from p3_clip_textual_inversion import clip, concepts, custom_diffusion, embedding, tensors, zero_shot
from p3_clip_textual_inversion import files as files3
from p3_clip_textual_inversion.formats import checkpoint, identity, words

ERRORS = (files1.UserError, files2.UserError, files3.UserError)
MARK = []  # what code of a file would leave


def leave_a_mark(word):
    MARK.append(word)


class Code:
    def __reduce__(self):
        return leave_a_mark, ("run",)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSORS, STATE = {"a.weight": torch.ones(2, 3)}, saved({"a.weight": torch.ones(2, 3)})
BYTES = {  # of no use to any reader
    "nothing": b"",
    "zeros": bytes(5000),
    "noise": bytes(range(7, 256)) * 9,
    "a web page": b"<!DOCTYPE html><html>Sign in</html>",
    "an xml error": b"<?xml version='1.0'?><Error/>",
    "a git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a text": b"just words\n",
    "a utf-16 text": "wörds".encode("utf-16"),
    "a pdf": b"%PDF-1.7\n%",
    "gzip": b"\x1f\x8b\x08\0" + bytes(30),
    "7z": b"7z\xbc\xaf\x27\x1c" + bytes(30),
    "rar": b"Rar!\x1a\x07\0" + bytes(20),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "gguf": b"GGUF" + bytes(99),
    "a numpy array": b"\x93NUMPY\x01\0" + bytes(99),
    "a numpy archive": zipped(**{"a.npy": "1"}),
    "a zip of texts": zipped(readme="hello"),
    "a cut-off zip": STATE[: len(STATE) // 2],
    "a damaged zip": STATE[:-60] + bytes(60),
    "a torchscript": zipped(m__code__a="class A: pass", **{"m__constants.pkl": "x"}),
    "json that ends": b'{"a": ',
    "json too deep": b"[" * 200_000,
    "json with a name twice": b'{"a": 1, "a": 2}',
    "json with NaN": b'{"a": NaN}',
    "json with half a pair": b'{"a": "\\ud800"}',
    "a bom alone": b"\xef\xbb\xbf",
    "a long line": b"x" * 100_000,
    "nul in text": b"a,b\n\0,\0\n",
    "escapes": b"\x1b[31mred\x1b[0m",
    "a cut-off png": b"\x89PNG\r\n\x1a\n" + bytes(20),
    "a cut-off jpeg": b"\xff\xd8\xff\xe0" + bytes(20),
    "a cut-off gif": b"GIF89a" + bytes(4),
    "riff": b"RIFF\0\0\0\0WAVE",
    "a pickle of code": pickle.dumps(Code()),
    "a torch file of code": saved(Code()),
    "an old torch file of code": saved(Code(), _use_new_zipfile_serialization=False),
    "code beside tensors": saved({"a": torch.ones(2), "b": Code()}),
    "a pickle of a number": pickle.dumps(3),
    "a cut-off pickle": pickle.dumps(list(range(1000)))[:500],
    "a torch file of a text": saved("hello"),
    "a torch file of nothing": saved(None),
    "a torch file of a list": saved([1, 2]),
    "an empty dict": saved({}),
    "a cut-off safetensors": save(TENSORS)[:-4],
    "a safetensors header alone": header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
    "a header too long": struct.pack("<Q", 1 << 60) + b"{}",
    "offsets below zero": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)),
    "an unknown dtype": header({"a": {"dtype": "F12", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a header of a list": header([1]),
    "overlapping offsets": header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
    "a huge shape": header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, bytes(4)),
    "a tensor of stride 0": saved({"a.weight": torch.ones(1).expand(10**5, 10**5)}),
    "sparse": saved({"a.weight": torch.eye(3).to_sparse()}),
    "integers": saved({"a.weight": torch.ones(2, 3, dtype=torch.int8)}),
    "complex": saved({"a.weight": torch.ones(2, 3, dtype=torch.complex64)}),
    "not finite": saved({"a.weight": torch.full((2, 3), float("nan"))}),
    "a name of escapes": saved({"\x1b[31m": torch.ones(2, 3, 4, 5)}),
    "names that are numbers": saved({1: torch.ones(2)}),
    "a scalar": saved(torch.tensor(1.0)),
    "booleans": saved(torch.ones(1, 3, 64, 64, dtype=torch.bool)),
    "infinite": saved(torch.full((1, 3, 64, 64), float("inf"))),
    "quantised": saved({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
}
ENTRIES = ("missing", "a folder", "a named pipe", "a link to nothing", "a link to itself", "a name too long", "nul in the name", "below a file", "a device")


def entry(folder, kind):
    """A path of a kind, in a folder of its own."""
    folder.mkdir()
    path = folder / "it"
    if kind in BYTES:
        path.write_bytes(BYTES[kind])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to(folder / "nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "below a file":
        path.write_text("x")
        path = path / "it"
    return {"a name too long": folder / ("n" * 300), "nul in the name": folder / "a\0b", "a device": Path("/dev/zero")}.get(kind, path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{kind: its path}, written once: readers change nothing."""
    folder = tmp_path_factory.mktemp("bad")
    return {kind: entry(folder / str(i), kind) for i, kind in enumerate((*BYTES, *ENTRIES))}


@pytest.fixture
def no_wait():
    """What would wait for ever is interrupted, and fails."""
    def late(*_):
        pytest.fail("it waited for 20 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS = {
    "json": files1.read_json,
    "picture": pictures1.read_picture,
    "P1 digit": digits.read_image,
    "P1 model": model.load_model,
    "P1 classifier": classifier.load_classifier,
    "state": lambda path: state.load_state(path, {}),
    "P1 list of labels": digits.read_csv,
    "P2 network": unet.load_unet,
    "P2 noise": noises.read_noise,
    "P2 face": faces.read_pixels,
    "P3 checkpoint": checkpoint.read_checkpoint,
    "P3 model": identity.identify,
    "P3 word": words.read_words,
    "P3 one word": embedding.read_embedding,
    "P3 words": lambda path: words.gather([path], ["<new1>"]),
    "P3 projections": lambda path: custom_diffusion.read_projections(path, NETWORK),
    "P3 concepts": concepts.read_concepts,
    "P3 clip": clip.load_weights,
    "P3 merges": clip.read_merges,
    "P3 captions for classes": lambda path: zero_shot.read_templates(str(path)),
    "P1 archive of digits": lambda path: digits.load_archive(path, "train", ("svhn",)),
}
NETWORK = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(2, 2), "to_v": torch.nn.Linear(2, 2)})})
GOOD = {  # what a reader may take: a reader of any tensors takes tensors, a reader of JSON a JSON text
    "P3 checkpoint": {"a name of escapes", "code beside tensors", "not finite"},  # foreign objects become inert; what is used of a large file is checked later
    "P3 word": {"a name of escapes", "code beside tensors"},
    "P3 one word": {"code beside tensors"},
}
ROWS = [(reader, kind) for reader in READERS for kind in (*BYTES, *ENTRIES)]


def test_the_table_is_long():
    assert len(ROWS) >= 1000


@pytest.mark.parametrize("reader, kind", ROWS, ids=[f"{reader}: {kind}" for reader, kind in ROWS])
def test_a_bad_file_is_one_line(paths, no_wait, reader, kind):
    """The line names the file, says no control character, and does not advise to run what is in it."""
    MARK.clear()
    path = paths[kind]
    try:
        READERS[reader](path)
    except ERRORS as error:
        said = str(error)
        assert "\n" not in said and said.isprintable() and len(said) < 900, said
        assert "weights_only" not in said and "trust_remote" not in said, said
        assert path.name.replace("\0", "\\x00") in said, said
    else:
        assert kind in GOOD.get(reader, ()), "it was taken"
    assert not MARK


def test_the_alarm_ends_a_wait(paths, no_wait):
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(pytest.fail.Exception, match="waited"):
        paths["a named pipe"].read_bytes()


def test_a_reader_that_runs_code_would_be_seen(paths):
    MARK.clear()
    pickle.loads(paths["a pickle of code"].read_bytes())
    assert MARK == ["run"]


@pytest.mark.parametrize("length, begins", [(640, b"\x80\x02"), (19_280, b"PK"), (35_615, b"\x1f\x8b")])
def test_a_safetensors_file_is_one_whatever_its_length_begins_as(tmp_path, length, begins):
    """As a pickle, a zip archive, a gzip archive."""
    (tmp_path / "a").write_bytes(save(TENSORS))
    own, = struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])
    text, data = (tmp_path / "a").read_bytes()[8:8 + own], (tmp_path / "a").read_bytes()[8 + own:]
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + text.ljust(length) + data)
    assert (tmp_path / "a").read_bytes().startswith(begins)
    assert torch.equal(checkpoint.read_checkpoint(tmp_path / "a")["a.weight"], TENSORS["a.weight"])


def test_the_same_content_is_the_same_file(tmp_path):
    """Results know what they were made of by its bytes; safetensors itself writes these names in an order of chance."""
    facts = {"model": "wörd", "lr": "0.1", "words": "<new1>\n\x7f\x01", "a": '"', "steps": "3"}
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in files:
        tensors.save_tensors(path, TENSORS, facts)
    assert len({path.read_bytes() for path in files}) == 1 and tensors.read_safetensors(files[0])[1] == {"format": "pt", **facts}
