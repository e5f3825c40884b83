"""What holds before anything else is imported: nothing comes from the folder one stands in, and Ctrl-C, closed streams and plain terminals are no tracebacks.

`python -m PACKAGE.MODULE` and scripts/run.py import the package first, and with it this file, which needs only what Python itself has loaded.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def begin():
    """Called by each package's __init__.py. Does nothing where the package is not run, but imported by other code."""
    if sys.argv[:1] == ["-m"]:  # what Python puts there while it imports the package of a module that it will run
        keep_out_the_working_folder()
        open_streams()
        refuse_empty(sys.argv[1:])
        quiet_interrupts()
        need_packages()


def keep_out_the_working_folder():
    """Python puts the folder one stands in before everything else: a torch.py there, perhaps downloaded, would be run in place of torch.
    The project's own folder goes to the end (Python 3.11 has -P for this, 3.10 has not)."""
    try:
        here = os.getcwd()
    except OSError:  # the folder is gone
        here = ""
    if sys.path and sys.path[0] in ("", here, ROOT) and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    if ROOT not in sys.path:
        sys.path.append(ROOT)


class Stream:
    """A stream of text that never fails for a letter which the terminal lacks, and shows control characters, as names of files may hold them, as text.

    forgiving: a failure to write is ignored, as progress and notes must not stop the work."""

    def __init__(self, stream, forgiving):
        self.stream, self.forgiving = stream, forgiving

    def write(self, text):
        try:
            # progress bars below each other go up a line by this one sequence
            self.stream.write("\x1b[A".join("".join(c if c.isprintable() or c in "\n\r\t" else escape(c) for c in part) for part in text.split("\x1b[A")))
        except (OSError, ValueError) as error:
            self.fail(error)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.fail(error)

    def fail(self, error):
        if not self.forgiving:
            raise OSError(getattr(error, "errno", 0), f"cannot write to the standard output: {getattr(error, 'strerror', None) or error}") from None

    def __getattr__(self, name):
        return getattr(self.stream, name)


def escape(character):
    """A character that is not printed as it is, in Python's spelling: \\x1b, \\n, \\udcff."""
    return character.encode("unicode_escape").decode()


def open_streams():
    """Standard streams that were closed lead nowhere (else the next file to be opened takes their number, and messages go into it)."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, forgiving in (("stdout", False), ("stderr", True)):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Stream(stream, forgiving))


def refuse_empty(arguments):
    """An empty argument is mostly a variable of the shell that was never set, as in `infer.sh "$OUT"`; as a path it would be the folder one stands in."""
    for before, argument in zip(["", *arguments], arguments):
        if not argument and not before.endswith("prompt"):
            sys.exit(f"error: {'the value of ' + before if before.startswith('--') else 'an argument'} is empty, as a variable that was never set is; "
                     "write it out (for the folder that you stand in: .)")


def need_packages():
    """A line where another Python than the project's is in use: the system's, mostly, which `python` is in the shell."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        sys.exit(f"error: {sys.executable} has not the project's packages (torch is missing); call the Python that this prints: "
                 f"bash {os.path.join(ROOT, 'scripts', 'setup.sh')}")


def stop(*_):
    os.write(2, b"stopped\n")
    os._exit(130)


def quiet_interrupts():
    """Until `files.run` takes over, while libraries are imported, Ctrl-C ends the process at once: nothing is half done yet."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background may have to ignore it
        signal.signal(signal.SIGINT, stop)


def run_module():
    """Runs the module that the first argument names, as `python -m` does, wherever one stands: what scripts/run.py and `command` call."""
    import runpy

    sys.path[0] = ROOT
    name = sys.argv[1]
    sys.argv[:2] = ["-m"]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def command(name):
    """The command that runs a module of the project in a process of its own; arguments follow."""
    return [sys.executable, os.path.abspath(__file__), name]


def call(arguments):
    """Runs a command and returns its exit code. Ctrl-C reaches it too, or is passed on; this program then ends like it."""
    import subprocess

    process = subprocess.Popen([str(argument) for argument in arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.send_signal(2)
            process.wait()
        sys.exit(130)


if __name__ == "__main__":
    run_module()
