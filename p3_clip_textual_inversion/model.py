"""Stable Diffusion's five parts, from a diffusers folder, a hub name, or one file in the original layout (sd-v1-4.ckpt), and prompts into hidden states."""

import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .clip import make_clip_tokenizer, read_merges
from .diffusion import make_alpha_bar
from .files import MINI, UserError, first_line, note, read_json, shown
from .formats.checkpoint import read_checkpoint
from .formats.identity import CONFIGS, TEXT_PREFIX, check_checkpoint, part_file
from .tensors import check_numbers

diffusers.logging.set_verbosity_error()  # it warns of casts that are meant here; what fails is said by an exception
transformers.logging.disable_progress_bar()  # for files that load in a blink
transformers.logging.set_verbosity_error()  # it warns of prompts that are read here as they should be, and tables what does not fit
MINI_SD = MINI / "stable_diffusion"
PARTS = ("text_encoder", "vae", "unet")
LEAST_TOKENS = 514  # of CLIP's kind of tokenizer: each byte, each as the end of a word, start and end
MOST_ADDED = 4096  # rows of a token table beyond the tokenizer's own: words that a training added, and what makes the number round
MOST_LAYERS, LARGEST_TOKEN, LARGEST_NUMBER = 200, 1_000_000, 5120  # in a part's configuration: diffusers takes memory for each layer before it has its weights
UNOBEYED = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",  # of UNets that
            "shift_factor", "latents_mean", "latents_std",  # are told more than t and a text, and of autoencoders whose latents are moved
            "quantization_config", "auto_map")  # and what asks for other packages, or code


@dataclass
class StableDiffusion:
    """The frozen parts, in eval mode. side: of its pictures, in pixels; alpha_bar: float64 [T]."""
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    alpha_bar: torch.Tensor

    @property
    def device(self):
        return self.unet.device

    @property
    def factor(self):
        """Pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def side(self):
        return self.unet.config.sample_size * self.factor

    def latent_shape(self, side=None):
        """(channels, h, w) of the latents of pictures of a side (None: the model's own); a `UserError` for one that cannot be halved often enough."""
        side = side or self.side
        step = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if side < step or side % step:
            raise UserError(f"pictures of {side} pixels do not fit this model: the side must be a multiple of {step}")
        return (self.unet.config.in_channels, side // self.factor, side // self.factor)

    def tokens(self, prompts):
        """int [B, context], padded as Stable Diffusion pads."""
        return self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length, return_tensors="pt").input_ids

    def encode_text(self, prompts):
        """Hidden states [B, context, dim] of prompts (learned words already written out, see embedding.expand)."""
        return self.text_encoder(self.tokens(prompts).to(self.device)).last_hidden_state

    def decode(self, latents):
        """Scaled latents [B, 4, h, w] -> pictures float32 [B, 3, H, W] in -1..1, in slices of one picture of 512x512, which takes 0.8 GB in float32.

        The autoencoder of Stable Diffusion v1 is published in half precision too; one that overflows in it (as that of SDXL does) goes on in float32."""
        size = max(512**2 // (latents.shape[2] * latents.shape[3] * self.factor**2), 1)
        return torch.cat([self.decode_slice(some) for some in latents.split(size)])

    def decode_slice(self, latents):
        """`decode` of a slice."""
        latents = latents / self.vae.config.scaling_factor
        pictures = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        if self.vae.dtype == torch.float16 and latents.isfinite().all() and not pictures.isfinite().all():
            note("the autoencoder is not finite in fp16; it goes on in fp32")
            pictures = self.vae.float().decode(latents.float()).sample
        return pictures.clamp(-1, 1)


def load_stable_diffusion(source=MINI_SD, device="cpu", dtype=torch.float32):
    """A `StableDiffusion`, UNet in `dtype`, the small parts in float32.

    source: a folder that diffusers wrote; a file .ckpt or .safetensors in the original layout; or a name on the hub, which needs internet."""
    check_checkpoint(source)
    path = Path(source)
    parts = load_single_file(path, dtype) if path.is_file() else load_folder(source, path.is_dir(), dtype)
    for part in (parts.text_encoder, parts.vae, parts.unet):
        part.to(device).eval().requires_grad_(False)
    dims = parts.unet.config.cross_attention_dim, parts.text_encoder.config.hidden_size
    if dims[0] != dims[1] or parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise UserError(f"{source} is not a Stable Diffusion v1: its UNet takes text of {dims[0]} dimensions and latents of {parts.unet.config.in_channels} "
                        f"channels, its text encoder gives {dims[1]}, its VAE {parts.vae.config.latent_channels}")
    return parts


def load_folder(source, local, dtype):
    """The parts of a folder that diffusers wrote (local) or of a name on its hub."""
    options = {"local_files_only": local}
    try:
        schedule = DDIMScheduler.load_config(source, subfolder="scheduler", **options)
        for part in PARTS:
            check_config(part_file(source, part, ("config.json",)))
            for path in files_of(source, part):
                check_dtypes(path)
        parts = StableDiffusion(
            CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **options),
            CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **options, **variant(source, "text_encoder")).float(),
            AutoencoderKL.from_pretrained(source, subfolder="vae", **options, **variant(source, "vae")).float(),
            UNet2DConditionModel.from_pretrained(source, subfolder="unet", **options, **variant(source, "unet")).to(dtype), None)
    except UserError:
        raise
    except Exception as error:  # OSError for what is missing; damaged files raise what their libraries please
        hint = "" if local else "; without internet, give a file or a folder"
        reason = "a part's weights are not of the sizes that its config.json tells" if "mismatched_sizes" in str(error) else first_line(error)
        raise UserError(f"cannot load Stable Diffusion from {source}: {reason}{hint}") from None
    tokens, rows = parts.tokenizer.vocab_size, parts.text_encoder.get_input_embeddings().num_embeddings
    if not LEAST_TOKENS <= tokens <= rows < tokens + MOST_ADDED:  # without its files, transformers makes a tokenizer that knows nothing
        raise UserError(f"{source} is not whole: its tokenizer knows {tokens:,} tokens, its text encoder {rows:,}")
    parts.tokenizer.model_max_length = min(parts.tokenizer.model_max_length, parts.text_encoder.config.max_position_embeddings)  # some say 10^30
    for part in PARTS:
        check_weights({f"{part}.{name}": tensor for name, tensor in getattr(parts, part).state_dict().items()}, source)
    if schedule.get("beta_schedule") != "scaled_linear" or schedule.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{source} has a schedule {schedule.get('beta_schedule')} that predicts {schedule.get('prediction_type')}; "
                        "expected scaled_linear and epsilon, as Stable Diffusion v1 has")
    check_schedule(schedule, source)
    try:
        if schedule["num_train_timesteps"] != 1000:
            raise ValueError(f"num_train_timesteps {shown(schedule['num_train_timesteps'])[:20]}, expected 1000")
        parts.alpha_bar = make_alpha_bar(schedule["beta_start"], schedule["beta_end"], 1000)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the schedule of {source} lacks or garbles {first_line(error)}") from None
    return parts


def check_config(path):
    """A `UserError` for a configuration that asks for what is not obeyed here, or for sizes with which a model would never be built to its end."""
    config = read_json(path)
    for key, value in config.items() if isinstance(config, dict) else [("it", config)]:
        if value is None or (value is False and key in UNOBEYED):
            continue
        if key in UNOBEYED or isinstance(value, dict) or not isinstance(config, dict):
            raise UserError(f"{path} has {shown(key)!r}, {shown(value)[:60]}, which is not obeyed here; expected Stable Diffusion v1")
        most = MOST_LAYERS if "layers" in key else LARGEST_TOKEN if key == "vocab_size" or key.endswith("_id") else LARGEST_NUMBER
        values = value if isinstance(value, list) else [value]
        for number in values:
            if isinstance(number, (dict, list)) or (isinstance(number, (int, float)) and not abs(number) <= most) or len(values) > 20:
                raise UserError(f"{path}: {shown(key)} is {shown(value)[:60]}; expected a text, or numbers of at most {most:,}")


def check_weights(weights, source):
    """A `UserError` for what is no finite floating-point number: libraries would cast it, or draw noise with it, in silence."""
    for name, tensor in weights.items():
        if not name.endswith("position_ids"):  # whole numbers, which older ones store
            check_numbers(shown(name), tensor, source)


def files_of(source, part):
    """The files that from_pretrained reads of a folder's part: not those in half precision where others are, safetensors before .bin."""
    files = [path for path in (Path(source) / part).glob("*model*.*") if re.fullmatch(r"(\w*_)?model(\.fp16)?(-[\d-]+of-\d+)?\.(safetensors|bin)", path.name)]
    files = [path for path in files if ".fp16" not in path.name] or files
    return [path for path in files if path.suffix == ".safetensors"] or files


def variant(source, part):
    """What from_pretrained must be told of a part that a folder has in half precision only, as `*.fp16.*`."""
    return {"variant": "fp16"} if any(".fp16" in path.name for path in files_of(source, part)) else {}


def check_dtypes(path):
    """A `UserError` where a file of weights holds others than floating-point numbers, which from_pretrained would cast."""
    if path.suffix == ".bin":
        read_checkpoint(path)
        return
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            if (found := file.get_slice(name).get_dtype()) not in ("F16", "BF16", "F32", "F64") and not name.endswith("position_ids"):
                raise UserError(f"{path} holds {shown(name)} as {found}; expected floating point (F32, F16 or BF16)")


def check_schedule(schedule, source):
    """A `UserError` for what a schedule says of the model and is not obeyed here; a note for what it says of a sampler, which --sampler and --steps decide."""
    wrong = [f"{name} {shown(schedule[name])}"[:80] for name in ("trained_betas", "rescale_betas_zero_snr", "thresholding") if schedule.get(name)]
    if wrong:
        raise UserError(f"the schedule of {source} has {', '.join(wrong)}, which is not obeyed here; expected none, as Stable Diffusion v1 has")
    others = [f"{name} {shown(schedule[name])}" for name, usual in (("timestep_spacing", ("leading", "linspace")), ("set_alpha_to_one", (False,)))
              if schedule.get(name) is not None and schedule[name] not in usual]
    if others:
        note(f"the schedule of {source} has {', '.join(others)}, which is a sampler's setting and not obeyed: see --sampler")


def load_single_file(path, dtype=torch.float32, configs=CONFIGS):
    """The parts of one file with keys model.diffusion_model.*, first_stage_model.* and cond_stage_model.transformer.*, offline.

    UNet and VAE are converted by diffusers; the text encoder's names are transformers' own. configs: a folder with unet, vae, text_encoder/config.json."""
    weights = read_checkpoint(path)
    for prefix in ("model.diffusion_model.", "first_stage_model.", TEXT_PREFIX):
        if not any(name.startswith(prefix) for name in weights):
            raise UserError(f"{path} has no keys {prefix}*; expected Stable Diffusion v1 in its original layout, such as sd-v1-4.ckpt")
        check_weights({name: tensor for name, tensor in weights.items() if name.startswith(prefix)}, path)
    models = []
    for part, kind, kind_dtype in (("unet", UNet2DConditionModel, dtype), ("vae", AutoencoderKL, torch.float32)):
        try:
            # a copy of the dict: the conversion takes its keys out
            model = kind.from_single_file(dict(weights), config=str(configs), subfolder=part, local_files_only=True)
        except KeyError as error:
            raise UserError(f"{path} has no tensor {error.args[0]!r}, which the {part} needs") from None
        except (ValueError, RuntimeError, TypeError, OSError) as error:
            raise UserError(f"the {part} of {path} does not fit Stable Diffusion v1: {first_line(error)}") from None
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise UserError(f"{path} has not all of the {part}: {missing[0]} is missing")
        models.append(model.to(kind_dtype))
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    own = encoder.state_dict()
    theirs = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in weights.items() if name.startswith(TEXT_PREFIX)}
    if not any(name.startswith("text_model.") for name in own):  # transformers 5 dropped the prefix
        theirs = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    for name, tensor in own.items():
        if name.endswith("position_ids"):  # older ones store the numbers 0 to 76
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = tuple(theirs[name].shape) if name in theirs else "missing"
            raise UserError(f"the text encoder of {path} does not fit Stable Diffusion v1: {TEXT_PREFIX}{name} is {found}, expected {tuple(tensor.shape)}")
    encoder.load_state_dict({name: theirs[name].float() if name in theirs else own[name] for name in own})
    merges = read_merges()[:own[next(name for name in own if name.endswith("token_embedding.weight"))].shape[0] - 514]
    return StableDiffusion(make_clip_tokenizer(merges), encoder, models[1], models[0], make_alpha_bar())
