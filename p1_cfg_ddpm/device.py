"""Which device and number format to compute in, what to do where memory ends, and how processes share the drawing. The same file in the three folders."""

import io
import os
import platform
import re
import resource
import sys
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import date, timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from .files import UserError, note

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OLDER_WHEELS = 'pip install "torch<2.15" torchvision --index-url https://download.pytorch.org/whl/cu126'  # CUDA 12.6: cards from sm_50, drivers from 525
NEWER_WHEELS = "pip install --upgrade torch torchvision"


# --- which device ---

def pick_device(name="auto"):
    """"auto" is this process's GPU, if there is one that computes, otherwise the CPU; why a GPU is not used is said in a note.

    It computes fp32 exactly until `use_tf32` says otherwise."""
    use_tf32(False)
    if name == "auto":
        reason = gpu_problem()
        if reason:
            note(f"computing on the CPU: {reason}")
        name = "cpu" if reason is not None else "cuda"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|meta", name):  # torch's own answer is a list of all that was ever one
        raise UserError(f"the device {name!r} cannot be used: expected auto, cpu, cuda or, for the second GPU, cuda:1")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if torch.cuda.device_count() == 0:
                raise RuntimeError(gpu_problem() or "there is no GPU")
            device = own_gpu() if device.index is None else device
            torch.cuda.set_device(device)  # accelerate, and whoever says "cuda" alone, take this one
        compute_something(device)  # a device that can be named may still compute nothing: "meta"
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise UserError(f"the device {name!r} cannot be used: {why(error)}") from None
    return device


def own_gpu():
    """The GPU of this process: where several were started, each takes another, and holds no memory of the first one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or "0") % torch.cuda.device_count())


def gpu_problem():
    """None if this process's GPU computes; otherwise why not, or "" where there is none to be seen."""
    with warnings.catch_warnings(record=True) as said:  # a driver that is too old is only warned of
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found:
        try:
            compute_something(own_gpu())
            return None
        except RuntimeError as error:
            return why(error)
    if not Path("/proc/driver/nvidia/version").exists():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"there is an NVIDIA driver, but this torch is built for CPUs only; {NEWER_WHEELS} --index-url https://download.pytorch.org/whl/cu126 has both"
    told = next((str(w.message) for w in said if "driver" in str(w.message).lower()), "torch finds no GPU behind the NVIDIA driver")
    return f"{told.split(' (Triggered')[0].splitlines()[0].rstrip('.')}; update the driver, or: {OLDER_WHEELS}"


def compute_something(device):
    """A convolution, which every network here has, and its answer: what raises nothing here works."""
    x = torch.ones(1, 4, 8, 8, device=device)
    torch.nn.functional.conv2d(x, torch.ones(4, 4, 3, 3, device=device)).sum().item()


def why(error):
    """One line of what a device raised; for a card that torch has no kernels for, with the line that installs those that it needs."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "no kernel image" not in text and "no longer supports" not in text:
        return text
    major, minor = torch.cuda.get_device_capability()
    wheels = OLDER_WHEELS if (major, minor) < (7, 5) else NEWER_WHEELS
    return (f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name()} (sm_{major}{minor}), only {' '.join(torch.cuda.get_arch_list())}; "
            f"install one that has: {wheels}")


def describe(device, dtype=None):
    """A device in words, for the first line of every command: "cuda:0 (NVIDIA H100, 79 GB), bf16"."""
    text = str(device)
    if device.type == "cuda":
        text += f" ({torch.cuda.get_device_name(device)}"
        with suppress(Exception):  # a first line that cannot tell the memory does not stop the work
            text += f", {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GB"
        text += ")"
    return text if dtype is None else f"{text}, {name_of(dtype)}"


# --- which number format ---

def cpu_has_bf16():
    """Whether this processor multiplies bf16 natively (AVX-512 BF16 or AMX). Elsewhere bf16 is emulated, and very slow."""
    try:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    except AttributeError:  # torch before 2.12
        return any(getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("avx512_bf16", "amx_tile"))


def fast_dtypes(device):
    """The names of the half-precision formats that a device computes faster than fp32."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return ("bf16", "fp16")
        # Volta and Turing have tensor cores for fp16. Pascal computes it at 1/64 of the speed of fp32; the GTX 16 series gives NaN in it.
        return ("fp16",) if capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device) else ()
    return ("bf16",) if device.type == "cpu" and cpu_has_bf16() else ()


def is_slow(name, device):
    """Whether a number format is no faster than fp32 on a device: a processor that emulates it takes a hundred times as long."""
    return name not in ("fp32", *fast_dtypes(device))


def pick_dtype(name, device, among=("bf16", "fp16")):
    """"auto" is the first of `among`, the formats in which a command's result is as good, that the device computes fast, otherwise fp32.

    A slow one that is asked for is taken, with a note."""
    if name != "auto":
        if is_slow(name, device):
            note(f"{describe(device)} computes {name} slower than fp32, a processor by far")
        return DTYPES[name]
    fast = fast_dtypes(device)
    return DTYPES[next((own for own in among if own in fast), "fp32")]


def name_of(dtype):
    return next(name for name, own in DTYPES.items() if own == dtype)


def autocast(device, dtype):
    """The context in which a network computes in `dtype`, its weights staying as they are."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype)


def use_tf32(on):
    """Whether fp32 may be computed with 10 bits of mantissa (TF32) on Ampere and newer. cuDNN's convolutions do by default: P2's exact pictures, an MSE
    of 0.0008 from their references in fp32, are 0.1 from them then. Off for drawing and measuring, on for training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 and later have other names for these, which older ones and torch.compile do not know
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def compile_blocks(net, kind):
    """torch.compile of a network's blocks, modules of the class `kind`: those of the same shape share what was compiled, a fifth of the time that P1's whole
    network takes."""
    torch._dynamo.config.recompile_limit = 64  # one for each shape, and for gradients or none
    for module in net.modules():
        if isinstance(module, kind):
            module.compile(dynamic=False)


# --- where memory ends ---

FITTED = {}  # {what: the batch that memory was found to hold}, so that the next call need not find out again


def is_out_of_memory(error):
    """Whether an exception means that a GPU's or the computer's memory ended."""
    text = str(error)
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs))


def attempt(work, *args):
    """(work(*args), True), or (None, False) where memory ended. The exception, which holds the tensors of every frame it came through, is gone on return."""
    try:
        return work(*args), True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None, False


def in_batches(items, size, work, what="picture", hint="--device cpu", share=(0, 1)):
    """Yields (batch, work(batch)) for a list of items, `size` at a time. A batch that memory cannot hold is halved, and the size that it can is remembered.

    share: (rank, processes): of the whole batches every so-many-th, from its own, is this process's; a batch has the same items whoever does it."""
    for first in range(share[0] * size, len(items), share[1] * size):
        left = items[first:first + size]
        while len(left):
            batch = left[:min(size, FITTED.get(what, size))]
            result, done = attempt(work, batch)
            if done:
                yield batch, result
                left = left[len(batch):]
                continue
            if len(batch) == 1:
                raise UserError(f"there is not enough memory for even one {what}; try {hint}")
            FITTED[what] = (len(batch) + 1) // 2
            free_memory()


def free_memory():
    """Gives back what a GPU's allocator keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device):
    """The most bytes that this process has held so far: of the GPU's memory, or of the computer's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device):
    """What a benchmark ran on, for its JSON."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    return {"device": name or platform.machine(), "kind": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0],
            "python": platform.python_version(), "date": date.today().isoformat()}


# --- several processes, and what is seen of the work ---

@contextmanager
def processes():
    """(rank, number) of the processes that torchrun, or a cluster's variables, started for one drawing; (0, 1) if it is alone.

    They share no memory, only the list of what is to be drawn, and the first alone speaks."""
    started = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # a WORLD_SIZE left in the environment means nothing
    number = int(os.environ.get("WORLD_SIZE") or "1") if started else 1
    if number == 1:
        yield 0, 1
        return
    rank = int(os.environ["RANK"])
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {rank} of {number} does not reach the others: {why(error)}") from None
    try:
        with redirect_stdout(io.StringIO()) if rank else nullcontext():
            yield rank, number
    finally:
        torch.distributed.destroy_process_group()


def meet(share):
    """Waits for the other processes, so that what follows is true of all. share: (rank, processes)."""
    if share[1] > 1:
        try:
            torch.distributed.monitored_barrier(timeout=timedelta(days=7))  # one that has failed closes its connection, and is told at once
        except RuntimeError:
            raise UserError(f"process {share[0]} of {share[1]} is done, but another has failed (see its message); what is written is whole, "
                            "run again for the rest") from None


def by_the_first(share, work):
    """work() of the first of some processes, for all of them: what it claims and finds, before any of them draws. share: (rank, processes)."""
    answer = [work() if share[0] == 0 else None]
    if share[1] > 1:
        try:
            torch.distributed.broadcast_object_list(answer)
        except RuntimeError:
            raise UserError("the first process has failed (see its message)") from None
    return answer[0]


class progress(tqdm):  # called as tqdm is
    """tqdm; without a terminal, in a log, a plain line each half minute in place of thousands of carriage returns."""

    def __init__(self, *args, **options):
        self.plain = not sys.stderr.isatty()
        if self.plain:
            options |= {"mininterval": 30, "maxinterval": float("inf"), "miniters": 1, "delay": 30, "leave": False, "ascii": True}
            options.setdefault("bar_format", "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left, {rate_fmt}{postfix}")
        super().__init__(*args, **options)

    def display(self, msg=None, pos=None):
        if not self.plain:
            return super().display(msg, pos)
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def set_postfix_str(self, s="", refresh=True):
        super().set_postfix_str(s, refresh and not self.plain)
