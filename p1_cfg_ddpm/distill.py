"""Distils a guided teacher, dozens of evaluations an image, into a student of one to three.

    python -m p1_cfg_ddpm.distill --output runs/student                                          # of the bundled teacher
    python -m p1_cfg_ddpm.distill --teacher runs/p1/model.safetensors --output runs/student      # of your own

**What is learned.** A sampler that adds no fresh noise follows the probability flow: from each noise x_T one path leads to one image x_0. The student
learns to leap along that path, from its time t to its next, s. Its output is read as the teacher's is, as an x0 predicted from x_t; DDIM takes it from t to s:

    x_s = r x_t + (a_s - r a_t) x0,    r = sigma_s / sigma_t,    a = sqrt(alpha_bar)                                        (1)

The x0 with which DDIM lands exactly where the path is at s is therefore (progressive distillation's target, Salimans and Ho 2022, appendix G)

    x0* = (x_s - r x_t) / (a_s - r a_t)                                                                                     (2)

and for the last leap, to s = clean (a = 1, sigma = 0), x0* is the finished image itself. The student is drawn by DDIM in two lines, at its own times.

**First supervised**: the teacher draws many paths, each with a guidance weight of its own, which becomes an input of the student; the student learns x0* at
the points of the paths where it will be called. Each path says exactly what is right, so a small network learns quickly; but there are only so many paths.

**Then consistency tuning** (`--tuning`), which needs none (Song et al. 2023; over several leaps, Heek et al. 2024; from a trained network and with shrinking
gaps, ECT, Geng et al. 2024). A real image is noised to any t between two of the student's times; the teacher's guided DDIM step takes it on to r < t;
wherever the student leaps to from r, it shall leap to from t. Its own leap from r, without gradient, is the x_s of (2). The gap t - r halves five times
on the way.
"""

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .data import default_data, load_digits
from .device import compile_blocks
from .diffusion import Distilled, Guided
from .files import UserError, check_flags, fingerprint, run, writable_folder
from .inference import CHECKPOINT, DEFAULT, load_generator, steps_of
from .model import IMAGE_SIZE, SIZES, Block, save_model
from .paths import CLEAN, LEAPS, all_paths, chosen, draw_paths, student_times
from .provenance import HelpFormatter, script_line
from .samplers import ddim, finish, steps_at
from .state import add_row, data_fingerprint, held, load_state, refuse_others, settings_of
from .train import NEEDED, Clock, batch_of, make_run, on_device, refuse_nothing, save_run
from .training import WATCHING, Log, add_arguments, due, first_line_of, guarded, is_flat, optimizer_step, prepare, seed_dropout, share_of_peak

TUNED_BY, LOG_EVERY = 0.2, 50  # of the learning rate, in the tuning; steps
FREE_TO_CHANGE = ("output", "paths_in", "teacher", "guide", "data", "steps", "minutes", "save_every", "compile", *WATCHING)


def coefficients(diffusion, t):
    """(a, sigma) as float32 [B, 1, 1, 1] for t int [B], where `CLEAN` is (1, 0)."""
    clean = (t == CLEAN)[:, None, None, None]
    a, sigma = diffusion.coefficients(t.clamp(min=0))
    return torch.where(clean, 1.0, a), torch.where(clean, 0.0, sigma)


def leap(diffusion, x, x0, t, s):
    """DDIM from x_t to x_s with a predicted x0, equation (1). x, x0: [B, 3, H, W]; t, s: int [B]."""
    (a_t, sigma_t), (a_s, sigma_s) = coefficients(diffusion, t), coefficients(diffusion, s)
    r = sigma_s / sigma_t
    return r * x + (a_s - r * a_t) * x0


def needed_x0(diffusion, x, landing, t, s):
    """The x0 with which `leap` from (x, t) to s lands at `landing`, equation (2)."""
    (a_t, sigma_t), (a_s, sigma_s) = coefficients(diffusion, t), coefficients(diffusion, s)
    r = sigma_s / sigma_t
    return (landing - r * x) / (a_s - r * a_t)


def predict_x0(student, diffusion, x, t, digit, domain, w):
    """What the student takes the clean image to be. t int [B], each image at its own."""
    return diffusion.x0_and_eps(student(x, t, digit, domain, w).float(), x, t)[0]


def distance(a, b):
    """Pseudo-Huber, one value per image, [B] (Song and Dhariwal 2024, section 3.3): a square near zero, where the mean is meant, and a length far
    from it, where a squared error would draw the mean of what could be."""
    c = 0.03 * math.sqrt(a[0].numel())  # as far apart as four grey levels in each value
    return ((a - b).square().flatten(1).sum(dim=1) + c * c).sqrt() - c


def supervised_loss(student, diffusion, paths, starts, ends, index, leg):
    """Equation (2) on the teacher's paths. index int [B]: which path; leg int [B]: which of its leaps, which lead from the times `starts`, int [S], to
    `ends`. One value per image, [B]."""
    t, s = starts[leg], ends[leg]
    x, landing = paths["x"][leg, index].float(), paths["x"][leg + 1, index].float()
    x0 = predict_x0(student, diffusion, x, t, paths["digit"][index], paths["domain"][index], paths["w"][index])
    return distance(x0, needed_x0(diffusion, x, landing, t, s))


def consistency_loss(student, teacher_step, diffusion, starts, ends, x0, digit, domain, w, t, eps, share):
    """One value per image, [B]. x0: real images [B, 3, H, W], noised to t int [B] by eps; teacher_step(x, t, r, digit, domain, w): its guided step from t to
    r; share in 0..1: how far the tuning has come."""
    s = ends[(t[:, None] <= starts).sum(dim=1) - 1]  # the next of the student's times below t
    r = t - ((t - s) * 0.5 ** (1 + int(5 * share))).long().clamp(min=1)
    x = diffusion.add_noise(x0, eps, t)
    with torch.no_grad():
        further = teacher_step(x, t, r, digit, domain, w)
        at = r.clamp(min=0)
        own = leap(diffusion, further, predict_x0(student, diffusion, further, at, digit, domain, w), at, s)
        landing = torch.where((r == s)[:, None, None, None], further, own)
    return distance(predict_x0(student, diffusion, x, t, digit, domain, w), needed_x0(diffusion, x, landing, t, s))


@torch.inference_mode()
def grey_levels_apart(student, diffusion, paths, times):
    """Root mean square, in grey levels, between the student's images and the teacher's from the same noise."""
    distilled = Distilled(student, diffusion, paths["digit"], paths["domain"], paths["w"])
    drawn = finish(ddim(distilled, paths["x"][0].float(), steps_at(diffusion.alpha_bar, times))).x
    return (drawn.clamp(-1, 1) - paths["x"][-1].float().clamp(-1, 1)).square().mean().sqrt().item() * 127.5


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--teacher", type=Path, default=CHECKPOINT, help="a model.safetensors of p1_cfg_ddpm.train")
    parser.add_argument("--guide", type=Path, default=None, help="a weaker one, for autoguidance in place of the unconditional half")
    parser.add_argument("--data", type=Path, default=default_data(), help="real digits, for the tuning: a folder in the course's layout, or a .npz of it")
    parser.add_argument("--output", type=Path, default=Path("runs/student"), help="folder of the run: its state and model.safetensors")
    parser.add_argument("--paths-in", type=Path, default=None, help="folder of the teacher's paths, which several students may share (default: in --output)")
    parser.add_argument("--paths", type=int, default=16_000, help="paths that the teacher draws; 24 kB each on the disk")
    parser.add_argument("--leaps", type=int, choices=list(LEAPS), default=1, help="evaluations per image; two were not better for digits")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="the student's network")
    parser.add_argument("--init", type=Path, default=None, help="begin with a student's weights, of the same --size, to go on with a result")
    parser.add_argument("--teacher-steps", type=int, default=DEFAULT.num_steps, help="steps of the teacher's sampler")
    parser.add_argument("--spacing", choices=["logsnr", "trailing"], default=DEFAULT.spacing, help="of the teacher's steps")
    parser.add_argument("--guidance-weight", type=float, default=DEFAULT.guidance_weight, help="half of the paths have this weight")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=DEFAULT.guidance_interval, help="of the teacher")
    parser.add_argument("--guidance-parallel", type=float, nargs=2, metavar=("MNISTM", "SVHN"), default=DEFAULT.guidance_parallel, help="likewise, by domain")
    parser.add_argument("--max-weight", type=float, default=6.0, help="the other half have weights from 0 to this")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps in all")
    parser.add_argument("--minutes", type=float, default=None, help="stop by the clock in place of --steps, the drawing of the paths included")
    parser.add_argument("--tuning", type=float, default=0.0, help="last share of the steps, which are consistency tuning; in half a minute on a GPU "
                        "it only harmed")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3, help=f"peak learning rate; {TUNED_BY:g} of it in the tuning")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.7, help="last share of each stage, over which it falls to zero")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="not applied to embeddings, norms and biases")
    parser.add_argument("--ema", type=float, default=0.05, help="length of the average of the weights, as a share of a stage")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two saved states")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks: half a minute at the start, then faster on a GPU")
    add_arguments(parser)
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    check_flags(args, ("paths", "steps", "batch_size", "save_every"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("lr", "weight_decay", "warmup", "max_weight", "validate_every"), lambda value: 0 <= value < math.inf, "a number from 0")
    check_flags(args, ("minutes",), lambda value: value is None or 0 < value < math.inf, "a number above 0")
    check_flags(args, ("max_weight",), lambda value: value >= args.guidance_weight, f"at least --guidance-weight, {args.guidance_weight:g}")
    check_flags(args, ("tuning", "decay"), lambda value: 0 <= value <= 1, "between 0 and 1")
    check_flags(args, ("ema",), lambda value: 0.001 <= value <= 0.25, "between 0.001 and 0.25")
    check_flags(args, ("seed",), lambda value: -10**12 < value < 10**12, "a whole number of at most 12 digits")
    return args


def main():
    args = parse_args()
    clock = Clock(args.minutes)
    accelerator, dtype = prepare(args, folder := writable_folder(args.output))
    if accelerator.num_processes > 1:
        raise UserError("distilling is for one process")
    config = replace(DEFAULT, num_steps=args.teacher_steps, spacing=args.spacing, guidance_weight=args.guidance_weight,
                     guidance_interval=tuple(args.guidance_interval), guidance_parallel=tuple(args.guidance_parallel))
    teacher, diffusion = load_generator(args.teacher, accelerator.device, torch.float32)
    guide = load_generator(args.guide, accelerator.device, torch.float32)[0] if args.guide else None
    for path, network in ((args.teacher, teacher), (args.guide, guide)):
        if network is not None and network.config.times:
            raise UserError(f"{path} is a student itself; give its teacher")
    with held(accelerator, folder), guarded("lower --batch-size, or choose a smaller --size"):
        train(args, clock, folder, accelerator, dtype, config, teacher, guide, diffusion)


def train(args, clock, folder, accelerator, dtype, config, teacher, guide, diffusion):
    """Trains a student, supervised and then in the tuning, from the run's last state where there is one; leaves model.safetensors.

    args: all flags; clock: `Clock` of --minutes; config: `DrawConfig`, with which the network `teacher` draws, and `guide` or None beside it."""
    device, state_file = accelerator.device, folder / "state.pt"
    data, settings, state = read_inputs(args, state_file)
    clock.go_on(state, state_file)
    times = student_times(list(steps_of(config, diffusion).t), diffusion.alpha_bar, args.leaps)
    if len(set(times)) < args.leaps:
        raise UserError(f"--teacher-steps {args.teacher_steps} are too few for --leaps {args.leaps}, which would begin at t = {', '.join(map(str, times))}")
    run = make_run(replace(SIZES[args.size], times=tuple(times)), [args.ema], args, accelerator, state_file, settings, state, diffusion)
    stage = state["stage"] if state else {"name": "supervised", "began": 0}
    if args.compile:
        compile_blocks(teacher, Block)
    first_line_of(accelerator, dtype, f"a {args.size} student of {args.teacher}, called at t = {', '.join(map(str, times))},"
                  + (f" going on at step {run.step}," if run.step else ""), run)
    paths, held_out = make_paths(args, config, teacher, guide, diffusion, accelerator, folder, times, settings["teacher_weights"])
    digits, guided = on_device(data, device) if data else None, partial(teacher_step, teacher, guide, diffusion, config)
    starts, ends = torch.tensor(times, device=device), torch.tensor([*times[1:], CLEAN], device=device)
    log = Log(accelerator, folder, "distilling P1", args, args.batch_size, run.step, run.history)
    if not state:
        clock.begin()  # the paths have taken some of the minutes

    def came():  # what share of the training is done
        return clock.share() if args.minutes else run.step / args.steps

    def flat():  # in the last stage; another ends with its share
        return stage["name"] == ("tuning" if args.tuning else "supervised") and is_flat(run.history, args.stop_when_flat, since=stage["began"])

    last = came() >= 1 or flat()
    while not last:
        done = came()
        if stage["name"] == "supervised" and done >= 1 - args.tuning and args.tuning > 0:
            stage = {"name": "tuning", "began": run.step}
            run.net.load_state_dict(run.ema.averages[0])  # tuned is what was averaged, and the average begins anew
        tuning, within = stage["name"] == "tuning", share_of_stage(stage["name"], done, args.tuning)
        rate = args.lr * (TUNED_BY if tuning else 1) * share_of_peak(run.step - stage["began"], within, args)
        seed_dropout(args.seed, run.step, accelerator.process_index)
        if tuning:
            index, t, eps, w = draw_noised(run.step, args, len(data), times[0], device)
            with accelerator.autocast():
                loss = consistency_loss(run.model, guided, diffusion, starts, ends, *batch_of(digits, index), w, t, eps, within).mean()
        else:
            index, leg = draw_leaps(run.step, args, len(paths["w"]), len(times), device)
            loss = supervised_loss(run.model, diffusion, paths, starts, ends, index, leg).mean()
        optimizer_step(accelerator, run.model, run.optimizer, loss, rate)
        run.step += 1
        run.ema.update(run.net, run.step - stage["began"])
        run.recent.append(loss.detach())
        log.bar.update()

        over = came() >= 1
        validating = len(held_out["w"]) and due(args.validate_every, run.step, over)
        if validating or due(LOG_EVERY, run.step, over):
            add_row(run, log, rate, {"validation": grey_levels_apart(run.ema.network(), diffusion, held_out, times)} if validating else {})
        last = over or flat()
        if due(args.save_every, run.step, last):
            save_run(run, accelerator, clock, stage=stage)
            export(run, args, diffusion, folder, stage)
    log.close()
    refuse_nothing(run, args)
    path = export(run, args, diffusion, folder, stage)  # also where nothing was left to learn: the run may have been killed before it
    print(f"wrote {path} after {run.step} steps\nnext: {script_line('p1_infer.sh', 'out/p1', '--checkpoint', path)}")


def read_inputs(args, state_file):
    """(digits for the tuning, as `load_digits`, or None without it; what the run is known by; its state, or None where it begins)"""
    teachers = [path for path in (args.teacher, args.guide) if path]
    settings = settings_of(args, FREE_TO_CHANGE, teacher_weights=fingerprint(*teachers), init=args.init and fingerprint(args.init))
    data = load_digits(args.data, "train") if args.tuning > 0 else None
    settings["pictures"] = data and data_fingerprint(data.images, data.digit, data.domain)
    refuse_others(state_file, [state_file.with_name("model.safetensors")])
    steps = None if args.minutes else args.steps
    return data, settings, load_state(state_file, settings, (*NEEDED, "stage"), steps, args.defaults) if state_file.exists() else None


def make_paths(args, config, teacher, guide, diffusion, accelerator, folder, times, weights):
    """(the teacher's paths that the student sees, those it never sees: a tenth, 500 at most), each as `all_paths`. weights: of the teacher, as digits."""
    timesteps = list(steps_of(config, diffusion).t)
    points = sorted({t for leaps in LEAPS for t in student_times(timesteps, diffusion.alpha_bar, leaps)}, reverse=True)

    def draw(count, generator):
        with accelerator.autocast():
            return draw_paths(teacher, guide, diffusion, config, timesteps, points, count, args.max_weight, generator)

    paths = all_paths(writable_folder(args.paths_in or folder / "paths"), draw, args.paths, args.seed, points, times, accelerator.device,
                      f"{weights}, w up to {args.max_weight:g}, {config}" )
    seen = args.paths - min(args.paths // 10, 500)
    return chosen(paths, slice(seen)), chosen(paths, slice(seen, None))


def share_of_stage(name, done, tuning):
    """How much of a stage is done, 0..0.999, where `done` of the training is, whose last share `tuning` is the tuning."""
    share = (done - 1 + tuning) / tuning if name == "tuning" else done / max(1 - tuning, 1e-9)
    return min(max(share, 0), 0.999)


def draw_leaps(step, args, num_paths, num_leaps, device):
    """Everything random about a supervised step, a function of (seed, step): (which path, which of its leaps), int [batch_size] each."""
    options = {"generator": torch.Generator(device).manual_seed(args.seed * 1_000_003 + step), "device": device}
    return torch.randint(num_paths, (args.batch_size,), **options), torch.randint(num_leaps, (args.batch_size,), **options)


def draw_noised(step, args, num_images, latest, device):
    """Everything random about a step of the tuning, likewise: (image index, t of 0..latest, eps, w), each of length batch_size."""
    n, options = args.batch_size, {"generator": torch.Generator(device).manual_seed(args.seed * 1_000_003 + step), "device": device}
    index = torch.randint(num_images, (n,), **options)
    t, eps = torch.randint(latest + 1, (n,), **options), torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, **options)
    w = torch.rand(n, **options) * args.max_weight
    w[::2] = args.guidance_weight
    return index, t, eps, w


def teacher_step(teacher, guide, diffusion, config, x, t, r, digit, domain, w):
    """The teacher's guided DDIM step of x, [B, 3, H, W], from t to r, int [B]; w float [B]: its guidance weights."""
    low, high = (edge * diffusion.config.num_timesteps for edge in config.guidance_interval)
    weight = (w * ((low <= t) & (t <= high)))[:, None, None, None]
    output = Guided(teacher, diffusion, digit, domain, w, guide=guide, parallel=config.guidance_parallel).extrapolated(x, t, weight)
    return leap(diffusion, x, diffusion.x0_and_eps(output, x, t)[0].clamp(-1, 1), t, r)


def export(run, args, diffusion, folder, stage):
    """Writes the averaged student in half precision; returns its path."""
    path = folder / "model.safetensors"
    save_model(path, run.ema.network().half(), diffusion, run.settings | {"teacher": args.teacher.name, "steps": run.step, "stage": stage["name"]})
    return path


if __name__ == "__main__":
    run(main)
