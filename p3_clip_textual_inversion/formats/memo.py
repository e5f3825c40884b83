"""What was computed from large files is not computed again until one of them is another: kept in the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""

import json
import os
from pathlib import Path

from ..files import UserError, first_line, note, read_json, write_json

MOST = 1000  # values that are kept


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "p3_clip" if base else Path("~/.cache/p3_clip").expanduser()


class Memo:
    """Values, that JSON can hold, by the paths, sizes, times of change and inodes of the files that they were computed from."""

    def __init__(self, path):
        self.path = path
        try:
            self.known = read_json(path)
        except UserError:  # there is none yet, or it is damaged
            self.known = {}
        if not isinstance(self.known, dict):
            self.known = {}

    def of(self, files, compute):
        """compute(), or what it gave for these files before. A cache that cannot be written costs time, and is no error."""
        key = json.dumps([[str(path), *stamp_of(path)] for path in (Path(file).absolute() for file in files)])
        if key not in self.known:
            self.known[key] = compute()
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, dict(list(self.known.items())[-MOST:]))
            except (OSError, UserError) as error:
                note(f"what was read of large files is not kept: {first_line(error)}")
        return self.known[key]


def stamp_of(path):
    """Whatever replaces a file's content changes one of these, its name and size apart: the time of change is the system's own, and nothing sets it back."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
