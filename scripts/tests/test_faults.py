"""Faults injected into the writers: whichever call to the system fails, at whichever time, a file is what it was before or what it should be after."""

import builtins
import errno
import importlib
import io
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import torch as safetensors

from p1_cfg_ddpm import files, pictures, tensors
from p3_clip_textual_inversion import custom_diffusion, embedding
from p3_clip_textual_inversion import files as files3

NEW = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
WRITERS = {  # a file's name, and what writes it
    "a text": ("a.txt", lambda path: files.write_whole(path, "after\n" * 5000)),
    "json": ("a.json", lambda path: files.write_json(path, list(range(5000)))),
    "a picture": ("a.png", lambda path: pictures.save_image(NEW, path)),
    "a picture that knows its settings": ("b.png", lambda path: pictures.save_image(Image.fromarray(NEW), path, '{"seed": 1}')),
    "tensors": ("a.safetensors", lambda path: tensors.save_tensors(path, {"a": torch.arange(5000.0)})),
    "weights": ("w.safetensors", lambda path: tensors.save_weights(path, {"a": torch.arange(5000.0)}, {"b": 1})),
    "a word": ("new1.safetensors", lambda path: embedding.save_embedding(path, "<new1>", torch.ones(2, 8), {"model": "m"})),
    "projections": ("projections.safetensors", lambda path: custom_diffusion.save_projections(path, {"a": torch.ones(2, 8)}, {})),
    "the report's text": ("report.md", lambda path: importlib.import_module("common").write_whole(path, "after")),
}
CALLS = [(os, "open"), (os, "replace"), (os, "close"), (os, "unlink"), (builtins, "open"), (io, "open"), (os.path, "exists")]
FAULTS = {"full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "denied": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
          "interrupted": KeyboardInterrupt()}


def failing_at(number, call, fault):
    """The call, which fails at that time of being made in the folder of the test, and notes that it did."""
    def wrapped(*args, **options):
        wrapped.made += 1
        if wrapped.made == number:
            wrapped.failed = True
            raise fault
        return call(*args, **options)

    wrapped.made, wrapped.failed = 0, False
    return wrapped


def same(content, after):
    """Whether it is that file; safetensors orders what it says of a file as it pleases."""
    if content is None or b"__metadata__" not in after[:40] or len(content) != len(after):
        return content == after
    found, expected = (safetensors.load(part) for part in (content, after))
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place, name", CALLS, ids=[f"{place.__name__}.{name}" for place, name in CALLS])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", [True, False], ids=["over another", "anew"])
def test_a_writer_leaves_what_was_before_or_what_should_be_after(tmp_path, writer, place, name, fault, there):
    file, write = WRITERS[writer]
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / file)
    after, before, path = (tmp_path / "whole" / file).read_bytes(), b"the user's" if there else None, tmp_path / "out" / file
    path.parent.mkdir()
    (path.parent / "thesis.txt").write_text("the user's")
    for number in range(1, 9):
        if there:
            path.write_bytes(before)
        with pytest.MonkeyPatch.context() as patch:
            call = failing_at(number, getattr(place, name), FAULTS[fault])
            patch.setattr(place, name, call)
            try:
                write(path)
                refused = False
            except (files.UserError, files3.UserError, OSError, KeyboardInterrupt, SystemExit) as error:
                refused = True
                assert isinstance(error, KeyboardInterrupt) or "\n" not in str(error)
        content = path.read_bytes() if path.exists() else None
        assert same(content, after) or (refused and content == before), f"at call {number}"
        left = {entry.name for entry in path.parent.iterdir()} - {file, "thesis.txt"}
        assert all(files.TEMPORARY.fullmatch(entry) for entry in left) and (not left or (place, name) == (os, "unlink") or name == "close"), left
        assert (path.parent / "thesis.txt").read_text() == "the user's"
        path.unlink(missing_ok=True)
        if not call.failed:
            break
    else:
        pytest.fail("it made more than eight such calls")


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", [True, False], ids=["over another", "anew"])
def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path, writer, share, there):
    """No file may grow beyond a share of the whole one."""
    file, write = WRITERS[writer]
    write(tmp_path / file)
    size, path = (tmp_path / file).stat().st_size, tmp_path / "out" / file
    path.parent.mkdir()
    if there:
        path.write_bytes(b"the user's")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        with pytest.raises((files.UserError, files3.UserError, SystemExit), match="cannot write") as error:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == ({file: b"the user's"} if there else {})
