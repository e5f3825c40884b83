"""Trains the miniature's models on drawings: CLIP, then the VAE, then the UNet of Stable Diffusion. The same command again goes on where a run was stopped.

    python -m p3_clip_textual_inversion.make_mini drawings runs/emoji.npz
    python -m p3_clip_textual_inversion.pretrain clip --drawings runs/emoji.npz --output runs/clip
    python -m p3_clip_textual_inversion.pretrain vae  --drawings runs/emoji.npz --output runs/vae
    python -m p3_clip_textual_inversion.pretrain unet --drawings runs/emoji.npz --output runs/sd --clip runs/clip --vae runs/vae
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import diffusion
from .device import DTYPES, pick_device, pick_dtype
from .files import UserError, atomic_path, load_pickle_safely, run, save_image, writable_folder, write_json
from .model import BPE_FILE, load_clip, make_clip_tokenizer, read_merges, to_text_encoder, write_merges
from .world import CLIP_STYLES, RENDERINGS, SIDE, STYLES, SUBJECTS, Drawings, compose, random_scene, to_uint8, vocabulary_of

LOG_EVERY = 50
FREE_TO_CHANGE = ("output", "drawings", "steps", "save_every", "sample_every", "device", "clip", "vae")  # between a run and its continuation
MOST_FREQUENT, CONTEXT = 8000, 32  # merges: rarer words are spelled in parts that others share
CLIP_CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": SIDE, "timm_model_name": "convnext_atto_ols", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": {"context_length": CONTEXT, "width": 192, "heads": 3, "layers": 3},
}
VAE_CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": SIDE, "block_out_channels": (32, 64, 128), "layers_per_block": 1,
    "norm_num_groups": 32, "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET_CONFIG = {
    "sample_size": SIDE // 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (96, 128, 192), "layers_per_block": 1,
    "cross_attention_dim": 192, "attention_head_dim": 4, "norm_num_groups": 32,  # attention at 8x8 and 4x4 only: twice as fast
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1}  # Stable Diffusion v1's


class ClipTask:
    """CLIP (Radford et al. 2021) on all subjects in all styles but the unseen one, alone and in pairs."""

    steps, batch_size, lr, weight_decay = 1500, 256, 1e-3, 0.1

    def __init__(self, args, drawings, device):
        self.drawings, self.device, self.folder = drawings, device, args.output
        # bytes, bytes that end a word, merges, start and end
        vocabulary = 512 + write_merges(args.output / BPE_FILE, vocabulary_of(drawings), MOST_FREQUENT) + 2
        self.tokenizer = open_clip.SimpleTokenizer(str(args.output / BPE_FILE), context_length=CONTEXT)
        self.config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": vocabulary}}
        self.model = open_clip.CLIP(**self.config)
        if args.start:  # only the image tower learns on: the text tower has become Stable Diffusion's text encoder
            self.model.load_state_dict(load_clip(args.start)[0].state_dict())
            self.model.lock_text_tower()
        self.contrast = open_clip.ClipLoss()

    def batch(self, rng, generator, count):
        """Each subject once, so that no caption fits two pictures; one picture in six shows two subjects."""
        names = rng.permutation(self.drawings.trained)
        scenes = []
        for i in range(count):
            other = str(names[count + i]) if i % 6 == 0 and count + i < len(names) else None
            scenes.append(random_scene(rng, self.drawings, str(names[i % len(names)]), CLIP_STYLES, other, tell_style=0.3, tell_colour=0.3))
        return recolour(compose(self.drawings, scenes, generator, shift=0.12, scales=(0.6, 1.05), turn=0.25), generator), scenes

    def loss(self, model, pictures, scenes, generator):
        image, text, scale = model(pictures.to(self.device), self.tokenizer([scene.caption for scene in scenes]).to(self.device))
        return self.contrast(image.float(), text.float(), scale.clamp(max=100.0))

    def samples(self, model):
        return None

    def export(self, model):
        weights = {name: tensor.half().contiguous() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
        with atomic_path(self.folder / "open_clip_model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        write_json(self.folder / "open_clip_config.json", {"model_cfg": self.config, "preprocess_cfg": preprocess})


class VaeTask:
    """The autoencoder of latent diffusion (Rombach et al. 2022), with an L1 loss and a slight pull to the normal distribution."""

    steps, batch_size, lr, weight_decay = 1200, 16, 1e-3, 0.0

    def __init__(self, args, drawings, device):
        self.drawings, self.device, self.folder = drawings, device, args.output
        self.model = AutoencoderKL(**VAE_CONFIG)

    def batch(self, rng, generator, count):
        names = rng.choice(self.drawings.trained, (count, 2))
        scenes = [random_scene(rng, self.drawings, str(name), CLIP_STYLES, str(other) if i % 3 == 0 else None)
                  for i, (name, other) in enumerate(names)]
        return recolour(compose(self.drawings, scenes, generator), generator), scenes

    def loss(self, model, pictures, scenes, generator):
        pictures = pictures.to(self.device)
        posterior = model.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        return (decoded.float() - pictures).abs().mean() + 1e-5 * posterior.kl().mean()

    @torch.inference_mode()
    def samples(self, model):
        pictures, _ = self.batch(np.random.default_rng(0), torch.Generator().manual_seed(0), 24)
        again = model.decode(model.encode(pictures.to(self.device)).latent_dist.mean).sample.cpu()
        return torch.cat([pictures[:12], again[:12], pictures[12:], again[12:]]), 12

    @torch.inference_mode()
    def export(self, model):
        """With the latents' deviation on pictures as the scaling factor."""
        pictures, _ = self.batch(np.random.default_rng(1), torch.Generator().manual_seed(1), 64)
        deviation = model.encode(pictures.to(self.device)).latent_dist.mean.float().std().item()
        model.register_to_config(scaling_factor=1 / deviation)
        model.half().save_pretrained(self.folder)


class UnetTask:
    """The noise predictor of latent diffusion, on everyday subjects, conditioned on the frozen text tower of the miniature of CLIP."""

    steps, batch_size, lr, weight_decay = 3000, 64, 1e-3, 0.01
    pool_size, drop_caption = 24_000, 0.1

    def __init__(self, args, drawings, device):
        self.drawings, self.device, self.folder = drawings, device, args.output
        if args.clip is None or args.vae is None:
            raise UserError("unet needs --clip and --vae, the folders that those trainings wrote")
        clip, _, _ = load_clip(args.clip)
        self.tokenizer = make_clip_tokenizer(read_merges(args.clip / BPE_FILE), CONTEXT)
        self.text_encoder = to_text_encoder(clip, self.tokenizer).to(device)
        self.vae = load_part(AutoencoderKL, args.vae).to(device).eval().requires_grad_(False)
        self.scheduler = DDIMScheduler(**SCHEDULE)
        self.alpha_bar = diffusion.make_alpha_bar().to(device)
        self.model = UNet2DConditionModel(**UNET_CONFIG)
        if args.start:
            self.model.load_state_dict(load_part(UNet2DConditionModel, args.start).state_dict())
        self.latents, self.captions = self.make_pool(args)

    @torch.inference_mode()
    def make_pool(self, args):
        """The latents (mean and deviation, fp16 [N, 2, 4, 16, 16]) and captions of composed pictures, encoded once and kept beside the run."""
        path = self.folder / "latents.pt"
        if path.exists():
            content = load_pickle_safely(path, "file of latents")
            return content["latents"], content["captions"]
        rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
        latents, captions = [], []
        dtype = pick_dtype("auto", self.device)
        for start in tqdm(range(0, self.pool_size, 64), desc="encoding pictures", unit="batch"):
            scenes = []
            for i in range(start, start + 64):
                name, other = map(str, rng.choice(SUBJECTS, 2, replace=False))
                rendering = str(rng.choice(list(RENDERINGS))) if i % 5 in (1, 2) else None
                scenes.append(random_scene(rng, self.drawings, name, STYLES, other if i % 4 == 0 else None, tell_style=0.5, tell_colour=0.6,
                                           rendering=rendering))
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                posterior = self.vae.encode(compose(self.drawings, scenes, generator).to(self.device)).latent_dist
            latents.append(torch.stack([posterior.mean, posterior.std], dim=1).half().cpu())
            captions += [scene.caption for scene in scenes]
        with atomic_path(path) as temporary:
            torch.save({"latents": torch.cat(latents), "captions": captions}, temporary)
        return torch.cat(latents), captions

    def batch(self, rng, generator, count):
        rows = rng.integers(0, len(self.captions), count)
        captions = ["" if rng.random() < self.drop_caption else self.captions[row] for row in rows]
        mean, deviation = self.latents[rows].float().unbind(1)
        return self.vae.config.scaling_factor * (mean + deviation * torch.randn(mean.shape, generator=generator)), captions

    def condition(self, captions):
        """Hidden states [B, 32, 192] of the text encoder."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.text_encoder(tokens.to(self.device)).last_hidden_state

    def loss(self, model, latents, captions, generator):
        """Of diffusion.py, with min-SNR weights: a short training is not to be spent on noise too slight to matter."""
        t = torch.randint(0, len(self.alpha_bar), (len(latents),), generator=generator).to(self.device)
        eps = torch.randn(latents.shape, generator=generator).to(self.device)
        return diffusion.loss(model, self.alpha_bar, latents.to(self.device), eps, t, self.condition(captions), min_snr_gamma=5).mean()

    def pipeline(self, model):
        return StableDiffusionPipeline(vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=model, scheduler=self.scheduler,
                                       safety_checker=None, feature_extractor=None, requires_safety_checker=False)

    def samples(self, model):
        pipeline = self.pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        rng = np.random.default_rng(0)
        prompts = [random_scene(rng, self.drawings, str(name), STYLES, tell_style=0, tell_colour=1).caption for name in rng.permutation(SUBJECTS)[:22]]
        prompts += ["a dog face next to a red apple", "a cat face next to a bus"]
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        pictures = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators, output_type="pt", height=SIDE, width=SIDE).images
        return pictures.float().cpu() * 2 - 1, 12

    def export(self, model):
        pipeline = self.pipeline(model)
        pipeline.to(torch.float16).save_pretrained(self.folder / "stable_diffusion", safe_serialization=True)


def recolour(pictures, generator):
    """Contrast, brightness, colour balance and saturation off, per picture: other sets use other colours for the same thing."""
    gain = 1 + 0.25 * (2 * torch.rand(len(pictures), 3, 1, 1, generator=generator) - 1)
    offset = 0.2 * (2 * torch.rand(len(pictures), 1, 1, 1, generator=generator) - 1)
    saturation = 0.5 + 0.8 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    gray = pictures.mean(dim=1, keepdim=True)
    return ((gray + saturation * (pictures - gray)) * gain + offset).clamp(-1, 1)


def load_part(kind, folder):
    """A model of diffusers from its folder, in float32."""
    try:
        return kind.from_pretrained(folder, local_files_only=True).float()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {str(error).splitlines()[0]}") from None


TASKS = {"clip": ClipTask, "vae": VaeTask, "unet": UnetTask}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=list(TASKS), help="what to train")
    parser.add_argument("--drawings", type=Path, required=True, metavar="NPZ", help="file that make_mini drawings wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run: its state, sample grids and the result")
    parser.add_argument("--clip", type=Path, default=None, help="for unet: folder of the trained CLIP")
    parser.add_argument("--vae", type=Path, default=None, help="for unet: folder of the trained VAE")
    parser.add_argument("--start", type=Path, default=None, metavar="FOLDER", help="folder of a model to go on from; CLIP's text tower then stays as it is")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps in all (default: by task)")
    parser.add_argument("--batch-size", type=int, default=None, help="pictures per step (default: by task)")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate (default: by task)")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    parser.add_argument("--decay", type=float, default=0.6, help="last share of the steps, over which it falls to zero")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, which are the result")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two sample grids; 0 for none")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(TASKS[args.task], name))
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision={torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    device = accelerator.device
    folder = writable_folder(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    state_file = folder / "state.pt"
    state = load_state(state_file, settings) if state_file.exists() else None
    torch.manual_seed(args.seed)
    task = TASKS[args.task](args, Drawings(args.drawings), device)
    net, step, history, recent = task.model, 0, [], []
    ema = AveragedModel(net, multi_avg_fn=ema_update(args.ema))
    if state:
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        step, history, recent = state["step"], state["history"], state["recent"]
    net, ema = net.to(device).train(), ema.to(device).eval()
    optimizers = make_optimizers(net, args.lr, task.weight_decay)
    model, *optimizers = accelerator.prepare(net, *optimizers)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    print(f"{args.task} of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters on {device}" + (f", going on at step {step}" if step else ""))
    started, first_step = time.perf_counter(), step
    bar = tqdm(total=args.steps, initial=step, unit="step", desc=f"training {args.task}")
    while step < args.steps:
        # everything random about a step is a function of (seed, step), so that a resumed run draws the same numbers
        rng, generator = np.random.default_rng([args.seed, step]), torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rate = args.lr * min((step + 1) / max(args.warmup, 1), 1, (args.steps - step) / max(args.decay * args.steps, 1))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with accelerator.autocast():
            loss = task.loss(model, *task.batch(rng, generator, args.batch_size), generator)
        accelerator.backward(loss)
        optimizers[1].optimizer.take_gradients()
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        ema.update_parameters(net)
        step += 1
        bar.update()
        recent.append(loss.item())
        if step % LOG_EVERY == 0 or step == args.steps:
            history.append([step, float(np.mean(recent))])
            recent = []
            bar.set_postfix_str(f"loss {history[-1][1]:.4f}, {(step - first_step) * args.batch_size / (time.perf_counter() - started):.0f} img/s")
            if not math.isfinite(history[-1][1]):
                raise UserError(f"the loss is not finite at step {step}; try a smaller --lr, or --dtype fp32")
        if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
            with accelerator.autocast():
                grid = task.samples(ema.module)
            if grid:
                save_image(tile(*grid), folder / f"samples_{step:06d}.png")
        if step % args.save_every == 0 or step == args.steps:
            with atomic_path(state_file) as temporary:
                torch.save({"model": net.state_dict(), "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
                            "history": history, "recent": recent, "settings": settings}, temporary)
            write_json(folder / "history.json", history)
    bar.close()
    task.export(ema.module)
    print(f"wrote {folder}")


def tile(pictures, columns):
    """[N, 3, H, W] in -1..1 -> one picture."""
    grid = to_uint8(pictures)
    rows = [np.concatenate(list(grid[i:i + columns]), axis=1) for i in range(0, len(grid), columns)]
    return Image.fromarray(np.concatenate(rows))


def make_optimizers(net, lr, weight_decay):
    """(AdamW, Muon): Muon for convolution kernels that are not depthwise, AdamW for the rest, without weight decay on norms and biases."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    kernels = [p for name, p in named if p.ndim == 4 and min(p.shape[:2]) > 4]
    rest = [p for _, p in named if not any(p is kernel for kernel in kernels)]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay}, {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)), ConvolutionMuon(kernels, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class ConvolutionMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which takes matrices only, on convolution kernels: each as a matrix [out, in * k * k]."""

    def __init__(self, kernels, **options):
        self.kernels = kernels
        super().__init__([torch.nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels], **options)

    def take_gradients(self):
        """Lets the matrices' gradients share the kernels' memory; to be called after each backward pass, before clipping or unscaling."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels):
            kernel.grad = kernel.grad.contiguous()
            matrix.grad = kernel.grad.flatten(1)


def ema_update(decay):
    """torch's EMA, with a shorter memory in the first steps, so that the random start is soon forgotten."""
    def update(averaged, current, count):
        get_ema_multi_avg_fn(min(decay, (1 + float(count)) / (10 + float(count))))(averaged, current, count)
    return update


def load_state(path, settings):
    state = load_pickle_safely(path, "training state")
    if not isinstance(state, dict) or "settings" not in state:
        raise UserError(f"{path} is not a training state of this script; choose another --output")
    changed = [f"{name} {state['settings'].get(name)} is now {value}" for name, value in settings.items() if state["settings"].get(name) != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another --output")
    return state


if __name__ == "__main__":
    run(main)
