"""Trains the conditional UNet. Run the same command again to go on where a run was stopped.

    python -m p1_cfg_ddpm.train --size small --output runs/p1                    # one GPU, or the CPU
    accelerate launch --num_processes 4 -m p1_cfg_ddpm.train --output runs/p1    # several GPUs
    python -m p1_cfg_ddpm.train --size medium --minutes 5 --batch-size 512 --compile --output runs/medium    # as long as a GPU is there
"""

import argparse
import csv
import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from .data import default_data, load_digits
from .device import DTYPES, pick_device, pick_dtype
from .diffusion import Diffusion, DiffusionConfig, Guided, ImageNoise, dpmpp_2m, moment_density, spaced_timesteps
from .files import UserError, atomic_path, check_flags, run, writable_folder, write_json
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS, SIZES, Block, UNet, save_model
from .pictures import save_image, to_model, to_uint8
from .tensors import read_tensors

LOG_EVERY = 50
BANDS = ((0, 50), (50, 200), (200, 400), (400, 600), (600, 800), (800, 1000))  # of t, in thousandths of the schedule
FREE_TO_CHANGE = ("output", "data", "steps", "minutes", "save_every", "sample_every", "validate_every", "stop_when_flat", "compile", "device")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with mnistm/ and svhn/ in the course's layout, or a .npz of it")
    parser.add_argument("--output", type=Path, default=Path("runs/p1"), help="folder of the run: its state, sample grids and model.safetensors")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="the network: small for a CPU, medium (the bundled one) or base for a GPU")
    parser.add_argument("--steps", type=int, default=3800, help="optimiser steps in all")
    parser.add_argument("--minutes", type=float, default=None, help="stop by the clock in place of --steps; the learning rate falls to zero by then")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step, over all processes together")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, of Muon (in AdamW's step size) and AdamW alike")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the steps, over which it falls to zero")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="not applied to embeddings, norms and biases")
    parser.add_argument("--ema", type=float, nargs="+", default=[0.1], metavar="LENGTH",
                        help="lengths of the averages of the weights, as shares of the training; the first is the result, the others are kept beside it")
    parser.add_argument("--drop-condition", type=float, default=0.1, help="share of images trained without their condition")
    parser.add_argument("--schedule", choices=["cosine", "linear"], default="cosine", help="noise schedule")
    parser.add_argument("--prediction", choices=["v", "eps"], default="v", help="what the network predicts")
    parser.add_argument("--log-sigma", type=float, nargs=2, metavar=("MEAN", "STD"), default=[-0.5, 1.3],
                        help="which noise levels are trained on: the normal distribution of ln(sigma / alpha); STD 0: t uniform")
    parser.add_argument("--min-snr-gamma", type=float, default=None, help="min-SNR loss weighting (5 is usual); none if not given")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: a minute at the start, then faster on a GPU")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=1000, help="steps between two sample grids; 0 for none")
    parser.add_argument("--validate-every", type=int, default=500, help="steps between two measurements of the validation loss; 0 for none")
    parser.add_argument("--stop-when-flat", type=int, default=0, metavar="N", help="stop when N validations in a row have not improved on the best; 0: never")
    args = parser.parse_args()
    check_flags(args, ("steps", "batch_size", "save_every"), lambda value: value >= 1, "at least 1")
    from_zero = ("lr", "weight_decay", "warmup", "sample_every", "validate_every", "stop_when_flat")
    check_flags(args, from_zero, lambda value: 0 <= value < math.inf, "a number from 0")
    if not -10**12 < args.seed < 10**12:
        raise UserError(f"--seed must be a whole number of at most 12 digits, not {args.seed}")
    check_flags(args, ("min_snr_gamma", "minutes"), lambda value: value is None or 0 < value < math.inf, "a number above 0")
    check_flags(args, ("drop_condition", "decay"), lambda value: 0 <= value <= 1, "between 0 and 1")
    check_flags(args, ("ema",), lambda lengths: all(0.001 <= length <= 0.25 for length in lengths), "between 0.001 and 0.25")
    check_flags(args, ("log_sigma",), lambda pair: all(map(math.isfinite, pair)) and pair[1] >= 0, "two finite numbers, the second from 0")
    return args


def main():
    args = parse_args()
    clock = Clock(args.minutes)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError("--dtype fp16 trains on a GPU only; on a CPU use bf16 or fp32")
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {world} processes")
    if args.minutes and world > 1:
        raise UserError("--minutes is for one process: several would not stop at the same step; give --steps")
    folder = writable_folder(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    state_file = folder / "state.pt"
    state = load_state(state_file, settings) if state_file.exists() else None

    with accelerator.local_main_process_first():
        data, held_out = (load_digits(args.data, split) for split in ("train", "val"))
    images, digits, domains = (torch.from_numpy(a).to(device) for a in (data.images, data.digit, data.domain))

    torch.manual_seed(args.seed)
    net = UNet(SIZES[args.size])
    diffusion = Diffusion(DiffusionConfig(args.schedule, args.prediction))
    step, history, validations, recent = 0, [], [], []
    if state:
        net.load_state_dict(state["model"])
        step, history, validations = state["step"], state["history"], state["validations"]
        recent = [torch.tensor(loss, device=device) for loss in state["recent"]]
    net.to(device=device, memory_format=torch.channels_last)
    ema = PowerEMA(net, args.ema)
    model, *optimizers = accelerator.prepare(net, *make_optimizers(net, args))
    if state:
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    if args.compile:
        compile_blocks(net)

    accelerator.print(f"{len(data)} images from {args.data}, {args.size} UNet of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M "
                      f"parameters on {world} x {device}, {precision if precision != 'no' else 'fp32'}" + (f", going on at step {step}" if step else ""))
    first_step, done = step, step >= args.steps and not args.minutes
    steps_until = cumulative_density(diffusion, args, device)
    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step", desc="training P1", disable=not accelerator.is_main_process)
    while not done:
        index, t, eps, drop = (part.chunk(world)[rank] for part in draw_batch(step, args, len(data), steps_until, device))
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)  # dropout draws from the global generator
        rate = args.lr * learning_rate(step, clock.share() if args.minutes else step / args.steps, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = diffusion.loss(model, to_model(images[index]), digits[index], domains[index], t, eps, drop, args.min_snr_gamma).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        step += 1
        ema.update(net, step)
        bar.update()

        recent.append(accelerator.reduce(loss.detach(), "mean"))
        done = clock.share() >= 1 if args.minutes else step >= args.steps
        done = done or is_flat(validations, args.stop_when_flat)
        if step % LOG_EVERY == 0 or done:
            history.append([step, torch.stack(recent).mean().item()])
            recent = []
            bar.set_postfix_str(f"loss {history[-1][1]:.4f}")
            if not math.isfinite(history[-1][1]):
                raise UserError(f"the loss is no longer finite at step {step}; the last good state is in {state_file}. Try a smaller --lr, or --dtype fp32")
        if accelerator.is_main_process:
            if args.sample_every and step % args.sample_every == 0:
                save_image(sample_grid(ema.into(args.size, device), diffusion, device, args.seed), folder / f"samples_{step:06d}.png")
            if args.validate_every and (step % args.validate_every == 0 or done):
                losses = validation_loss(ema.into(args.size, device), diffusion, held_out, device)
                validations.append([step, losses])
                write_log(folder / "validation.csv", validations)
                bar.write(f"step {step}: validation loss {np.mean(losses):.5f}; by t: {', '.join(f'{loss:.4f}' for loss in losses)}")
            if step % args.save_every == 0 or done:
                content = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                           "step": step, "history": history, "validations": validations, "recent": [loss.item() for loss in recent], "settings": settings}
                with atomic_path(state_file) as temporary:
                    torch.save(content, temporary)
                write_json(folder / "history.json", history)
                training = {**settings, "steps": step, "images": len(data), "loss": history[-1][1] if history else None}
                for number, length in enumerate(args.ema):  # half precision: half the size, no measurable difference
                    save_model(folder / ("model.safetensors" if number == 0 else f"model_ema{length:g}.safetensors"),
                               ema.into(args.size, device, number).half(), diffusion, {**training, "ema": length})
    bar.close()
    if accelerator.is_main_process:
        path = folder / "model.safetensors"
        print(f"wrote {path} after {step - first_step} steps\nnext: bash scripts/p1_infer.sh out/p1 --checkpoint {path}")
    accelerator.end_training()


def compile_blocks(net):
    """torch.compile, block by block: blocks of the same shape share what was compiled, a fifth of the time that the whole network takes."""
    torch._dynamo.config.recompile_limit = 64  # one for each shape, and for gradients or none
    for module in net.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


class Clock:
    """How far a training of so many minutes has come, from now on: `share()` in 0..1 and beyond."""

    def __init__(self, minutes):
        self.started, self.seconds = time.perf_counter(), 60 * (minutes or math.inf)

    def share(self):
        return (time.perf_counter() - self.started) / self.seconds


def draw_batch(step, args, num_images, steps_until, device):
    """Everything random about one step, for the global batch: (image index, t, eps, drop), each of length batch_size.

    A function of (seed, step) alone, so that a resumed run, or one on several processes, draws the same numbers. t is stratified: the batch is
    spread evenly over the distribution whose cumulative sum is `steps_until`, [T], so that losses of different batches can be compared."""
    index, position, end = [], step * args.batch_size, (step + 1) * args.batch_size
    while position < end:
        epoch, place = divmod(position, num_images)
        index.append(permutation(args.seed, epoch, num_images, device)[place:place + end - position])
        position += len(index[-1])
    options = {"generator": torch.Generator(device).manual_seed(args.seed * 1_000_003 + step), "device": device}
    spread = (torch.arange(args.batch_size, device=device) + torch.rand(args.batch_size, **options)) / args.batch_size
    t = torch.searchsorted(steps_until, spread).clamp(max=len(steps_until) - 1)
    eps = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, **options)
    drop = torch.rand(args.batch_size, **options) < args.drop_condition
    return torch.cat(index), t, eps, drop


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def permutation(seed, epoch, length, device):
    """The order of the images in an epoch; on the device, so that no step waits for a copy."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)


def cumulative_density(diffusion, args, device):
    """How much of the training falls on the steps up to t, float32 [T]."""
    mean, std = args.log_sigma
    density = moment_density(diffusion.alpha_bar, mean, std) if std > 0 else torch.full_like(diffusion.alpha_bar, 1 / len(diffusion.alpha_bar))
    return density.cumsum(0).float().to(device)


def learning_rate(step, share, args):
    """The share of the peak: linear warm-up, then constant, then linear to zero over the last `--decay` of the training."""
    return min((step + 1) / max(args.warmup, 1), 1, (1 - share) / max(args.decay, 1e-9))


def make_optimizers(net, args):
    """Muon for the convolutions, AdamW for the rest, without weight decay on embeddings, norms and biases.

    With AdamW alone (learning rate 1e-3) the small network needed 500 steps for the loss that this reaches in 200."""
    kernels = [p for name, p in net.named_parameters() if p.ndim == 4 and not name.startswith(("stem", "head"))]
    rest = {name: p for name, p in net.named_parameters() if not any(p is kernel for kernel in kernels)}
    decayed = [p for name, p in rest.items() if p.ndim > 1 and "embedding" not in name]
    kept = [p for name, p in rest.items() if p.ndim <= 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return (torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=next(net.parameters()).is_cuda),
            ConvolutionMuon(kernels, lr=args.lr, weight_decay=args.weight_decay))


class ConvolutionMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolution kernels, each taken as a matrix [out, k * k * in]: the step is the momentum with its singular values
    made (about) equal, scaled to the size of an AdamW step (Liu et al. 2025). torch.optim.Muon takes matrices one by one; this takes the kernels of
    one shape together, ten times fewer launches on a GPU, and the kernels themselves, so that a gradient scaler sees each gradient once."""

    def __init__(self, kernels, lr, weight_decay=0.0, momentum=0.95):
        shapes = {}
        for kernel in kernels:
            shapes.setdefault(kernel.shape, []).append(kernel)
        super().__init__([{"params": alike} for alike in shapes.values()], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            kernels, momentum = group["params"], group["momentum"]
            out, inner, k, _ = kernels[0].shape
            gradient = torch.stack([kernel.grad.permute(0, 2, 3, 1).flatten(1) for kernel in kernels])
            average = self.state[kernels[0]].setdefault("momentum", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - momentum)
            matrices = orthogonalised(gradient.lerp(average, momentum))  # Nesterov
            rate = group["lr"] * 0.2 * math.sqrt(max(out, k * k * inner))
            torch._foreach_mul_(kernels, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(kernels, [m.unflatten(1, (k, k, inner)).permute(0, 3, 1, 2) for m in matrices.to(kernels[0].dtype)], alpha=-rate)


def orthogonalised(matrices, steps=5):
    """[N, rows, columns] with all singular values near 1: five steps of a Newton-Schulz iteration, with Jordan's coefficients, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class PowerEMA:
    """Averages of the weights with a power function for their memory (Karras et al. 2024, section 3.1): `length` is the average's width as a share of
    the training so far, whatever its number of steps, and the random start is forgotten by itself. Several lengths cost little; one is chosen afterwards."""

    def __init__(self, net, lengths):
        # the width of t^gamma on [0, 1] is ((gamma + 1) / (gamma + 2)^2 / (gamma + 3))^(1/2), eq. 27
        self.gammas = [np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max() for length in lengths]
        self.averages = [{name: tensor.detach().clone() for name, tensor in net.state_dict().items()} for _ in lengths]

    @torch.no_grad()
    def update(self, net, step):
        """To be called after each step, counted from 1."""
        current = list(net.state_dict().values())
        for gamma, average in zip(self.gammas, self.averages):
            torch._foreach_lerp_(list(average.values()), current, 1 - (1 - 1 / step) ** (gamma + 1))

    def into(self, size, device, number=0):
        """A network of its own with one of the averages, in eval mode."""
        net = UNet(SIZES[size])
        net.load_state_dict(self.averages[number])
        return net.to(device=device, memory_format=torch.channels_last).eval()

    def state_dict(self):
        return self.averages

    def load_state_dict(self, averages):
        for own, saved in zip(self.averages, averages):
            for name in own:
                own[name].copy_(saved[name])


def is_flat(validations, patience):
    """Whether the last `patience` validations were all no better than the best before them; never with patience 0."""
    means = [np.mean(losses) for _, losses in validations]
    return bool(patience) and len(means) > patience and min(means[-patience:]) >= min(means[:-patience])


@torch.inference_mode()
def validation_loss(net, diffusion, data, device, num_images=256):
    """The loss on held-out images in each band of t, float. Always the same images, noise and t: two steps, or two runs, differ by their weights alone."""
    choice = np.random.default_rng(0).permutation(len(data))[:num_images]
    x0 = to_model(data.images[choice]).to(device)
    digit, domain = (torch.from_numpy(a[choice]).to(device) for a in (data.digit, data.domain))
    generator, drop, losses = torch.Generator().manual_seed(0), torch.zeros(len(x0), dtype=torch.bool, device=device), []
    for low, high in BANDS:
        spread = low + (high - low) * (torch.arange(len(x0)) + 0.5) / len(x0)
        t = (spread * diffusion.config.num_timesteps / 1000).long().to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        losses.append(diffusion.loss(net, x0, digit, domain, t, eps, drop).mean().item())
    return losses


def write_log(path, rows):
    """step, mean validation loss, loss of each band, as CSV."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "validation_loss", *(f"t{low}-{high}" for low, high in BANDS)])
        writer.writerows([step, *(f"{loss:.6f}" for loss in (np.mean(losses), *losses))] for step, losses in rows)


def load_state(path, settings):
    """The state that a run of these settings saved; another run's is refused."""
    state = read_tensors(path, "training state")
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise UserError(f"{path} is not a training state of this script; choose another --output")
    changed = [f"{name} {state['settings'].get(name)} is now {value}" for name, value in settings.items() if state["settings"].get(name) != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another --output")
    return state


@torch.inference_mode()
def sample_grid(net, diffusion, device, seed, w=1.0, num_steps=12):
    """A picture with a row per domain and a column per digit, drawn with the averaged weights."""
    digit = torch.arange(NUM_DIGITS, device=device).repeat(len(DOMAINS))
    domain = torch.arange(len(DOMAINS), device=device).repeat_interleave(NUM_DIGITS)
    noise = ImageNoise(seed, [f"training grid {i}" for i in range(len(digit))], (3, IMAGE_SIZE, IMAGE_SIZE), device)()
    guided = Guided(net.eval(), diffusion, digit, domain, w)
    *_, last = dpmpp_2m(guided, diffusion, noise, spaced_timesteps(num_steps))
    grid = to_uint8(last.x).reshape(len(DOMAINS), NUM_DIGITS, IMAGE_SIZE, IMAGE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(len(DOMAINS) * IMAGE_SIZE, NUM_DIGITS * IMAGE_SIZE, 3))
    return picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)


if __name__ == "__main__":
    run(main)
