"""By what a Stable Diffusion is known again, wherever it lies and in whatever form: what learned words and settings belong to."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open

from ..files import UserError, existing_file, fingerprint, first_line, read_json
from ..tensors import what_is
from .checkpoint import read_checkpoint
from .memo import Memo, cache_folder

FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin", ".zip", ".part")  # what ends so is no name on the hub, which may have dots too
TEXT_PREFIX = "cond_stage_model.transformer."
CONFIGS = Path(__file__).parent.parent / "sd_v1"  # of a file in the original layout, which carries none
LARGE = 100_000_000  # bytes, which take a twentieth of a second; what there is more of is read again only when it is another file
VOCABULARY = 49408  # tokens of CLIP; what is behind them in a table are words that someone added
# Two tensors by which a model is known again: in the original layout, and in a folder's part with its files, any of which will do.
TOKEN_TABLE = (f"{TEXT_PREFIX}text_model.embeddings.token_embedding.weight", "text_encoder", "token_embedding.weight",
               ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"))
FIRST_CONVOLUTION = ("model.diffusion_model.input_blocks.0.0.weight", "unet", "conv_in.weight",
                     ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"))


@dataclass(frozen=True)
class Identity:
    """What a checkpoint of Stable Diffusion is, wherever it lies and in whatever form. side: of its pictures, in pixels; width: of its words' vectors.

    words: of the token table, which decides what learned words mean; unet: of the UNet's first convolution, which finetuning changes. 12 digits each, of
    the values in half precision, so that a .ckpt, an fp16 file and a folder of one model have the same."""
    side: int
    words: str
    unet: str
    width: int = 0

    def __str__(self):
        return f"{self.words}-{self.unet}"


def check_checkpoint(source):
    """A `UserError` for what is neither a file, nor a folder of Stable Diffusion, nor like a name on the hub."""
    path = Path(source)
    if os.path.isdir(path) and not (path / "model_index.json").is_file():
        raise UserError(f"{path} is not a folder of Stable Diffusion: it has no model_index.json{where_it_lies(path)}")
    if not os.path.lexists(path) and (path.is_absolute() or str(source).startswith(".") or path.suffix.lower() in FILES or str(source).count("/") != 1):
        raise UserError(f"no such checkpoint: {source}; expected a file .ckpt or .safetensors, a folder with model_index.json, or a hub name, "
                        "owner/model; bash scripts/download_weights.sh fetches sd-v1-4.ckpt")


def where_it_lies(folder):
    """What an error adds for a model's folder in the cache of the hub's library, which has its files further down."""
    snapshots = [path for path in Path(folder).glob("snapshots/*") if path.is_dir()]
    return f"; give {max(snapshots, key=os.path.getmtime)}, where the hub's cache has it" if snapshots else ""


def identify(source):
    """The `Identity` of a checkpoint: a file in the original layout, a folder or a hub name. Of several GB it reads the token table only."""
    check_checkpoint(source)
    path = Path(source)
    if os.path.lexists(path) and not os.path.isdir(path):
        tensors = read_some(path, [TOKEN_TABLE[0], FIRST_CONVOLUTION[0]])
        unet, vae = (json.loads((CONFIGS / part / "config.json").read_text()) for part in ("unet", "vae"))
    else:
        try:
            tensors = [read_some(part_file(source, part, files), [name])[0] for _, part, name, files in (TOKEN_TABLE, FIRST_CONVOLUTION)]
            unet, vae = (read_json(part_file(source, part, ("config.json",))) for part in ("unet", "vae"))
        except UserError:
            raise
        except Exception as error:  # the hub's library raises many kinds, a damaged config others
            hint = "" if path.is_dir() else "; without internet, give a file or a folder"
            raise UserError(f"cannot load Stable Diffusion from {source}: {first_line(error)}{hint}") from None
    try:
        side = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} does not tell the size of its pictures: {type(error).__name__}: {error}") from None
    return Identity(side, half_fingerprint(tensors[0][:VOCABULARY]), half_fingerprint(tensors[1]), tensors[0].shape[-1])


def weights_fingerprint(source):
    """16 digits of all that a checkpoint draws with: a finetuning that leaves alone what `identify` reads is another model all the same. Of a name on the
    hub, which may get other weights, those of UNet and text encoder."""
    path = Path(source)
    parts = [part for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler") if os.path.isdir(part := path / name)] or [path]
    if not os.path.lexists(path):
        parts = [part_file(source, part, names) for _, part, _, names in (TOKEN_TABLE, FIRST_CONVOLUTION)]
    files = [file for part in parts for file in (sorted(part.rglob("*")) if os.path.isdir(part) else [part]) if os.path.isfile(file)]
    if sum(os.path.getsize(file) for file in files) < LARGE:
        return fingerprint(*parts)
    return Memo(cache_folder() / "weights.json").of(files, lambda: fingerprint(*parts))


def half_fingerprint(tensor):
    """12 digits of a tensor's values in half precision."""
    return hashlib.sha256(tensor.detach().to(torch.float16).contiguous().numpy().tobytes()).hexdigest()[:12]


def part_file(source, part, names):
    """The first of these files that a part of a folder, or of a name on the hub, has."""
    folder = Path(source) / part
    if Path(source).is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"cannot load Stable Diffusion from {source}: {part} has no {' or '.join(names)}")
    reason = None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(str(source), f"{part}/{name}"))
        except huggingface_hub.errors.EntryNotFoundError as error:
            reason = error
    raise reason


def read_some(path, names):
    """The tensors whose names end as these do, of a file that may hold much more: what is not asked for is not read."""
    path = existing_file(path, "checkpoint")
    if what_is(path)[0] == "safetensors":  # whatever its name says
        try:
            with safe_open(path, "pt") as file:
                known = {name: file.get_tensor(name) for name in file.keys() if name.endswith(tuple(names))}  # noqa: SIM118 (it is no dictionary)
        except Exception as error:
            raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    else:
        known = read_checkpoint(path)
    found = [next((tensor for name, tensor in known.items() if name.endswith(wanted)), None) for wanted in names]
    for wanted, tensor in zip(names, found):
        if tensor is None:
            raise UserError(f"{path} has no {wanted}; expected Stable Diffusion v1, such as sd-v1-4.ckpt or a folder with model_index.json")
    return found
