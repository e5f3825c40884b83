"""What pretrain.py trains: CLIP, the VAE and the UNet of the miniature, each with its configuration, its batches, its loss and the files it becomes."""

import shutil

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tqdm import tqdm

from . import diffusion
from .clip import BPE_FILE, load_clip, make_clip_tokenizer, read_merges
from .device import pick_dtype
from .files import UserError, atomic_path, first_line, write_json
from .model import to_text_encoder, write_merges
from .tensors import read_tensors
from .world import CLIP_STYLES, RENDERINGS, SIDE, STYLES, SUBJECTS, compose, random_scene, vocabulary_of

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
        bpe = args.output / BPE_FILE
        if args.start:
            start = load_clip(args.start)[0]
            with atomic_path(bpe) as temporary:
                shutil.copyfile(args.start / BPE_FILE, temporary)
        else:
            write_merges(bpe, vocabulary_of(drawings), MOST_FREQUENT)
        vocabulary = 512 + len(read_merges(bpe)) + 2  # bytes, bytes that end a word, merges, start and end
        self.tokenizer = open_clip.SimpleTokenizer(str(bpe), context_length=CONTEXT)
        self.config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": vocabulary}}
        self.model = open_clip.CLIP(**self.config)
        if args.start:  # only the image tower learns on: the text tower has become Stable Diffusion's text encoder
            self.model.load_state_dict(start.state_dict())
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
            content = read_tensors(path, "file of latents")
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
        raise UserError(f"cannot load {folder}: {first_line(error)}") from None


TASKS = {"clip": ClipTask, "vae": VaeTask, "unet": UnetTask}
