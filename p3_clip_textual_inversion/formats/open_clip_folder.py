"""A CLIP in open_clip's folder: nothing that its configuration says is done before it is found on a list of what may be said, and its weights fit strictly.

Anyone can write such a folder. open_clip would take from it the name of a model to download, whatever its tokenizer is told (trust_remote_code, too), any size,
and draw weights at random where it finds none.
"""

import dataclasses

import open_clip
import timm
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2

from ..files import UserError, read_json, shown
from ..tensors import fill
from .checkpoint import read_checkpoint

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
PARTS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
FOREIGN = {"hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "tokenizer_mode"}  # a text tower of another library, from a hub
LARGEST = {"vocab_size": 1_000_000, "layers": 200, "image_size": 4096, "context_length": 10_000}  # and of any other number:
LARGEST_NUMBER = 20_000
WHOLE = ("embed_dim", "vocab_size", "layers", "width", "heads", "head_width", "patch_size", "image_size", "context_length")
OPTIONS = {"tokenizer_kwargs": ("clean", "strip_sep_token"), "norm_kwargs": ("eps",), "act_kwargs": ("approximate",)}


def load(folder, bpe_path=None):
    """(model in float32, image transform, tokenizer). bpe_path: of a vocabulary of its own."""
    config = read_json(folder / CONFIG)
    model_config, preprocess = check_config(config, folder / CONFIG)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has a {CONFIG}, but none of {', '.join(WEIGHTS)}")
    custom = model_config.pop("custom_text", False)
    state = read_checkpoint(path)
    build = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.device("meta"):  # sizes that the weights do not have take no memory
        fill(build(**model_config), state, path)
    model = fill(build(**model_config), state, path)
    transform = image_transform_v2(PreprocessCfg(**preprocess | {"size": model.visual.image_size}), is_train=False)
    return model, transform, make_tokenizer(folder, model_config["text_cfg"], bpe_path)


def make_tokenizer(folder, text, bpe_path):
    options, length = text.get("tokenizer_kwargs") or {}, text.get("context_length", 77)
    if not text.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(context_length=length, **({"bpe_path": bpe_path} if bpe_path else {}), **options)
    told = folder / "tokenizer_config.json"
    if told.is_file() and "auto_map" in read_json(told):
        raise UserError(f"{told} asks for code of its own (auto_map), which is not run")
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=length, trust_remote_code=False, local_files_only=True, **options)


def check_config(config, path):
    """(what the model's class takes, what is done to pictures) of a configuration, every key and value of which is on the list."""
    top = {"embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "custom_text", *PARTS}
    model = section(config, "model_cfg", top, path)
    for key in ("embed_dim", *PARTS):
        if key not in model:
            raise UserError(f"{path}: model_cfg has no {key}")
    for part, kind in PARTS.items():
        section(model, part, {field.name for field in dataclasses.fields(kind)} - FOREIGN, path)
    vision = model["vision_cfg"]
    name = vision.get("timm_model_name")
    if name is not None and (not isinstance(name, str) or not timm.is_model(name) or ":" in name or "/" in name):
        raise UserError(f"{path}: timm_model_name {shown(name)!r} is no model of timm's; one of a hub is not fetched")
    if vision.get("timm_model_pretrained"):
        raise UserError(f"{path}: timm_model_pretrained asks for other weights than those of the folder")
    preprocess = section(config, "preprocess_cfg", {field.name for field in dataclasses.fields(PreprocessCfg)}, path) if "preprocess_cfg" in config else {}
    for key, expected in (("interpolation", ("bicubic", "bilinear")), ("resize_mode", ("shortest", "longest", "squash")), ("mode", ("RGB",))):
        if preprocess.get(key, expected[0]) not in expected:
            raise UserError(f"{path}: {key} {shown(preprocess[key])!r} is not known here")
    for key in ("mean", "std"):
        if key in preprocess and not (isinstance(preprocess[key], list) and len(preprocess[key]) == 3 and all(map(is_number, preprocess[key]))
                                      and (key == "mean" or all(preprocess[key]))):
            raise UserError(f"{path}: {key} must be three numbers{', none of them 0' if key == 'std' else ''}")
    return model, {key: value for key, value in preprocess.items() if value is not None}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def section(config, name, allowed, path):
    """config[name], an object whose keys are all allowed and whose values are texts, numbers within `LARGEST`, or lists of numbers."""
    content = config.get(name) if isinstance(config, dict) else None
    if not isinstance(content, dict):
        raise UserError(f"{path} must have an object {name}")
    for key, value in content.items():
        if key not in allowed:
            raise UserError(f"{path}: {name} has {shown(key)!r}, which is not obeyed here")
        if key in PARTS:
            continue
        if key in OPTIONS and value is not None:
            if not isinstance(value, dict) or not set(value) <= set(OPTIONS[key]):
                raise UserError(f"{path}: {key} may have {', '.join(OPTIONS[key])} only")
            if value.get("approximate", "none") not in ("none", "tanh"):
                raise UserError(f"{path}: approximate of {key} is {shown(value['approximate'])}; expected none or tanh")
            value = list(value.values())
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            wrong = isinstance(number, (dict, list)) or (isinstance(number, (int, float)) and not abs(number) <= LARGEST.get(key, LARGEST_NUMBER))
            if wrong or (key in WHOLE and (not isinstance(number, int) or isinstance(number, bool) or number < 1)):
                raise UserError(f"{path}: {key} is {shown(number)}; expected {'a whole number from 1' if key in WHOLE else 'a text or a number'}"
                                f", at most {LARGEST.get(key, LARGEST_NUMBER):,}")
    return content
