"""CLIP and SigLIP as Hugging Face's transformers keep them, with the methods that open_clip's models have."""

from functools import partial
from types import SimpleNamespace

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from ..files import UserError, read_json, shown
from ..tensors import fill
from .checkpoint import read_checkpoint
from .open_clip_folder import is_number

CLIP_VOCABULARY = 49408  # tokens of OpenAI's CLIP, which open_clip's own tokenizer knows
HEAD_WIDTH = 64  # in every CLIP of OpenAI's shape
TOWERS = ("text_config", "vision_config")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # without one of them, transformers would make a tokenizer that knows nothing
KINDS = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SAID = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size", "image_size", "patch_size",
        "num_channels", "layer_norm_eps", "eos_token_id", "bos_token_id", "pad_token_id", "projection_dim", "projection_size", "hidden_act")  # of a tower
MOST_LAYERS, LARGEST_NUMBER = 200, 1_000_000
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new")
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
PREPARED = {  # what preprocessor_config.json may say of how pictures are prepared, of a model that reads this side
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), lambda value, _: value is True),
    "rescale_factor": lambda value, _: isinstance(value, float) and abs(value * 255 - 1) < 1e-3,
    "resample": lambda value, _: value in (2, 3) and not isinstance(value, bool),
    **dict.fromkeys(("size", "crop_size"), lambda value, side: set(value.values() if isinstance(value, dict) else [value]) == {side}),
}


class HuggingFace(torch.nn.Module):
    """A CLIPModel or SiglipModel under open_clip's names."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.visual = SimpleNamespace(image_size=model.config.vision_config.image_size)

    @property
    def logit_scale(self):
        return self.model.logit_scale

    @property
    def logit_bias(self):
        return getattr(self.model, "logit_bias", None)

    def encode_image(self, pictures, normalize=False):
        return features_of(self.model.get_image_features(pixel_values=pictures), normalize)

    def encode_text(self, tokens, normalize=False):
        return features_of(self.model.get_text_features(input_ids=tokens), normalize)


def features_of(output, normalize):
    """[B, dim] of what transformers answer: 5 wraps the features, 4 does not."""
    features = output if torch.is_tensor(output) else output.pooler_output
    return torch.nn.functional.normalize(features, dim=-1) if normalize else features


def load(folder):
    """(model, image transform, tokenizer) of a folder with config.json, weights and, where the vocabulary is not OpenAI's, the tokenizer's files."""
    config, preprocess = (read_json(folder / name) if (folder / name).is_file() else {} for name in ("config.json", "preprocessor_config.json"))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise UserError(f"{folder / 'config.json'} is not of a CLIP or SigLIP: its model_type is {kind!r}, expected one of {', '.join(KINDS)}")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has a config.json, but none of {', '.join(WEIGHTS)}")
    config_kind, model_kind = KINDS[kind]
    if not isinstance(preprocess, dict) or not all(isinstance(config.get(tower) or {}, dict) for tower in TOWERS):
        raise UserError(f"{folder}: preprocessor_config.json and {' and '.join(TOWERS)} of config.json must be objects")
    towers = {tower: {key: value for key, value in (config.get(tower) or {}).items() if key in SAID} for tower in TOWERS}
    for tower, sizes in towers.items():
        for key, value in sizes.items():
            most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST_NUMBER
            if (value not in ACTIVATIONS) if key == "hidden_act" else not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise UserError(f"{folder / 'config.json'}: {key} of {tower} is {shown(value)}, which is not known here")
    options = {"projection_dim": config["projection_dim"]} if kind == "clip" and isinstance(config.get("projection_dim"), int) else {}
    state = {name: tensor for name, tensor in read_checkpoint(path).items() if not name.endswith("position_ids")}  # older ones store the numbers 0 to 76
    model = build(model_kind, config_kind(**towers, **options), state, path)
    text, siglip = model.config.text_config, kind == "siglip"
    if not siglip and text.vocab_size == CLIP_VOCABULARY:
        tokenizer = open_clip.SimpleTokenizer(context_length=text.max_position_embeddings)
    else:
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise UserError(f"{folder} has a vocabulary of its own ({text.vocab_size:,} tokens), but none of {', '.join(VOCABULARIES)}")
        tokenizer = partial(tokenize, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), text.max_position_embeddings)
    return HuggingFace(model), transform_of(preprocess, model.config.vision_config.image_size, siglip, folder), tokenizer


def transform_of(preprocess, side, siglip, folder):
    """The image transform that preprocessor_config.json tells, or the usual one of the kind where there is none."""
    wrong = [f"{key} {shown(preprocess[key])}" for key, fits in PREPARED.items() if preprocess.get(key) is not None and not fits(preprocess[key], side)]
    if wrong:
        raise UserError(f"{folder / 'preprocessor_config.json'} has {wrong[0][:80]}, which is not obeyed here")
    numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if siglip else {}
    numbers |= {ours: preprocess[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in preprocess}
    if not all(len(value) == 3 and all(map(is_number, value)) for value in numbers.values()) or not all(numbers.get("std", (1,))):
        raise UserError(f"{folder / 'preprocessor_config.json'}: image_mean and image_std must be three numbers each, the latter not 0")
    cropped = preprocess.get("do_center_crop", not siglip)
    return image_transform_v2(PreprocessCfg(size=side, resize_mode="shortest" if cropped else "squash",
                                            interpolation=RESAMPLING[preprocess.get("resample") or 3], **numbers), is_train=False)


def build(kind, config, state, path):
    """A model with the tensors of a file, strictly: transformers itself would draw at random what is missing."""
    with torch.device("meta"):  # sizes that the weights do not have take no memory
        model = fill(kind(config), state, path)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if name == "position_ids":
                module._buffers[name] = torch.arange(buffer.shape[-1])[None]
    return model.eval()


def tokenize(tokenizer, context_length, texts):
    """int [B, context], padded to the end, as both kinds were trained."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt").input_ids


def model_of_state(state, quick_gelu, path):
    """A CLIPModel for the bare state_dict of a file, its shape read off the tensors."""
    def layers(tower):
        return len({name.split(".")[3] for name in state if name.startswith(f"{tower}.encoder.layers.")})

    def sizes(tower, activation):
        intermediate, width = state[f"{tower}.encoder.layers.0.mlp.fc1.weight"].shape
        return {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers(tower), "num_attention_heads": max(width // HEAD_WIDTH, 1),
                "hidden_act": activation, "projection_dim": dim}
    dim, activation = len(state["visual_projection.weight"]), "quick_gelu" if quick_gelu else "gelu"
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    side = patch * round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vocabulary, context = (len(state[f"text_model.embeddings.{name}_embedding.weight"]) for name in ("token", "position"))
    config = CLIPConfig(projection_dim=dim, vision_config=sizes("vision_model", activation) | {"patch_size": patch, "image_size": side},
                                 text_config=sizes("text_model", activation) | {"vocab_size": vocabulary, "max_position_embeddings": context})
    return build(CLIPModel, config, state, path)
