"""Files and errors: one exception for everything a user can cause, honest exits, atomic writes, a lock for each folder. Python's own library only."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import signal
import stat
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

from .guard import escape, stop

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "hw2_data" / "mini"  # the bundled stand-in for the course's data
RESULTS = ROOT / "report" / "results"
TEMPORARY = re.compile(r"\.hw2-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part(\.\w+)?")  # machine, process, random
LOCK = ".hw2-lock"
SHORTAGE = re.compile(r"can't allocate memory|(out of|not enough) memory|[Ss]torage size calculation overflowed|array is too big|"
                      r"[Mm]aximum allowed (size|dimension)|too large to convert|Overflow when unpacking|integer multiplication overflow")
MOST_JSON = 200_000_000  # bytes


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what would be right."""

    def __init__(self, message):
        super().__init__(shown(message))


def shown(text):
    """A name or a message as one line of printable characters: others, which a name from elsewhere may hold, are escaped."""
    return "".join(c if c.isprintable() else escape(c) for c in str(text))


def first_line(error):
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return shown(error.strerror)
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def note(text):
    """One line on stderr that stops nothing, also between progress bars."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(f"note: {shown(text)}", file=sys.stderr)
    else:
        print(f"note: {shown(text)}", file=sys.stderr)


def check_flags(args, names, fits, expected):
    """A `UserError` for the first of these flags whose value, of parsed arguments, does not fit; expected: what would, in words."""
    for name in names:
        if not fits(getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, not {getattr(args, name)}")


def run(main):
    """Calls `main()`. What the user, the disk or the memory causes is one line on stderr and exit code 1, Ctrl-C is "stopped" and 130."""
    try:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, interrupt)  # from here on there is something to tidy up
        try:
            main()
        finally:
            flush()
    except (KeyboardInterrupt, Exception) as error:
        if INTERRUPTS or isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("stopped", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, UserError):
            sys.exit(f"error: {error}")
        if isinstance(error, OSError):
            sys.exit(f"error: {first_line(error)}{'' if error.filename is None else f': {shown(error.filename)}'}")
        cause = common_cause(error)
        if cause is None:
            raise
        sys.exit(f"error: {cause}")


INTERRUPTS = []  # of this process


def interrupt(*_):
    """Ctrl-C. It is remembered, as libraries that catch it end with errors of their own."""
    INTERRUPTS.append(True)
    raise KeyboardInterrupt


def flush():
    """Says what is still in the buffer, which a closed pipe or a full disk refuses here, and not after the last line of the program."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def common_cause(error):
    """The line for what fails inside a library for a reason that the user can put right; None for other exceptions."""
    if is_shortage(error):
        return f"not enough memory ({first_line(error)}); ask for less at a time, such as a smaller --batch-size"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first_line(error)[:150]}); it needs a C++ compiler, on a GPU Triton too: install them, or leave --compile out"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"the name {shown(error.object)[:200]} is no text, as its bytes are not UTF-8; rename that file"
    if "without overflow" in str(error):
        return f"a number is too large to compute with ({first_line(error)}); try a smaller --lr"
    return None


def is_shortage(error):
    """Whether an exception tells of too little memory, of the processor's or of a GPU's: each library has its own."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or (isinstance(error, (RuntimeError, ValueError, OverflowError)) and SHORTAGE.search(str(error)) is not None))


def temporary_name(suffix=""):
    """A name for a file or a folder that will not last: only we give such names, so only ours are ever removed."""
    machine = zlib.crc32(platform.node().encode())
    return f".hw2-{machine:08x}-{os.getpid()}-{secrets.token_hex(4)}.part{suffix}"


def is_stale(path):
    """Whether a path has a name of `temporary_name` whose process, of this machine, is no more."""
    match = TEMPORARY.fullmatch(path.name)
    if not match or int(match[1], 16) != zlib.crc32(platform.node().encode()):
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


@contextmanager
def atomic_path(path):
    """Yields a temporary name beside `path` and renames it to `path` at the end, so that a kill never leaves half a file."""
    path = Path(path)
    temporary = path.parent / temporary_name(path.suffix)
    failures = [OSError, RuntimeError]  # a full disk: PIL and json raise the first, torch the second, safetensors its own
    if "safetensors" in sys.modules:
        failures.append(sys.modules["safetensors"].SafetensorError)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"cannot write the file {path}: it is {kind_of_entry(path)}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        os.replace(temporary, path)
    except tuple(failures) as error:
        if is_shortage(error):
            raise
        raise UserError(f"cannot write {path}: {first_line(error)}") from None
    finally:
        with suppress(OSError):  # it has its name, or never was
            os.unlink(temporary)


def kind_of_entry(path):
    """What a path leads to, in words: a folder, a named pipe, a device, ..."""
    mode = os.stat(path).st_mode
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a file")


def writable_folder(folder):
    """Makes `folder` and checks that a file can be written there, before any long work starts. Returns its path.

    Removes what killed runs of ours left half-written there, and nothing else."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in folder.iterdir():
            if is_stale(path) and path.is_file():
                path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write into folder {folder}: {first_line(error)}") from None
    return folder


def writable_file(path):
    """Checks that a file can be written at `path`, before any long work starts. Returns its path."""
    path = Path(path)
    folder = writable_folder(path.parent)  # first: the system looks at a name only where its folder is there
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise UserError(f"cannot write the file {path}: it is a folder")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"cannot write the file {path}: {first_line(error)}") from None
    return folder / path.name


@contextmanager
def lock(folder, program=""):
    """Holds a folder, so that two runs at once do not write into it; a `UserError` says who has it. The system lets go when the process ends, in any way.
    program: of several that write into one folder, each files of its own, the one of which no second may."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    path = Path(folder) / f"{LOCK}{program}"
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise UserError(f"cannot write into folder {folder}: {first_line(error)}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                break
            os.close(handle)  # its holder has just removed it: once more
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            raise UserError(f"{folder} is in use by {holder or 'another run'}; wait until it has ended, or choose another folder") from None
        except OSError:  # a file system without locks
            break
    try:
        os.ftruncate(handle, 0)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
        os.write(handle, f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}: {shown(command)}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def write_whole(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, content):
    """JSON has no numbers that are not finite: they are written as null."""
    write_whole(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def finite(content):
    """The same lists and dictionaries, with None for each number that is not finite."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def parse_json(data, make=dict, names=False):
    """The content of JSON in bytes, of any of Unicode's encodings, with a byte-order mark or without. `ValueError` or `RecursionError` where it is none.

    Names given twice, of which Python would keep the last in silence, and NaN, which JSON has not, are none. make: what objects become, of their dict.
    names: whether it may hold names of files that are no text, as a system may have them: Python writes their bytes as half pairs of surrogates."""
    def pairs(items):
        found = dict(items)
        if len(found) != len(items):
            twice = next(name for i, (name, _) in enumerate(items) if name in dict(items[:i]))
            raise ValueError(f"the name {twice!r} is there twice")
        return make(found)

    def constant(name):
        raise ValueError(f"{name} is no number of JSON")

    content = json.loads(data, object_pairs_hook=pairs, parse_constant=constant)
    json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape" if names else "strict")  # other halves of a pair no file's name takes neither
    return content


def read_json(path, make=dict, names=False):
    """The content of a JSON file, which someone else may have written; a `UserError` that names the file where there is none. As `parse_json`."""
    try:
        check_file(path)
        if os.path.getsize(path) > MOST_JSON:
            raise ValueError("too large")
        return parse_json(Path(path).read_bytes(), make, names)
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}{where_from(path)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is not JSON: {'nested too deeply' if isinstance(error, RecursionError) else first_line(error)}") from None


def check_file(path):
    """`OSError` or `ValueError` unless `path` is a regular file that may be read: reading a named pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of_entry(path)}, expected a file")
    open(path, "rb").close()


def existing_file(path, what):
    """The path of a file that is there and may be read."""
    return existing(path, what, check_file)


def existing_folder(path, what):
    """The path of a folder that is there and may be listed."""
    return existing(path, what, lambda path: os.scandir(path).close())


def existing(path, what, look):
    path = Path(path)
    try:
        look(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no such {what}: {path}{' is a file' if os.path.isfile(path) else where_from(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the {what} {path}: {first_line(error)}") from None
    return path


def where_from(path):
    """How to get what is not there, if it is of the course: the end of a message, which is empty for other paths."""
    place, data = Path(path).absolute(), MINI.parent
    if data not in place.parents or MINI in (place, *place.parents) or os.path.lexists(place):
        return ""
    return f"; bash scripts/download_{'weights' if data / 'weights' in place.parents else 'data'}.sh fetches what belongs there"


def fingerprint(*paths):
    """16 hexadecimal digits of the content of files, and of folders' files by name (hidden ones apart); a name that leads to no file, such as a
    hub's, stands for itself. What a result was made by: the same weights have the same, wherever they lie."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if os.path.isdir(path):
            parts = sorted(p for p in path.rglob("*") if os.path.isfile(p) and not any(part.startswith(".") for part in p.relative_to(path).parts))
            names = [str(p.relative_to(path)) for p in parts]
        else:
            parts, names = [path], ["" if os.path.isfile(path) else str(path)]
        for part, name in zip(parts, names):
            digest.update(f"{len(name.encode(errors='surrogateescape'))}:".encode() + name.encode(errors="surrogateescape"))
            if os.path.isfile(part):
                with open(part, "rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
            digest.update(b"\0")
    return digest.hexdigest()[:16]
