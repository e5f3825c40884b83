"""Trains the conditional UNet. Run the same command again to go on where a run was stopped.

    python -m p1_cfg_ddpm.train --size small --output runs/p1                    # one GPU, or the CPU
    accelerate launch --num_processes 4 -m p1_cfg_ddpm.train --output runs/p1    # several GPUs
"""

import argparse
import math
import time
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .data import default_data, load_digits, to_model, to_uint8
from .device import DTYPES, pick_device, pick_dtype
from .diffusion import Diffusion, DiffusionConfig, Guided, ImageNoise, dpmpp_2m, spaced_timesteps
from .files import UserError, atomic_path, check_flags, load_pickle_safely, run, save_image, writable_folder, write_json
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS, SIZES, UNet, save_model

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "data", "steps", "save_every", "sample_every", "device")  # between a run and its continuation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with mnistm/ and svhn/ in the course's layout")
    parser.add_argument("--output", type=Path, default=Path("runs/p1"), help="folder of the run: its state, sample grids and model.safetensors")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="the network: small for a CPU, base for a GPU")
    parser.add_argument("--steps", type=int, default=3800, help="optimiser steps in all; 3800 made the bundled model")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step, over all processes together")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, of Muon (in AdamW's step size) and AdamW alike")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the steps, over which it falls to zero")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="not applied to embeddings, norms and biases")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the result")
    parser.add_argument("--drop-condition", type=float, default=0.1, help="share of images trained without their condition")
    parser.add_argument("--schedule", choices=["cosine", "linear"], default="cosine", help="noise schedule")
    parser.add_argument("--prediction", choices=["v", "eps"], default="v", help="what the network predicts")
    parser.add_argument("--min-snr-gamma", type=float, default=None, help="min-SNR loss weighting (5 is usual); none if not given")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=1000, help="steps between two sample grids; 0 for none")
    args = parser.parse_args()
    check_flags(args, ("steps", "batch_size", "save_every"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("lr", "weight_decay", "warmup", "sample_every"), lambda value: 0 <= value < math.inf, "a number from 0")
    if not -10**12 < args.seed < 10**12:
        raise UserError(f"--seed must be a whole number of at most 12 digits, not {args.seed}")
    check_flags(args, ("min_snr_gamma",), lambda value: value is None or 0 < value < math.inf, "a number above 0")
    check_flags(args, ("drop_condition", "decay", "ema"), lambda value: 0 <= value <= 1, "between 0 and 1")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError("--dtype fp16 trains on a GPU only; on a CPU use bf16 or fp32")
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {world} processes")
    folder = writable_folder(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    state_file = folder / "state.pt"
    state = load_state(state_file, settings) if state_file.exists() else None

    with accelerator.local_main_process_first():
        data = load_digits(args.data, "train")
    images, digits, domains = (torch.from_numpy(a).to(device) for a in (data.images, data.digit, data.domain))

    torch.manual_seed(args.seed)
    net = UNet(SIZES[args.size])
    diffusion = Diffusion(DiffusionConfig(args.schedule, args.prediction))
    ema = AveragedModel(net, multi_avg_fn=ema_update(args.ema))
    step, history, recent = 0, [], []
    if state:
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        step, history, recent = state["step"], state["history"], [torch.tensor(loss, device=device) for loss in state["recent"]]
    net, ema = (m.to(device=device, memory_format=torch.channels_last) for m in (net, ema))
    adamw, muon = make_optimizers(net, args)
    model, *optimizers = accelerator.prepare(net, adamw, muon)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    accelerator.print(f"{len(data)} images from {args.data}, {args.size} UNet of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M "
                      f"parameters on {world} x {device}, {precision if precision != 'no' else 'fp32'}" + (f", going on at step {step}" if step else ""))
    started, first_step = time.perf_counter(), step
    bar = tqdm(total=args.steps, initial=step, unit="step", desc="training P1", disable=not accelerator.is_main_process)
    while step < args.steps:
        batch = draw_batch(step, args, len(data), diffusion.config.num_timesteps, device)
        index, t, eps, drop = (part.chunk(world)[rank] for part in batch)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
        x0 = to_model(images[index])
        loss = diffusion.loss(model, x0, digits[index], domains[index], t, eps, drop, args.min_snr_gamma).mean()
        accelerator.backward(loss)
        muon.take_gradients()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        ema.update_parameters(net)
        step += 1
        bar.update()

        recent.append(accelerator.reduce(loss.detach(), "mean"))
        if step % LOG_EVERY == 0 or step == args.steps:
            history.append([step, torch.stack(recent).mean().item()])
            recent = []
            rate = (step - first_step) * args.batch_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {history[-1][1]:.4f}, {rate:.0f} img/s")
            if not math.isfinite(history[-1][1]):
                raise UserError(f"the loss is not finite at step {step}; try a smaller --lr, or --dtype fp32")
        if accelerator.is_main_process:
            if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
                save_image(sample_grid(ema.module, diffusion, device, args.seed), folder / f"samples_{step:06d}.png")
            if step % args.save_every == 0 or step == args.steps:
                content = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                           "step": step, "history": history, "recent": [loss.item() for loss in recent], "settings": settings}
                with atomic_path(state_file) as temporary:
                    torch.save(content, temporary)
                write_json(folder / "history.json", history)
    bar.close()
    if accelerator.is_main_process:
        path = folder / "model.safetensors"
        training = {**settings, "steps": args.steps, "images": len(data), "loss": history[-1][1]}
        save_model(path, ema.module.half(), diffusion, training)  # half precision: half the size, no measurable difference
        print(f"wrote {path}\nnext: bash scripts/p1_infer.sh out/p1 --checkpoint {path}")
    accelerator.end_training()


def draw_batch(step, args, num_images, num_timesteps, device):
    """Everything random about one step, for the global batch: (image index, t, eps, drop), each of length batch_size.

    A function of (seed, step) alone, so that a resumed run, or one on several processes, draws the same numbers."""
    index = []
    for position in range(step * args.batch_size, (step + 1) * args.batch_size):
        epoch, place = divmod(position, num_images)
        index.append(permutation(args.seed, epoch, num_images)[place])
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    # the model's dropout, where it has any, draws from the global generator
    torch.manual_seed(args.seed * 1_000_003 + step)
    options = {"generator": generator, "device": device}
    t = torch.randint(0, num_timesteps, (args.batch_size,), **options)
    eps = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, **options)
    drop = torch.rand(args.batch_size, **options) < args.drop_condition
    return torch.stack(index).to(device), t, eps, drop


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def permutation(seed, epoch, length):
    """The order of the images in an epoch."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def learning_rate(step, args):
    """Linear warm-up, then constant, then linear to zero."""
    decay_steps = max(args.decay * args.steps, 1)
    return args.lr * min((step + 1) / max(args.warmup, 1), 1, (args.steps - step) / decay_steps)


def make_optimizers(net, args):
    """Muon for the convolutions, AdamW for the rest, without weight decay on embeddings, norms and biases.

    With AdamW alone (learning rate 1e-3) the small network needed 500 steps for the loss that this reaches in 200."""
    kernels = [p for name, p in net.named_parameters() if p.ndim == 4 and not name.startswith(("stem", "head"))]
    rest = {name: p for name, p in net.named_parameters() if not any(p is kernel for kernel in kernels)}
    decayed = [p for name, p in rest.items() if p.ndim > 1 and "embedding" not in name]
    kept = [p for name, p in rest.items() if p.ndim <= 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return (torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99)),
            ConvolutionMuon(kernels, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))


class ConvolutionMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which takes matrices only, on convolution kernels: each as a matrix (`as_matrix`)."""

    def __init__(self, kernels, **options):
        self.kernels = kernels
        super().__init__([torch.nn.Parameter(as_matrix(kernel)) for kernel in kernels], **options)

    def take_gradients(self):
        """Lets the matrices' gradients share the kernels' memory; to be called after each backward pass, before clipping or unscaling."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels):
            kernel.grad = kernel.grad.contiguous(memory_format=torch.channels_last)
            matrix.grad = as_matrix(kernel.grad)


def as_matrix(kernel):
    """A channels-last kernel [out, in, k, k] as a matrix [out, k * k * in] that shares its memory."""
    return kernel.detach().permute(0, 2, 3, 1).flatten(1)


def ema_update(decay):
    """torch's EMA, with a shorter memory in the first steps, so that the random start is soon forgotten."""
    def update(averaged, current, count):
        get_ema_multi_avg_fn(min(decay, (1 + float(count)) / (10 + float(count))))(averaged, current, count)
    return update


def load_state(path, settings):
    """The state that a run of these settings saved; another run's is refused."""
    state = load_pickle_safely(path, "training state")
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
