"""What the scripts share: reading what earlier runs wrote, writing whole files, and stopping with one line."""

import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fail(text):
    sys.exit(f"error: {text}")


def read_json(path, **options):
    """The content of a JSON file that a run wrote. options: json.loads's."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), **options)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        fail(f"{path} is not JSON: {error}; run the script that writes it again")


@contextmanager
def atomic_path(path):
    """Yields a temporary name beside `path` and renames it to `path` at the end, so that a kill never leaves half a file."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.part", suffix=path.suffix)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; an output is as readable as any other
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_whole(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
