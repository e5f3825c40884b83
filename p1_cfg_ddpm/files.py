"""Files and errors: one exception for everything a user can cause, atomic writes, safe loading of weights."""

import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = Path(__file__).resolve().parent / "weights"


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
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
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


def save_image(image, path):
    with atomic_path(path) as temporary:
        image.save(temporary)


def save_weights(path, state_dict, metadata):
    """Writes a state dict as safetensors; `metadata` (JSON-able) goes into its header under "config"."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"config": json.dumps(metadata)})


def load_weights(path):
    """Reads a safetensors file written by `save_weights`. Returns (state dict, metadata)."""
    path = existing_file(path, "checkpoint")
    try:
        with safe_open(path, "pt") as file:
            config = (file.metadata() or {}).get("config")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); expected one that "
                        "p1_cfg_ddpm.train or p1_cfg_ddpm.classifier wrote") from None
    try:
        return tensors, json.loads(config)
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path} has no configuration in its header; expected a file written by this project") from None


def load_pickle_safely(path, what):
    """`torch.load` of a file that may come from anywhere: tensors and plain containers only, never code."""
    path = existing_file(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes its reader raise anything, struct.error too
        raise UserError(f"{path} cannot be read as a {what}: {str(error).splitlines()[0] if str(error) else 'damaged'}") from None


def fill(module, state_dict, path):
    """Strictly puts a state dict's tensors into a module, which may be without data (on the device "meta"); names the first offending tensors."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in own]
    problems += [f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(own[name].shape)}"
                 for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit the network: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(state_dict, assign=True)
    return module


def is_plain(value):
    """Whether it is a tensor of numbers in memory: not sparse, nested, quantised or without data, as a file may have them too."""
    return isinstance(value, torch.Tensor) and not (value.is_nested or value.is_quantized or value.is_meta) and value.layout == torch.strided


def existing_file(path, what):
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such {what}: {path}")
    return path
