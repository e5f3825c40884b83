"""What made a picture, in its file and in a hidden one beside it: results of two makings are never mixed nor graded as something else, and can be drawn again.

A picture's text holds a `Made` as JSON, in which nothing is of the batch or the device. The folder's record adds where, and together with what, it was drawn.
Both travel with the folder.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .device import describe, pick_device
from .files import RESULTS, ROOT, UserError, check_file, finite, first_line, note, parse_json, read_json, shown, writable_folder, write_json
from .pictures import SETTINGS, read_picture, save_image

REPORTED = "(default: the report's own, which tells of the bundled network alone, or runs/ and its name for another one)"
RECORD = f".hw2-made-by-{__package__}.json"  # of this problem alone: another one may have the same folder
BEFORE = ".hw2-made-by.json"  # its name when it was of whichever problem drew last


def report_file(given, name, measured, bundled):
    """Where a measurement is written: the file that is given; the report's where what was measured is what is bundled; otherwise one in runs/."""
    return given or (RESULTS if Path(measured).resolve() == Path(bundled).resolve() else Path("runs")) / name


@dataclass(frozen=True)
class Made:
    """program: the module; settings: all that the picture depends on; made_of: fingerprints of models and words; of: what is this picture's own, such as
    its prompt. All JSON-able."""
    program: str
    settings: dict
    made_of: dict
    of: dict = field(default_factory=dict)

    def with_own(self, of):
        return Made(self.program, self.settings, self.made_of, of)

    def as_json(self):
        return json.loads(json.dumps(finite(asdict(self)), sort_keys=True, default=str))


def read_made(path):
    """The dictionary of a `Made` that a picture's text holds, or None for a picture that another program made."""
    try:
        check_file(path)
        with Image.open(path) as image:
            content = parse_json(image.info[SETTINGS])
    except Exception:  # no picture, or one without that text
        return None
    return content if is_made(content) else None


def is_made(content, parts=("settings", "made_of", "of")):
    """Whether it is a `Made` as JSON, as far as anything relies on: whoever changes a picture's text can write anything there."""
    return isinstance(content, dict) and isinstance(content.get("program"), str) and all(isinstance(content.get(part), dict) for part in parts)


def read_record(folder):
    """The record of a folder, or None: {"made": Made without `of`, "pictures": {name: of}, "batches": [[name, ...], ...], "where": {...}}."""
    path = next((path for name in (RECORD, BEFORE) if (path := Path(folder) / name).exists()), None)
    if path is None:
        return None
    record = read_json(path, names=True)
    if not (isinstance(record, dict) and is_made(record.get("made"), ("settings", "made_of"))
            and all(isinstance(record.get(key), dict) for key in ("pictures", "where")) and all(isinstance(own, dict) for own in record["pictures"].values())
            and isinstance(record.get("batches"), list) and all(isinstance(batch, list) for batch in record["batches"])):
        raise UserError(f"{path} is not a record of this project's; move it away, or choose another folder")
    return record if path.name == RECORD or record["made"]["program"].startswith(f"{__package__}.") else None


def differences(a, b, prefix=""):
    """How two nested dictionaries differ, in words: ["seed 2 is now 3", ...]."""
    found = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{prefix}{key} ")
        elif x != y:
            found.append(f"{prefix}{key} {x} is now {y}")
    return found


def core(made):
    return {key: made[key] for key in ("program", "settings", "made_of")}


def survey(folder, made, pictures, known, overwrite):
    """({names of `pictures` that are in the folder, whole, and so made}, [paths of what was made otherwise and shall be drawn anew]), or a refusal; as `claim`,
    with the names `known` to the folder's record."""
    there, stale, folders = set(), [], {(folder / name).parent for name in pictures}
    for path in sorted(path for path in folder.rglob("*.png") if not path.name.startswith(".")):
        name, found = path.relative_to(folder).as_posix(), read_made(path)
        if found is None:
            if name in pictures and path.stat().st_size:
                raise UserError(f"{path} was not drawn by this project, or is damaged, and is not overwritten; move it away, or choose another folder")
        elif path.parent not in folders and (found["program"] != made["program"] or is_apart(path, folder) or name not in known):
            continue
        elif core(found) != core(made) or (name in pictures and found["of"] != pictures[name]):
            ours = name in pictures or name in known
            if not overwrite or not ours:
                changed = differences(core(found), core(made)) + differences(found["of"], pictures.get(name, found["of"]))
                lost = sum(name not in pictures and os.path.exists(folder / name) for name in known)
                anew = "--overwrite to draw it anew" + (f", which removes {lost} that are not drawn now" if lost else "")
                raise UserError(f"{path} was made otherwise ({'; '.join(changed[:3])}); choose another folder, or {anew if ours else 'move it away'}")
            stale.append(path)
        elif name in pictures and is_whole(path):
            there.add(name)
    return there, stale


def claim(folder, made, pictures, batch_size, where, overwrite=False, alike=None, again=False):
    """Prepares a folder for drawing `pictures`, {name below it: what is its own}, or refuses. Returns the names that are there already, whole, and so made.

    What another program made is never overwritten. Pictures of ours that were made otherwise are drawn anew with `overwrite`, otherwise refused; those of
    them that the folder's record names and that are not among the new ones are then removed, as they would be mixed with them. Copies that it does not name
    are the user's: refused beside the new ones, left alone elsewhere, as are those of another problem or of a folder within that has its own record.
    where: for the record: device, files, ... alike(what is a picture's own): neighbours for which it differs are never in one batch. again: those that are
    there will be drawn again, too."""
    folder, made = Path(folder), made.as_json()
    pictures = json.loads(json.dumps(pictures, default=str))
    record = read_record(folder)
    there, stale = survey(folder, made, pictures, record["pictures"] if record else {}, overwrite)
    same = record is not None and core(record["made"]) == core(made)
    missing = pictures.keys() if overwrite or again else pictures.keys() - there
    batches = batches_with(missing, list(pictures), batch_size, alike and (lambda name: alike(pictures[name])))
    before = record["batches"] if same else []
    record = {"made": made, "pictures": {**(record["pictures"] if same else {}), **pictures},
              "batches": before if before[-len(batches):] == batches else before + batches,
              "where": {**where, "command": shlex.join(sys.argv), **versions()}}
    for path in stale:  # before the record, which then names what is there, whenever this ends
        if path.relative_to(folder).as_posix() not in pictures:
            path.unlink()
    write_json(folder / RECORD, record)
    return set() if overwrite else there


def is_apart(path, folder):
    """Whether a file lies in a folder within `folder` that has a record of its own."""
    return any((within / name).is_file() for name in (RECORD, BEFORE) for within in path.parents if within != folder and within.is_relative_to(folder))


def batches_with(missing, names, batch_size, alike=None):
    """Of the batches of all names, lists of at most `batch_size` in their order, those with any of the missing ones (a set): the last bits of a picture depend
    on those beside it, so that what a broken-off run has left is drawn in the batches that it would always have been in. alike(name): neighbours for which it
    differs are never in one."""
    groups = (list(group) for _, group in groupby(names, alike or (lambda _: None)))
    batches = (group[i:i + batch_size] for group in groups for i in range(0, len(group), batch_size))
    return [batch for batch in batches if not missing.isdisjoint(batch)]


def is_whole(path):
    try:
        read_picture(path)
    except UserError:
        return False
    return True


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "pillow": Image.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads()}


def set_aside(report, graded):
    """Where a grade goes: `report` or, without it, GRADED_grade beside what is graded. One that is there becomes grade_before.json: it must not stand for
    pictures that cannot be graded any more."""
    graded = Path(graded).resolve()
    folder = report or graded.parent / f"{graded.name}_grade"
    with suppress(OSError):  # none there, or no right to write, which `grade_folder` tells
        os.replace(folder / "grade.json", folder / "grade_before.json")
    return folder


def grade_folder(folder):
    """The folder, made and writable."""
    try:
        return writable_folder(folder)
    except UserError as error:
        raise UserError(f"{error}; --report FOLDER puts the grade elsewhere") from None


def check_made(folder, paths, expected=None, partly=False):
    """What the pictures that are to be graded were made by: a dictionary of `Made`, or None where they are another program's. A `UserError` where they are of
    several makings or, unless `partly`, not all that the folder's record tells. expected: {name below the folder: what must be this picture's own}"""
    folder, record = Path(folder), read_record(folder)
    found = {path.relative_to(folder).as_posix(): read_made(path) for path in map(Path, paths)}
    if record and not any(found.values()):
        note(f"{folder / RECORD} tells of pictures that are not there any more: these are another program's")
        record = None
    if record:
        missing = [name for name in record["pictures"] if not (folder / name).is_file()]
        if missing:
            text = (f"{folder} has {len(record['pictures']) - len(missing)} of the {len(record['pictures'])} pictures that its run was to draw "
                    f"({missing[0]} is missing): the same command again goes on")
            if not partly:
                raise UserError(text)
            note(text)
    makings = [core(made) if made else None for made in found.values()]
    first = core(record["made"]) if record else makings[0]
    for name, making in zip(found, makings):
        if making != first or (record and found[name]["of"] != record["pictures"].get(name, found[name]["of"])):
            other = "by another program" if making is None else "; ".join(differences(first or {}, making)[:2]) or "of something else"
            raise UserError(f"{folder / name} was made otherwise than the rest ({other}); draw the folder again, with --overwrite")
        for key, value in (expected or {}).get(name, {}).items():
            if making and found[name]["of"].get(key) != value:
                raise UserError(f"{folder / name} was drawn for the {key} {found[name]['of'].get(key)!r}, not for {value!r}")
    return first


def command_line(start, parser, args, leave_out=()):
    """The command that asks for what parsed arguments say, for the results it writes: `start` and each flag that is not at its default, where not left out."""
    words = [start]
    for action in parser._actions:  # argparse has no public list of them
        value = getattr(args, action.dest, action.default)
        if not action.option_strings or action.dest in leave_out or value == action.default:
            continue
        values = [] if action.nargs == 0 else value if isinstance(value, (list, tuple)) else [value]
        words += [action.option_strings[-1], *(shlex.quote(str(each)) for each in values)]
    return " ".join(words)


def script_line(script, *arguments):
    """The command line of a script of ours, to be copied where one stands: quoted as a shell wants it."""
    path = ROOT / "scripts" / script
    near = Path.cwd() == ROOT or Path.cwd() in (*ROOT.parents[:-1],)  # from elsewhere the way up and down again would be longer than the whole path
    return shlex.join(["bash", os.path.relpath(path) if near else str(path), *map(str, arguments)])


def told(made):
    """A `Made`'s dictionary in one line, for a grade: settings and fingerprints."""
    if made is None:
        return "made by another program"
    return "made by " + made["program"] + ": " + ", ".join(f"{key} {value}" for key, value in {**made["settings"], **made["made_of"]}.items())


def digest(paths):
    """16 digits of the bytes of pictures, in their order: which ones a grade is of."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return sha.hexdigest()[:16]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each default once, as it is typed: not where the help tells it itself, nor that there is none, or that a switch is off."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default in ("", [], ()) or "(default:" in action.help:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def redraw(program, draw, description, more=None):
    """The command that draws a picture again: `draw(made, name, batch, where, args)` gives its pixels, uint8 [H, W, 3]. batch: {name: what is its own} of all
    that were drawn together; where: the record's. more: {flag: what argparse shall know of it}, of one problem alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="a PNG that this problem's inference drew")
    parser.add_argument("--output", type=Path, default=None, help="the file to write (default: runs/redrawn/ and its name)")
    parser.add_argument("--checkpoint", default=None, help="the model, where it no longer lies where it was (default: as recorded)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1; on another than before, a picture differs in the last bits")
    for flag, options in (more or {}).items():
        parser.add_argument(flag, **options)
    args = parser.parse_args()
    args.device = pick_device(args.device)
    made, name, record = read_made(args.picture), args.picture.name, None
    if made is None:
        raise UserError(f"{args.picture} does not tell how it was made: it is no picture that {program} drew")
    if made["program"] != program:
        raise UserError(f"{args.picture} was drawn by {made['program']}; use the redraw of that problem")
    output = args.output or Path("runs") / "redrawn" / args.picture.name
    if output.resolve() == args.picture.resolve():
        raise UserError(f"--output {output} is the picture itself")
    if os.path.lexists(output) and read_made(output) is None:
        raise UserError(f"{output} is there, was not drawn by this project, and is not overwritten; choose another --output")
    for folder in args.picture.resolve().parents[:3]:
        if record := read_record(folder):
            name = args.picture.resolve().relative_to(folder).as_posix()
            break
    batch = next((batch for batch in reversed(record["batches"] if record else []) if name in batch), [name])
    where = record["where"] if record else {}
    if isinstance(where.get("threads"), int) and 0 < where["threads"] <= 1024:
        torch.set_num_threads(where["threads"])
    try:
        again = draw(made, name, {other: record["pictures"][other] if record else made["of"] for other in batch}, where, args)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"what {args.picture} tells of its making is damaged ({type(error).__name__}: {first_line(error)})") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    save_image(again, output, made)
    before = np.asarray(read_picture(args.picture)).astype(int)
    if output.read_bytes() == args.picture.read_bytes():
        print(f"{output} is {args.picture}, byte for byte")
    elif before.shape != again.shape:
        print(f"{output} is {again.shape[1]}x{again.shape[0]}, {args.picture} is {before.shape[1]}x{before.shape[0]}: it was changed")
    else:
        now, then = {"device": describe(args.device), **versions()}, where | {"device": str(where.get("device")).rpartition(", ")[0]}  # without the format
        error, changed = np.abs(before - again), [f"{key} {then.get(key)} is now {value}" for key, value in now.items() if then.get(key) != value]
        print(f"{output} differs from {args.picture} by {error.max()} grey levels at most, {error.mean():.4f} on average"
              + (f" ({shown('; '.join(changed))})" if changed else ""))
