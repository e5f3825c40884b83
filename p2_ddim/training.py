"""What the trainings have in common: settings, machine and processes, optimiser, averaged weights, validation, and how a run is watched (what it leaves to go
on from: state.py). The same file in the three folders. The loops stand in the train.py files; everything random in them is a function of (seed, step)."""

import copy
import csv
import importlib.util
import math
import os
import time
from contextlib import contextmanager
from dataclasses import field, fields

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .device import DTYPES, describe, is_out_of_memory, name_of, peak_memory, pick_device, pick_dtype, progress, use_tf32
from .files import UserError, atomic_path

WATCHING = ("device", "validate_every", "stop_when_flat", "report_to", "defaults")  # flags that a run may change and still be the same run
MOST_ITEMS = 1_000_000  # of a batch: more would end in the system's killing the process, not in an error
LEAST_GAIN = 1e-3  # of the validation loss: less is flat


# --- settings, each told once: name, default, help ---

def setting(default, help, **options):
    """A field of a configuration, a dataclass, which is a flag of the command as well. options: more of argparse's."""
    return field(default=default, metadata={"help": help, **options})


def add_settings(parser, config_class):
    """A flag for each `setting` of a configuration: `--batch-size` for batch_size, a switch for what is False."""
    for one in fields(config_class):
        options = {"type": type(one.default), "default": one.default}
        if one.default is False:
            options = {"action": "store_true"}
        elif isinstance(one.default, tuple):
            options = {"type": type(one.default[0]), "nargs": "+", "default": list(one.default)}
        parser.add_argument(f"--{one.name.replace('_', '-')}", **options | one.metadata)


def configured(config_class, args):
    """The configuration that parsed arguments tell."""
    return config_class(**{one.name: getattr(args, one.name) for one in fields(config_class)})


# --- machine and processes ---

def add_arguments(parser, validate_every=500):
    """The flags that every training has. validate_every: the default of that flag; None: as often as the training itself sees fit."""
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 or fp16 where it is fast")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or, for the second GPU, cuda:1")
    parser.add_argument("--validate-every", type=int, default=validate_every, help="steps between two validations, always at the same noises and moments"
                        + ("; 0 for none" if validate_every is not None else " (default: some fifteen of them in a run)"))
    parser.add_argument("--stop-when-flat", type=int, default=0, metavar="N", help="stop when N validations brought no lower loss; 0: never")
    parser.add_argument("--report-to", choices=["none", "tensorboard", "wandb"], default="none", help="a tracker, besides log.csv in --output")


def prepare(args, folder, accumulate=1):
    """(accelerate's Accelerator, dtype) for --device, --dtype, --report-to, and a --batch-size that all processes share.

    The same for one process, several (`torchrun --nproc_per_node N -m ...`) and a cluster; the GradScaler of fp16 is `accelerator.scaler`."""
    if "RANK" not in os.environ:
        os.environ.pop("WORLD_SIZE", None)  # left there by something else: accelerate would wait for processes that never come
    if args.stop_when_flat and args.validate_every == 0:
        raise UserError("--stop-when-flat goes by validations; give it a --validate-every above 0")
    device = pick_device(args.device)
    if args.dtype == "fp16" and device.type != "cuda":
        raise UserError("--dtype fp16 trains on a GPU only; on a CPU use bf16 or fp32")
    dtype = pick_dtype(args.dtype, device)
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report-to {args.report_to} needs its package: pip install {args.report_to}")
    use_tf32(True)
    precision = {"fp32": "no"}.get(name_of(dtype), name_of(dtype))
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, gradient_accumulation_steps=accumulate,
                              log_with=None if args.report_to == "none" else args.report_to, project_dir=folder)
    if args.batch_size > MOST_ITEMS:
        raise UserError(f"--batch-size must be at most {MOST_ITEMS:,}, not {args.batch_size:,}")
    if args.batch_size % accelerator.num_processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {accelerator.num_processes} processes")
    return accelerator, dtype


def first_line_of(accelerator, dtype, what, run=None):
    """Says on what, in which format, what is trained; on several processes, how many. run: what has step and settings, in which all processes `agree`."""
    agree(accelerator, **({"step": run.step, "settings": run.settings} if run else {}))
    number = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    accelerator.print(f"{what} on {number}{describe(accelerator.device, dtype)}")


def agree(accelerator, **facts):
    """A `UserError` where the processes of a training are not about to do the same, as where each reads a state of a disk of its own, or has another kind of
    card. facts: {name: what must be alike}; the number formats are looked at in any case."""
    if accelerator.num_processes == 1:
        return
    facts |= {"number format": accelerator.mixed_precision, "format of Muon's steps": name_of(pick_dtype("auto", accelerator.device, among=("bf16",)))}
    first, *others = gather_object([facts])
    for rank, theirs in enumerate(others, start=1):
        for name, fact in theirs.items():
            if fact != first[name]:
                raise UserError(f"process {rank} has the {name} {fact}, but process 0 {first[name]}: all need the same --output, on a disk that they share, "
                                "the same data and the same kind of card")


@contextmanager
def one_first(accelerator):
    """The first process of each machine goes before its others, which find what it has put into its cache. Each process waits on the card that it uses, which
    accelerate's own takes to be the one of its number."""
    def meet():
        if accelerator.num_processes > 1:
            accelerator.reduce(torch.zeros(1, device=accelerator.device))

    if not accelerator.is_local_main_process:
        meet()
    yield
    if accelerator.is_local_main_process:
        meet()


def share(accelerator, *parts):
    """This process's share of each part of a global batch, tensors or lists of the same length."""
    each = len(parts[0]) // accelerator.num_processes
    own = slice(accelerator.process_index * each, (accelerator.process_index + 1) * each)
    return tuple(part[own] for part in parts)


def seed_dropout(seed, step, rank):
    """The global generator, from which dropout draws: by step, so that a resumed run draws the same, and another on each process, which has other pictures."""
    torch.manual_seed(seed * 1_000_003 + step + rank * 2_654_435_769)  # 2^32 by the golden ratio: the CPU's generator reads 32 bits of a seed only


@contextmanager
def guarded(advice):
    """Around a training: ended memory becomes one line, with the flags to lower, and so does the end of another process."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error):
            raise UserError(f"there is not enough memory ({text[:100]}); {advice}") from None
        if torch.distributed.is_initialized() and any(sign in str(error) for sign in ("onnection", "Socket", "NCCL", "gloo", "imed out")):
            raise UserError(f"another process has failed (see its message): {text[:100]}; the same command goes on from the last state") from None
        raise


# --- optimiser and averaged weights ---

def share_of_peak(step, done, config):
    """Of the learning rate: linear warm-up, then constant, then linear to zero over the last share `decay` of the training. done: the share of it that is
    gone, by steps or by the clock."""
    return min((step + 1) / max(config.warmup, 1), 1, max(1 - done, 0) / max(config.decay, 1e-9))  # by the clock, the last step may come after the end


def make_optimizer(net, lr, weight_decay, betas, edges=()):
    """Muon for the convolutions but depthwise ones and those whose names begin with `edges`, the network's first and last; AdamW for the rest, without
    weight decay on embeddings, norms and biases. With AdamW alone P1's small network needed 500 steps for the loss that this reaches in 200."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    kernels = {name for name, p in named.items() if p.ndim == 4 and min(p.shape[:2]) > 4 and not name.startswith(tuple(edges))}
    decayed = {name for name, p in named.items() if p.ndim > 1 and "embedding" not in name} - kernels
    groups = ([p for name, p in named.items() if name in group] for group in (kernels, decayed, named.keys() - kernels - decayed))
    return MuonAdamW(*groups, lr, weight_decay, betas)


def optimizer_step(accelerator, model, optimizer, loss, rate):
    """One step against the gradient of `loss`, a mean (None: it has been taken), at the learning rate `rate`; a gradient longer than 1 is shortened to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    if loss is not None:
        accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on convolution kernels, each taken as a matrix [out, in * k * k]: the step is the momentum with its singular values made
    (about) equal, as large as an AdamW step (Liu et al. 2025, eq. 4); AdamW on the rest. torch.optim.Muon goes through the matrices one by one; here
    those of one shape go together, which on a GPU, where each launch counts, is several times as fast.

    One optimiser for accelerate and its GradScaler: gradients are unscaled once, and where any overflowed neither of the two steps."""

    def __init__(self, kernels, decayed, kept, lr, weight_decay, betas, momentum=0.95):
        super().__init__([*kernels, *decayed, *kept], {"lr": lr})
        self.weight_decay, self.momentum = weight_decay, momentum
        self.adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}], lr=lr, betas=betas)
        alike = {}
        for kernel in kernels:
            alike.setdefault(kernel.shape, []).append(kernel)
        self.stacks = list(alike.values())
        self.averages = [kernels[0].new_zeros(len(kernels), len(kernels[0]), kernels[0][0].numel()) for kernels in self.stacks]

    @torch.no_grad()
    def step(self, closure=None):
        lr = self.param_groups[0]["lr"]
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for kernels, average in zip(self.stacks, self.averages):
            gradient = torch.stack([as_matrix(kernel.grad) for kernel in kernels])
            average.lerp_(gradient, 1 - self.momentum)
            steps = orthogonalised(gradient.lerp(average, self.momentum)).to(gradient.dtype)  # Nesterov's momentum
            torch._foreach_mul_(kernels, 1 - lr * self.weight_decay)
            torch._foreach_add_(kernels, [as_kernel(matrix, kernels[0]) for matrix in steps], alpha=-lr * 0.2 * math.sqrt(max(steps.shape[1:])))

    def state_dict(self):
        return {"adamw": self.adamw.state_dict(), "averages": self.averages}

    def load_state_dict(self, state_dict):
        self.adamw.load_state_dict(state_dict["adamw"])
        for own, saved in zip(self.averages, state_dict["averages"], strict=True):
            own.copy_(saved)


def as_matrix(kernel):
    """[out, in, k, k] -> [out, k * k * in], which is no copy where the memory is channels-last."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def as_kernel(matrix, like):
    """The way back, to the shape of `like`."""
    out, inner, *sides = like.shape
    return matrix.reshape(out, *sides, inner).permute(0, 3, 1, 2)


def orthogonalised(matrices, steps=5, dtype=None):
    """[N, rows, columns] with all singular values near 1: a Newton-Schulz iteration with Jordan's coefficients; bf16 is exact enough.

    dtype: by default bf16 where it is fast. Elsewhere it is emulated, at a twentieth of the speed of fp32 on a processor with AVX2 alone, or, as products of
    many matrices on Pascal, refused by cuBLAS."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype or pick_dtype("auto", matrices.device, among=("bf16",)))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def averaged_copy(net):
    """The network whose weights `ema_update` keeps: the result of a training."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(averaged, net, step, decay):
    """averaged <- d averaged + (1 - d) net after step 0, 1, ...: d is `decay`, and less in the first steps, so that the random start is soon forgotten."""
    d = min(decay, (1 + step) / (10 + step)) if step else 0.0
    get_ema_multi_avg_fn(d)(list(averaged.parameters()), list(net.parameters()), None)


# --- how a training is watched ---

def due(every, step, last):
    """Whether it is time, after so many steps, for what is done `every` so many (0: never) and after the last one."""
    return every > 0 and (step % every == 0 or last)


class Validation:
    """The loss of a network at `count` fixed moments, evenly over all t, with a fixed noise each: two values differ by the network alone.

    bands: as many ranges of t, whose losses are told apart, since the mean hides where it changes."""

    def __init__(self, num_items, shape, count=256, num_timesteps=1000, bands=4):
        self.shape, self.bands, self.num_timesteps = shape, bands, num_timesteps
        self.t = ((torch.arange(count) + 0.5) * num_timesteps / count).long()
        self.index = torch.randperm(max(count, num_items), generator=torch.Generator().manual_seed(0))[:count] % num_items

    @torch.no_grad()
    def __call__(self, loss, accelerator, batch_size):
        """{"validation": mean, "validation_0_249": ..., ...}. loss(index, t, eps): one value per item, [B]; the processes share the work."""
        sums = torch.zeros(self.bands, device=accelerator.device)
        rows = torch.arange(accelerator.process_index, len(self.t), accelerator.num_processes)
        for some in rows.split(max(batch_size // accelerator.num_processes, 1)):
            eps = torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(int(row))) for row in some])
            t, index, eps = (part.to(accelerator.device) for part in (self.t[some], self.index[some], eps))
            with accelerator.autocast():
                sums.index_add_(0, t * self.bands // self.num_timesteps, loss(index, t, eps).float())
        counts = torch.bincount(self.t * self.bands // self.num_timesteps, minlength=self.bands)
        means = (accelerator.reduce(sums, "sum").cpu() / counts).tolist()
        edges = [i * self.num_timesteps // self.bands for i in range(self.bands + 1)]
        return {"validation": sum(means) / self.bands, **{f"validation_{low}_{high - 1}": mean for low, high, mean in zip(edges, edges[1:], means)}}


def is_flat(history, patience, since=0):
    """Whether the last `patience` validations, of those after the step `since`, brought the lowest loss not even a thousandth lower."""
    losses = [row["validation"] for row in history if "validation" in row and row["step"] > since]
    return 0 < patience < len(losses) and min(losses[-patience:]) > (1 - LEAST_GAIN) * min(losses[:-patience])


class Log:
    """What a run tells: a bar, or plain lines, with the time that remains; log.csv in its folder; a tracker where --report-to names one.

    items: that a step learns from; history: rows {"step", "loss", ...} so far, which a state keeps and a resumed run goes on with."""

    def __init__(self, accelerator, folder, title, args, items, step, history):
        self.accelerator, self.folder, self.items, self.history = accelerator, folder, items, history
        self.first, self.before, self.started = step, history[-1].get("seconds", 0.0) if history else 0.0, time.perf_counter()
        if args.report_to != "none":
            accelerator.init_trackers(title.replace(" ", "_"), {name: str(value) for name, value in vars(args).items()})
        total = None if getattr(args, "minutes", None) else args.steps  # by the clock
        self.bar = progress(total=total, initial=step, unit="step", desc=title, disable=not accelerator.is_main_process)

    def add(self, step, **numbers):
        """A row; numbers: "loss", the learning rate "lr", those of `Validation`."""
        seconds = time.perf_counter() - self.started
        rate = (step - self.first) * self.items / seconds
        row = {"step": step, **numbers, "seconds": round(self.before + seconds, 1), "items_per_second": round(rate, 1),
               "peak_memory_gb": round(peak_memory(self.accelerator.device) / 1e9, 2)}
        self.history.append(row)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        shown = {name: row[name] for name in ("loss", "validation") if name in row}
        self.bar.set_postfix_str(", ".join(f"{name} {value:.4f}" for name, value in shown.items()) + f", {row['items_per_second']:.0f} a second", refresh=False)
        if self.accelerator.is_main_process:
            columns = list(dict.fromkeys(name for row in self.history for name in row))
            with atomic_path(self.folder / "log.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.history)

    def close(self, last=True):
        """last: of the process, which leaves the others too."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        if last:
            self.accelerator.end_training()
