"""What a training leaves to go on from: state.pt in its folder, which is written whole, known again by its settings and by what it learns from, and refused
where it is another's. The same file in the three folders."""

import hashlib
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from .files import UserError, atomic_path, lock
from .tensors import read_tensors


@contextmanager
def held(accelerator, folder):
    """Holds a run's folder while it trains: a second run into it says who has it. (Of several processes the main one writes.)"""
    with lock(folder) if accelerator.is_main_process else nullcontext():
        yield


def refuse_others(state_file, results):
    """A `UserError` where results are there without the state of their run: they are another's, and are not overwritten."""
    there = [path for path in results if os.path.lexists(path)]
    if there and not state_file.exists():
        raise UserError(f"{there[0]} is there without its run's state ({state_file}) and is not overwritten; choose another --output, or move it away")


def settings_of(args, free, **more):
    """What a run is known by when it goes on: its flags, but those of the names `free`, and `more`."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in free} | more


def data_fingerprint(*arrays):
    """16 digits of what a run learns from, by which other data are told from the same."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))  # as it lies in memory: pictures may be many
    return digest.hexdigest()[:16]


def load_state(path, settings, needed=("step", "history", "recent"), steps=None, defaults=None):
    """The state that a run of these settings saved; another run's, half a one, or one that is beyond `steps` already, is refused.

    defaults: of the flags; what a flag was that did not exist when the state was written (None: it depends on others, and is not held against it)."""
    state = read_tensors(path, "training state")
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise UserError(f"{path} is not a training state of this script; choose another --output")
    before = {name: value for name, value in (defaults or {}).items() if value is not None} | state["settings"]
    before, settings = ({name: list(value) if isinstance(value, tuple) else value for name, value in each.items()} for each in (before, settings))
    changed = [f"{name} {before[name]} is now {value}" for name, value in settings.items() if name in before and before[name] != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another --output")
    missing = [name for name in needed if name not in state]
    whole = not missing and isinstance(state["history"], list) and all(
        isinstance(row, dict) and all(isinstance(value, (int, float)) for value in row.values()) for row in state["history"])
    if not whole or type(state["step"]) is not int or state["step"] < 0:
        raise UserError(f"{path} is damaged: it has no usable {', '.join(missing) or 'step and history'}; choose another --output")
    if steps is not None and state["step"] > steps:
        raise UserError(f"{path} is at step {state['step']} already, beyond --steps {steps}; choose another --output")
    return state


def save_state(path, accelerator, settings, step, history, recent, **parts):
    """Writes a state. settings: by which `load_state` knows the run; recent: losses, tensors, since the last row of history; parts: whatever has a state_dict,
    or is what torch saves."""
    content = {"settings": settings, "step": step, "history": history, "recent": [loss.item() for loss in recent],
               "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
               **{name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}}
    if accelerator.is_main_process:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)


def restore(path, state, accelerator, **parts):
    """Fills networks, averages, optimisers and the scaler of fp16 with what `save_state` wrote of them: (step, history, recent losses)."""
    with fitting(path):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if accelerator.scaler and state["scaler"]:  # none where another device had computed in another format
            accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], state["history"], [torch.tensor(loss, device=accelerator.device) for loss in state["recent"]]


@contextmanager
def fitting(path):
    """Around the filling of networks and optimisers from a state: what does not fit becomes one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()
        raise UserError(f"{path} does not fit this training ({' '.join(text)[:200]}); choose another --output") from None


def add_row(run, log, rate, measured):
    """Ends a stretch of a training: its losses' mean, the learning rate and what was measured, {name: number}, become a row of the log. A `UserError` where
    a loss is not finite. run: what has step, recent and state_file; log: training.py's `Log`."""
    refuse_nonfinite(run.step, run.recent, run.state_file)
    log.add(run.step, loss=torch.stack(run.recent).mean().item(), lr=rate, **measured)
    run.recent = []


def refuse_nonfinite(step, numbers, path):
    """A `UserError` where the loss or a weight, of tensors of any shape, is not finite: before a state of it takes the place of the good one at `path`."""
    norms = torch.stack([torch.linalg.vector_norm(tensor.detach().float()) for tensor in numbers])
    if not norms.isfinite().all():
        kept = f"; the last good state is kept in {path}" if path.exists() else ""
        raise UserError(f"the loss or the weights are not finite at step {step}; try a smaller --lr, or --dtype fp32, and another --output{kept}")
