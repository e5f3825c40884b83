"""Files and errors: one exception for everything a user can cause, atomic writes, safe loading of tensors."""

import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what would be right."""


def check_flags(args, names, fits, expected):
    """A `UserError` for the first of these flags whose value, of parsed arguments, does not fit; expected: what would, in words."""
    for name in names:
        if not fits(getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, not {getattr(args, name)}")


def run(main):
    """Calls `main()` and turns a `UserError` (or Ctrl-C) into one line on stderr and a non-zero exit code."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


@contextmanager
def atomic_path(path):
    """Yields a temporary name beside `path` and renames it to `path` at the end, so that a kill never leaves half a file."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.part", suffix=path.suffix)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; an output is as readable as any other
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: PIL and json raise the first, torch the second
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def writable_folder(folder):
    """Makes `folder` and checks that a file can be written there, before any long work starts. Returns its path.

    Removes what a killed run left half-written there: no file takes the minute that it is given."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in folder.glob(".*.part*"):
            if time.time() - path.stat().st_mtime > 60:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into folder {folder}: {error.strerror}") from None
    return folder


def writable_file(path):
    """Checks that a file can be written at `path`, before any long work starts. Returns its path."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write the file {path}: it is a folder")
    return writable_folder(path.parent) / path.name


def write_json(path, content):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """The content of a JSON file, which someone else may have written. `OSError`, `ValueError` or `RecursionError` where there is none."""
    text = Path(path).read_text(encoding="utf-8")
    content = json.loads(text)
    json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a pair of surrogates is no text: no tokenizer and no file's name takes it
    return content


def save_image(image, path):
    with atomic_path(path) as temporary:
        image.save(temporary)


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_pickle_safely(path, what):
    """`torch.load` of a file that may come from anywhere: tensors and plain containers only, never code."""
    path = existing_file(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes its reader raise anything, struct.error too
        raise UserError(f"{path} cannot be read as a {what}: {first_line(error)}") from None


def load_state(path, settings):
    """The state that a training saved, if it belongs to a run with these settings."""
    state = load_pickle_safely(path, "training state")
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise UserError(f"{path} is not a training state of this script; choose another --output")
    changed = [f"{name} {state['settings'].get(name)} is now {value}" for name, value in settings.items() if state["settings"].get(name) != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another --output")
    return state


def is_plain(value):
    """Whether it is a tensor of numbers in memory: not sparse, nested, quantised or without data, as a file may have them too."""
    return isinstance(value, torch.Tensor) and not (value.is_nested or value.is_quantized or value.is_meta) and value.layout == torch.strided


def existing_file(path, what):
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such {what}: {path}")
    return path
