"""What train.py trains: the miniature's autoencoder, CLIP, second judge and UNet: of each the configuration, batches, loss and the files it becomes."""

import copy
import gzip
import json

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from .. import diffusion
from ..clip import BPE_FILE, load_clip, make_clip_tokenizer, read_merges
from ..device import autocast, pick_dtype
from ..files import UserError, atomic_path, first_line, write_json
from .painting import compose
from .world import CLIP_STYLES, SIDE, STYLES, Captioner, Scenes, exchanged, pieces_of, sample

MOST_FREQUENT = 8000  # merges: rarer words are spelled in parts that others share
CONTEXT = 48  # tokens: room for three subjects with all looks and two words of four vectors
CLIP_CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": SIDE, "timm_model_name": "convnext_atto_ols", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": {"context_length": CONTEXT, "width": 192, "heads": 3, "layers": 4},
}
JUDGE_CONFIG = {  # of another kind: group convolutions with batch norm in place of depthwise ones with layer norm, and a smaller text tower
    "embed_dim": 192,
    "vision_cfg": {"image_size": SIDE, "timm_model_name": "regnetx_002", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 4},
}
VAE_CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": SIDE, "block_out_channels": (32, 64, 128), "layers_per_block": 1,
    "norm_num_groups": 32, "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET_CONFIG = {
    "sample_size": SIDE // 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (96, 128, 192), "layers_per_block": 1,
    "cross_attention_dim": 192, "attention_head_dim": 4, "norm_num_groups": 32,  # attention at 8x8 and 4x4 only: at 16x16 too it takes a quarter longer
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1}  # Stable Diffusion v1's
BANDS = 8  # of noise, by which the UNet's validation loss is told


class Clip:
    """CLIP (Radford et al. 2021) on all subjects in all styles but the unseen one. Beside the other captions of its batch, each picture has `hard` untrue ones
    of nearly the same words (Yuksekgonul et al. 2023), so that CLIP can tell which attribute belongs to which subject."""

    steps, batch_size, lr, weight_decay, config, hard = 3000, 1024, 1e-3, 0.1, CLIP_CONFIG, 2

    def __init__(self, args, drawings, device):
        self.drawings, self.device = drawings, device
        pieces = [*pieces_of(drawings)[0], "next to"]
        write_merges(args.output / BPE_FILE, pieces, MOST_FREQUENT)
        vocabulary = 512 + len(read_merges(args.output / BPE_FILE)) + 2  # bytes, bytes that end a word, merges, start and end
        tokenizer = open_clip.SimpleTokenizer(str(args.output / BPE_FILE), context_length=CONTEXT)
        self.captioner = Captioner(drawings, tokenizer.encode, tokenizer.sot_token_id, tokenizer.eot_token_id, CONTEXT, device)
        self.config = self.config | {"text_cfg": self.config["text_cfg"] | {"vocab_size": vocabulary}}
        self.model = open_clip.CLIP(**self.config)
        if args.start:
            start = load_clip(str(args.start))[0]
            if read_merges(args.start / BPE_FILE) != read_merges(args.output / BPE_FILE) or shapes(start) != shapes(self.model):
                raise UserError(f"{args.start} is of another size or has other words than the {type(self).__name__.lower()} to be trained")
            self.model.load_state_dict(start.state_dict())
        if args.lock_text:
            self.model.lock_text_tower()

    def batch(self, generator, count):
        """(pictures, tokens [B, context], of the untrue captions [hard, B, context], which of those count [hard, B]). Five in eight begin with a subject that
        no other does, so that no caption fits two pictures, half of them everyday ones; the rest are several everyday things beside each other."""
        most = min(count * 5 // 8 + 1, len(self.drawings.trained))
        everyday = self.drawings.everyday[torch.randperm(len(self.drawings.everyday), generator=generator)[:(most + 1) // 2]]
        rare = self.drawings.trained[~torch.isin(self.drawings.trained, self.drawings.everyday)]
        first = torch.cat([everyday, rare[torch.randperm(len(rare), generator=generator)]])[:most]
        most = len(first)
        common = {"styles": CLIP_STYLES, "tell_ground": 0.4, "tell_style": 0.3}
        groups = [sample(self.drawings, most, generator, first=first, several=(0.7, 0.22, 0.08), **common)]
        if count > most:
            groups.append(sample(self.drawings, count - most, generator, several=(0.0, 0.8, 0.2), **common))
        scenes = join(groups)
        pictures = recolour(compose(self.drawings, scenes, generator, shift=0.12, spread=(0.6, 1.0), turn=0.25), generator)
        untrue = [exchanged(scenes, generator) for _ in range(self.hard)]
        return (pictures, self.captioner(scenes, 0), torch.stack([self.captioner(other, 0) for other, _ in untrue]),
                torch.stack([valid for _, valid in untrue]).to(self.device, non_blocking=True))

    def loss(self, model, batch, generator):
        pictures, tokens, untrue, valid = batch
        count = len(tokens)
        image, text, scale = self.features(model, pictures, torch.cat([tokens, untrue.flatten(0, 1)]))
        with torch.autocast(self.device.type, enabled=False):
            logits = scale.clamp(max=100.0) * image.float() @ text.float().T  # [B, (1 + hard) B]
            target = torch.arange(count, device=self.device)
            same = (tokens[:, None] == tokens[None]).all(-1) & (target[:, None] != target)  # a caption that another picture has too
            out = torch.cat([same, ~valid.flatten()[None].expand(count, -1)], dim=1)
            logits = logits.masked_fill(out, -1e4)
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2

    def features(self, model, pictures, captions):
        """What model(pictures, captions) answers; on a CPU, where time is arithmetic and not launches, by captions of about the same length."""
        if self.device.type != "cpu":
            return model(pictures, captions)
        return self.model.encode_image(pictures, normalize=True), encode_by_length(self.model, captions), self.model.logit_scale.exp()

    def export(self, model, folder):
        weights = stored(model).state_dict()
        with atomic_path(folder / "open_clip_model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        write_json(folder / "open_clip_config.json", {"model_cfg": self.config, "preprocess_cfg": preprocess})


def encode_by_length(model, tokens, groups=4):
    """open_clip's encode_text, normalised, of tokens [B, context] that end in zeros, in less than half the time: captions of about the same length go through
    the text tower together, without what comes after the longest, which causal attention keeps from mattering."""
    lengths, order = (tokens != 0).sum(1).sort()
    parts = []
    for own, longest in zip(tokens[order].chunk(groups), (part[-1] for part in lengths.chunk(groups))):
        own = own[:, :longest]
        x = model.token_embedding(own) + model.positional_embedding[:longest]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:longest, :longest]))
        parts.append(x[torch.arange(len(own)), own.argmax(1)] @ model.text_projection)  # the end is the highest token
    return F.normalize(torch.cat(parts)[order.argsort()], dim=-1)


class Judge(Clip):
    """A second CLIP, of another architecture and seed, by which nothing is chosen."""
    batch_size, config = 512, JUDGE_CONFIG


class Autoencoder:
    """The autoencoder of latent diffusion (Rombach et al. 2022), with absolute and squared errors and a slight pull to the normal distribution."""

    steps, batch_size, lr, weight_decay = 4000, 64, 1e-3, 0.0

    def __init__(self, args, drawings, device):
        self.drawings, self.device = drawings, device
        self.model = load_part(AutoencoderKL, args.start) if args.start else AutoencoderKL(**VAE_CONFIG)

    def batch(self, generator, count):
        """Any subject alone, everyday ones in company."""
        first = self.drawings.trained[torch.randint(0, len(self.drawings.trained), (count,), generator=generator)]
        scenes = sample(self.drawings, count, generator, first=first, styles=CLIP_STYLES, rendered=0.15, several=(0.5, 0.35, 0.15))
        pictures = recolour(compose(self.drawings, scenes, generator), generator)
        return pictures.contiguous(memory_format=torch.channels_last)

    def loss(self, model, pictures, generator):
        noise = torch.randn(len(pictures), 4, SIDE // 4, SIDE // 4, device=self.device)
        decoded, mean, logvar = self.through(self.model, pictures, noise)
        error, mean, logvar = decoded.float() - pictures, mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return error.abs().mean() + error.square().mean() + 1e-5 * kl

    @torch.no_grad()
    def export(self, model, folder):
        """With the latents' deviation on pictures as the scaling factor."""
        pictures = self.batch(torch.Generator().manual_seed(10**6), 256)
        model.register_to_config(scaling_factor=1 / model.encode(pictures).latent_dist.mean.std().item())
        stored(model).save_pretrained(folder)


def through(model, pictures, noise):
    """(decoded, mean, log variance) of pictures through an autoencoder."""
    posterior = model.encode(pictures).latent_dist
    return model.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar


class Unet:
    """The noise predictor of latent diffusion, on everyday subjects, conditioned on the frozen text tower of the miniature of CLIP.

    Latents and hidden states lie in a pool on the device, of which each step renews a share: a picture is seen about `reuse` times."""

    steps, batch_size, lr, weight_decay = 6000, 512, 1e-3, 0.01
    drop_caption, reuse, valid = 0.1, 4, 512

    def __init__(self, args, drawings, device):
        self.drawings, self.device = drawings, device
        self.dtype = pick_dtype(args.dtype, device) if device.type == "cuda" else torch.float32  # of the frozen parts
        if args.clip is None or args.vae is None:
            raise UserError("unet needs --clip and --vae, the folders of the runs of clip and autoencoder")
        clip = load_clip(str(args.clip))[0]
        self.tokenizer = make_clip_tokenizer(read_merges(args.clip / BPE_FILE), CONTEXT)
        self.text_encoder = to_text_encoder(clip, self.tokenizer).to(device)
        self.vae = load_part(AutoencoderKL, args.vae).to(device).requires_grad_(False)
        self.captioner = Captioner(drawings, lambda text: self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.bos_token_id,
                                   self.tokenizer.eos_token_id, CONTEXT, device)
        self.empty = self.encode_text(torch.tensor([[self.tokenizer.bos_token_id] + [self.tokenizer.eos_token_id] * (CONTEXT - 1)], device=device))
        self.alpha_bar = diffusion.make_alpha_bar().to(device)
        self.scheduler = DDIMScheduler(**SCHEDULE)
        self.model = load_part(UNet2DConditionModel, args.start) if args.start else UNet2DConditionModel(**UNET_CONFIG)
        self.pool, self.at, self.since, self.pool_size = None, 0, 0, args.pool
        mean, deviation, hidden = self.make(torch.Generator().manual_seed(10**6), self.valid)  # no training step's seed
        generator = torch.Generator().manual_seed(10**6)
        fresh, eps = (torch.randn(mean.shape, generator=generator).to(device) for _ in range(2))
        t = torch.arange(self.valid) * len(self.alpha_bar) // self.valid  # all bands alike
        t = t.reshape(BANDS, -1).T.flatten().to(device)
        self.held = self.vae.config.scaling_factor * (mean + deviation * fresh), eps, t, hidden

    @torch.no_grad()
    def encode_text(self, tokens):
        with autocast(self.device, self.dtype):
            return self.text_encoder(tokens).last_hidden_state.float()

    @torch.no_grad()
    def make(self, generator, count):
        """(means, deviations [N, 4, 16, 16], hidden states [N, context, dim]) of new pictures and captions, in half precision on a GPU."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        scenes = sample(self.drawings, count, generator, styles=STYLES, rendered=0.25)
        pictures, parts = compose(self.drawings, scenes, generator), []
        for part in pictures.split(1024):
            with autocast(self.device, self.dtype):
                posterior = self.vae.encode(part).latent_dist
            parts.append((posterior.mean.to(dtype), posterior.std.to(dtype)))
        return *(torch.cat(column) for column in zip(*parts)), self.encode_text(self.captioner(scenes, self.tokenizer.eos_token_id)).to(dtype)

    def batch(self, generator, count):
        """(x0, hidden states): rows of the pool, which is filled at first and then renewed by `count` pictures every `reuse` batches."""
        chunk = min(count, self.pool_size)
        if self.pool is None:
            parts = [self.make(generator, chunk) for _ in range(self.pool_size // chunk)]
            self.pool = [torch.cat(column) for column in zip(*parts)]
        self.since += 1
        if self.since % self.reuse == 0:
            for kept, new in zip(self.pool, self.make(generator, chunk)):
                kept[self.at:self.at + chunk] = new
            self.at = (self.at + chunk) % (len(self.pool[0]) // chunk * chunk)
        rows = torch.randint(0, len(self.pool[0]), (count,), generator=generator).to(self.device, non_blocking=True)
        mean, deviation, hidden = (kept[rows].float() for kept in self.pool)
        dropped = (torch.rand(count, 1, 1, generator=generator) < self.drop_caption).to(self.device, non_blocking=True)
        x0 = self.vae.config.scaling_factor * (mean + deviation * torch.randn_like(mean))
        return x0.contiguous(memory_format=torch.channels_last), torch.where(dropped, self.empty, hidden)

    def loss(self, model, batch, generator):
        """Of diffusion.py, with min-SNR weights: a short training is not to be spent on noise too slight to matter."""
        x0, hidden = batch
        t = torch.randint(0, len(self.alpha_bar), (len(x0),), generator=generator).to(self.device, non_blocking=True)
        return diffusion.loss(model, self.alpha_bar, x0, t, torch.randn_like(x0), hidden, min_snr_gamma=5).mean()

    @torch.no_grad()
    def validate(self, model):
        """The squared error by band of noise, slight to strong, [BANDS]: kept pictures, captions, noise and timesteps, so that two models can be compared."""
        error = torch.cat([diffusion.loss(model, self.alpha_bar, x0.float(), t, eps.float(), hidden.float())
                           for x0, eps, t, hidden in zip(*(part.split(128) for part in self.held))])
        return error.reshape(-1, BANDS).mean(0).cpu().tolist()

    def export(self, model, folder):
        """The whole pipeline. Weights in half precision; all the parts say float32, in which stock libraries then load all of them."""
        pipeline = StableDiffusionPipeline(vae=stored(self.vae), text_encoder=stored(self.text_encoder), tokenizer=self.tokenizer, unet=stored(model),
                                           scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipeline.save_pretrained(folder / "stable_diffusion", safe_serialization=True)
        for part, changes in (("text_encoder", {"dtype": "float32"}), ("vae", {}), ("unet", {})):
            config = folder / "stable_diffusion" / part / "config.json"
            content = json.loads(config.read_text(encoding="utf-8")) | changes
            write_json(config, {name: value for name, value in content.items() if name != "_name_or_path"})  # where it lay on this machine


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def stored(model):
    """A copy as it is written: in half precision, on the CPU, in the plain layout."""
    return copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).half()


def join(groups):
    """Several `Scenes` as one."""
    return Scenes(*(torch.cat(column) for column in zip(*(vars(group).values() for group in groups))))


def recolour(pictures, generator):
    """Contrast, brightness, colour balance and saturation off, per picture: other sets use other colours for the same thing. Not so far that a word for a
    colour would no longer fit."""
    count = len(pictures)
    gain = 1 + 0.15 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    offset = 0.2 * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    saturation = 0.6 + 0.7 * torch.rand(count, 1, 1, 1, generator=generator)
    gain, offset, saturation = (value.to(pictures.device, non_blocking=True) for value in (gain, offset, saturation))
    gray = pictures.mean(dim=1, keepdim=True)
    return ((gray + saturation * (pictures - gray)) * gain + offset).clamp(-1, 1)


def write_merges(path, texts, most_frequent=None):
    """Of open_clip's BPE file, or its `most_frequent` merges, those that the words of `texts` need, in its order, as a file of the same format: a small
    vocabulary that reads these words just as the larger one does. Returns how many."""
    merges = read_merges()[:most_frequent]
    maker, needed = {"".join(merge): merge for merge in merges}, set()
    tokenizer = make_clip_tokenizer(merges)
    pending = [token for text in texts for token in tokenizer.tokenize(text)]
    while pending:
        merge = maker.get(pending.pop())
        if merge and merge not in needed:
            needed.add(merge)
            pending += merge
    with atomic_path(path) as temporary, open(temporary, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges if merge in needed)]).encode())
    return len(needed)


def to_text_encoder(clip, tokenizer):
    """open_clip's text tower as transformers' `CLIPTextModel`, the text encoder of Stable Diffusion, with the same weights.

    Without the last projection, which a text encoder of Stable Diffusion does not have. For towers of `open_clip.CLIP`, of OpenAI's shape."""
    state = {name: tensor.float() for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    vocabulary, width = state["token_embedding.weight"].shape
    block = clip.transformer.resblocks[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=block.mlp.c_fc.out_features, num_hidden_layers=len(clip.transformer.resblocks),
        num_attention_heads=block.attn.num_heads, max_position_embeddings=len(state["positional_embedding"]),
        hidden_act="quick_gelu" if isinstance(block.mlp.gelu, open_clip.transformer.QuickGELU) else "gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    mapped = {"embeddings.token_embedding.weight": state["token_embedding.weight"], "embeddings.position_embedding.weight": state["positional_embedding"],
              "final_layer_norm.weight": state["ln_final.weight"], "final_layer_norm.bias": state["ln_final.bias"]}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for part in ("weight", "bias"):
            for name, target in names.items():
                mapped[f"{theirs}.{target}.{part}"] = state[f"{ours}.{name}.{part}"]
            for letter, third in zip("qkv", state[f"{ours}.attn.in_proj_{part}"].chunk(3)):
                mapped[f"{theirs}.self_attn.{letter}_proj.{part}"] = third
    encoder = CLIPTextModel(config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in encoder.state_dict()) else ""  # transformers 5 dropped it
    encoder.load_state_dict({prefix + name: tensor for name, tensor in mapped.items()}, strict=True)
    return encoder.eval().requires_grad_(False)


def load_part(kind, folder):
    """A model of diffusers from its folder, in float32."""
    try:
        return kind.from_pretrained(folder, local_files_only=True).float()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {first_line(error)}") from None


PARTS = {"autoencoder": Autoencoder, "clip": Clip, "judge": Judge, "unet": Unet}
