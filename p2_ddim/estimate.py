"""How long a drawing takes, told before it begins: its work is counted, one step of it is timed. The same file in the three folders."""

import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from .device import attempt

LIMIT = 300  # seconds that the course gives each graded script, on a card of 11 GB
FEW = 10  # calls that need no estimate


@torch.inference_mode()
def measure(work, device):
    """(seconds, floating point operations) of work(), which is called twice: first counted, which warms it up too, then timed. None where memory ends."""
    counter = FlopCounterMode(display=False)

    def counted():
        with counter:
            work()

    def timed():
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    if not attempt(counted)[1]:
        return None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, done = attempt(timed)
    return (seconds, counter.get_total_flops()) if done else None


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def minutes(seconds):
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def announce(parts, model, device, started, steps=None, unit="calls of the network"):
    """Prints how much work a drawing is, how long it takes in all and, where that is more than the course's limit, with how many steps it would not be.

    parts: [(how often, work)], the first of them a step of the sampler for one batch; model: the network; started: by time.perf_counter(), before anything was
    loaded; steps: of the sampler, if it may have fewer; unit: of the first part's. A short drawing needs no estimate."""
    if parts[0][0] < FEW:
        return
    measured = [measure(work, device) for _, work in parts]
    if None in measured:
        print("the batch does not fit into memory: no time is estimated", flush=True)
        return
    seconds = [count * second for (count, _), (second, _) in zip(parts, measured)]
    flop = sum(count * flop for (count, _), (_, flop) in zip(parts, measured))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    spent = time.perf_counter() - started
    total = spent + sum(seconds)
    line = f"{parts[0][0]:,} {unit}, {number(flop / 1e12)} TFLOP, {weights / 1e9:.2g} GB of weights: about {minutes(total)} minutes in all"
    if total > LIMIT:
        fitting = math.floor((steps or 0) * (0.9 * LIMIT - spent - sum(seconds[1:])) / seconds[0])  # with a tenth to spare
        line += f", more than the {minutes(LIMIT)} that the course gives a graded script" + (f"; --steps {fitting} would fit" if fitting >= 1 else "")
    print(line, flush=True)
