"""CLIP: from whatever people have it in, and the features it gives pictures and captions."""

import difflib
import gzip
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import torch
from open_clip.model import build_model_from_openai_state_dict, convert_to_custom_text_state_dict
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from open_clip.transform import PreprocessCfg, image_transform_v2
from tqdm import tqdm
from transformers import CLIPTokenizer

from .device import autocast
from .files import MINI, UserError, check_file, existing_file, first_line, read_json
from .formats import hugging_face, open_clip_folder
from .formats.checkpoint import read_checkpoint, read_torchscript
from .formats.identity import where_it_lies
from .pictures import read_picture
from .tensors import fill, is_finite, what_is

MOST_LETTERS = 20_000_000  # of a BPE file; open_clip's, with five times the merges that CLIP uses, has 3 million
BPE_FILE = "bpe.txt.gz"  # beside a CLIP with a vocabulary of its own
OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}
DOWNLOADS = ("ViT-B-32", "ViT-L-14")  # OpenAI's files that scripts/download_weights.sh fetches
FOLDER_FILES = (*open_clip_folder.WEIGHTS, *hugging_face.WEIGHTS)


def read_merges(path=None):
    """The merges [(left, right), ...] of a BPE file in open_clip's format; open_clip's own by default, of which CLIP uses 48,894."""
    path = path or default_bpe()
    try:
        check_file(path)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read(MOST_LETTERS)  # a small file may unpack to any size
        merges = [tuple(line.split()) for line in text.split("\n")[1:49152 - 256 - 2 + 1]]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the BPE merges {path}: {first_line(error)}") from None
    if not merges or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} is not a BPE file: each line after the first must have two parts")
    return merges


def make_clip_tokenizer(merges, context_length=77):
    """transformers' `CLIPTokenizer` with the vocabulary that CLIP numbers its merges by: bytes, bytes that end a word, merges, start, end."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), model_max_length=context_length)


def load_clip(name, pretrained=None, device="cpu"):
    """(a CLIP in eval mode, its image transform, its tokenizer); the CLIP has encode_image, encode_text, logit_scale and (SigLIP) logit_bias of open_clip's.

    name: a folder of open_clip's (open_clip_config.json; bpe.txt.gz, where it has a vocabulary of its own) or of Hugging Face's (config.json of a CLIP or
    SigLIP); a file of OpenAI's (TorchScript, opened without executing it); or a model of open_clip, with `pretrained` a tag or any file of weights.
    OpenAI's weights were trained with QuickGELU, and the accuracy suffers silently without: what the file or the tag tells of it corrects a name
    without -quickgelu; a name with it for other weights is refused."""
    check_clip(name, pretrained)
    path, file = Path(name), Path(pretrained or name)
    folder = path.parent if path.is_file() and path.name in FOLDER_FILES else path  # a file among what else a folder has is that folder's
    try:
        if (folder / "open_clip_config.json").is_file():
            bpe_path = str(folder / BPE_FILE) if (folder / BPE_FILE).is_file() else None
            read_merges(bpe_path)  # says what is wrong with it
            clip, transform, tokenizer = open_clip_folder.load(folder, bpe_path)
        elif (folder / "config.json").is_file():
            clip, transform, tokenizer = hugging_face.load(folder)
        elif file.is_file():
            clip, transform, tokenizer = load_weights(file, None if path.is_file() else open_clip_name(name))
        else:
            clip, transform, tokenizer = load_tag(open_clip_name(name), pretrained)
    except UserError:
        raise
    except Exception as error:  # the hub's and the loaders' libraries raise many kinds
        hint = "" if folder.is_dir() or file.is_file() else "; without internet, give a local file or folder" + where_to_get(name)
        raise UserError(f"cannot load the CLIP {name} {pretrained or ''}: {first_line(error)}{hint}") from None
    wrong = next((n for n, tensor in clip.state_dict().items() if not is_finite(tensor)), None)
    if wrong:
        raise UserError(f"the CLIP {name} {pretrained or ''} is damaged: {wrong} has values that are not finite")
    return clip.to(device).eval().requires_grad_(False), transform, tokenizer


def check_clip(name, pretrained=None):
    """A `UserError` for what `load_clip` cannot find, before anything is loaded."""
    path = Path(name)
    if has_weights(name):
        if pretrained:
            raise UserError(f"{name} has weights of its own; leave --pretrained {pretrained} out, or name a model of open_clip in its place")
        return
    known = open_clip_name(name)
    if known not in open_clip.list_models():
        close = difflib.get_close_matches(known, open_clip.list_models(), 3, 0.3)
        raise UserError(f"no such CLIP: {name} is neither a folder with open_clip_config.json or config.json, nor a file, nor a model of open_clip "
                        f"({', '.join(close)}, ...){where_it_lies(path) or where_to_get(name)}")
    tags = open_clip.list_pretrained_tags_by_model(known)
    if not pretrained:
        raise UserError(f"{name} needs --pretrained: a file of weights or one of {', '.join(tags)}{where_to_get(name)}")
    if not Path(pretrained).is_file() and pretrained not in tags:
        raise UserError(f"{name} has no weights {pretrained}: expected a file or one of {', '.join(tags)}")


def has_weights(name):
    """Whether a CLIP is a file or a folder, which has weights of its own, and no model of open_clip."""
    path = Path(name)
    return path.is_file() or any((path / config).is_file() for config in ("open_clip_config.json", "config.json"))


def where_to_get(name):
    """What an error adds for a CLIP that scripts/download_weights.sh has."""
    model = next((model for model in DOWNLOADS if open_clip_name(name).removesuffix(".pt").endswith(model)), None)
    return f"; bash scripts/download_weights.sh {model} fetches hw2_data/weights/{model}.pt, which --model takes as it is" if model else ""


def reads_thumbnails(name):
    """Whether a CLIP is a miniature, by what its folder tells of it, wherever that lies: it reads pictures of less than 128 pixels. Such know drawings only."""
    try:
        return read_json(Path(name) / "open_clip_config.json")["model_cfg"]["vision_cfg"]["image_size"] < 128
    except (UserError, OSError, LookupError, TypeError):
        return False


def open_clip_name(name):
    """ViT-B/32, as OpenAI writes, is ViT-B-32 to open_clip."""
    return str(name).replace("/", "-")


def load_tag(name, tag):
    """What `load_clip` gives of a model of open_clip with published weights."""
    quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    check_activation(name, quick, f"the weights {tag}")
    clip, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag, force_quick_gelu=quick)
    return clip, transform, open_clip.get_tokenizer(name)


def check_activation(name, quick, weights):
    """A `UserError` where the name wants QuickGELU of weights that were trained with GELU. quick: what they were trained with, None if they do not tell."""
    if quick is False and open_clip.get_model_config(name).get("quick_gelu", False):
        raise UserError(f"{name} has QuickGELU, but {weights} were trained with GELU; use {name.replace('-quickgelu', '')}")


def load_weights(path, name=None):
    """What `load_clip` gives of one file of weights: OpenAI's TorchScript, or a state_dict in open_clip's or Hugging Face's names.

    name: the model of open_clip that it is; without, the file must tell its activation (QuickGELU or GELU), as OpenAI's do."""
    state, quick = read_weights(path)
    if name:
        check_activation(name, quick, f"the weights in {path}")
        quick = open_clip.get_model_config(name).get("quick_gelu", False) or bool(quick)
    elif quick is None:
        raise UserError(f"{path} does not tell whether it was trained with QuickGELU: give the model of open_clip that it is by --model and the file by "
                        "--pretrained, or a folder with its config.json")
    if any(key.startswith("vision_model.") for key in state):
        clip = hugging_face.HuggingFace(hugging_face.model_of_state(state, quick, path))
        return clip, image_transform_v2(PreprocessCfg(size=clip.visual.image_size), is_train=False), open_clip.SimpleTokenizer(context_length=77)
    if name:
        clip = open_clip.create_model(name, force_quick_gelu=quick)
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        for key in ("logit_scale", "logit_bias"):  # a number, or a list of one
            if key in state and getattr(clip, key) is not None:
                state[key] = state[key].reshape(getattr(clip, key).shape)
        fill(clip, state, path)
        return clip, image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False), open_clip.get_tokenizer(name)
    clip = build_model_from_openai_state_dict(state, quick_gelu=quick, cast_dtype=torch.float32).float()
    transform = image_transform_v2(PreprocessCfg(size=clip.visual.image_size), is_train=False)
    return clip, transform, open_clip.SimpleTokenizer(context_length=clip.context_length)


def read_weights(path):
    """({name: tensor} in open_clip's or Hugging Face's names, whether they were trained with QuickGELU or None where the file does not tell)."""
    path = existing_file(path, "file of weights")
    if what_is(path)[0] == "torchscript":
        state, classes = read_torchscript(path)
        activations = {kind for module, kind in classes.items() if module.endswith(".gelu")}
        quick = "QuickGELU" in activations or None if len(activations) != 1 else activations == {"QuickGELU"}
    else:
        state, quick = read_checkpoint(path), None
    if all(key.startswith("module.") for key in state):  # of a training on several GPUs
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if state.keys() >= OPENAI_MARKS:  # beside the weights in every file of OpenAI's and of its kind
        quick = True if quick is None else quick
    return {key: tensor for key, tensor in state.items() if key not in OPENAI_MARKS and not key.endswith(("attn_mask", "position_ids"))}, quick


class Attention(torch.nn.MultiheadAttention):
    """torch's attention of a sequence to itself, by as few products as it takes. Under autocast torch's own copies the weights once for each picture, and a
    ViT-B/32 in bf16 is eight times as slow. The weights keep their names."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
        if query is not key or key is not value or not self.batch_first or key_padding_mask is not None or need_weights:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
        projected = torch.nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def compute_in(clip, dtype):
    """Prepares the image tower for `image_features` in a number format of 16 bits: products in it, sums, norms and what passes between layers in float32."""
    if dtype == torch.float32:
        return
    for module in (clip.visual if isinstance(clip.visual, torch.nn.Module) else clip.model.vision_model).modules():
        if type(module) is torch.nn.MultiheadAttention and module.in_proj_weight is not None:
            module.__class__ = Attention
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(dtype)
        elif isinstance(module, Attention):
            module.in_proj_weight.data, module.in_proj_bias.data = module.in_proj_weight.data.to(dtype), module.in_proj_bias.data.to(dtype)


@torch.inference_mode()
def text_features(clip, tokenizer, captions, device):
    """Normalised features [N, dim] float32 of captions."""
    batches = [tokenizer(captions[i:i + 256]).to(device) for i in range(0, len(captions), 256)]
    return torch.cat([torch.nn.functional.normalize(clip.encode_text(batch).float(), dim=-1) for batch in batches])


def ensemble(features):
    """Of normalised features [..., captions, dim] of each class's captions: one direction a class, their mean, normalised again."""
    return torch.nn.functional.normalize(features.mean(-2), dim=-1)


def text_classifier(clip, tokenizer, labels, templates, device):
    """One direction per label, [labels, dim] float32 of length 1."""
    captions = [template.format(label) for label in labels for template in templates]
    return ensemble(text_features(clip, tokenizer, captions, device).unflatten(0, (len(labels), len(templates))))


def load_pictures(paths, transform, batch_size):
    """Batches [B, 3, H, W] of pictures, decoded by threads while the one before is computed."""
    with ThreadPoolExecutor() as pool:
        ahead = None
        for start in range(0, len(paths) + batch_size, batch_size):
            batch, ahead = ahead, [pool.submit(lambda path: transform(read_picture(path)), path) for path in paths[start:start + batch_size]]
            if batch:
                yield torch.stack([future.result() for future in batch])


@torch.inference_mode()
def image_features(clip, batches, device, dtype, total=None):
    """Normalised features [N, dim] float32 of batches of pictures."""
    features = []
    with tqdm(total=total, unit="img", desc="reading pictures", disable=total is None) as bar:
        for batch in batches:
            with autocast(device, dtype):
                features.append(clip.encode_image(batch.to(device)).float())
            bar.update(len(batch))
    features = torch.nn.functional.normalize(torch.cat(features), dim=-1)
    if not features.isfinite().all():
        raise UserError("CLIP's features of a picture are not finite; try --dtype fp32")
    return features


class Grader:
    """A CLIP with its transform and tokenizer; features of length 1, float32, on the CPU."""

    def __init__(self, model=MINI / "clip", pretrained=None, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype
        self.clip, self.transform, self.tokenizer = load_clip(str(model), pretrained, device)
        compute_in(self.clip, dtype)
        self.files_read = 0

    @property
    def logits(self):
        """(scale, bias) of the cosines: probabilities are their softmax over the captions, or with a bias, as SigLIP has, each one's own sigmoid."""
        bias = getattr(self.clip, "logit_bias", None)
        return self.clip.logit_scale.exp().item(), None if bias is None else bias.item()

    def of_files(self, paths, batch_size=64, progress=False):
        """[len(paths), dim]"""
        self.files_read += len(paths)
        return image_features(self.clip, load_pictures(paths, self.transform, batch_size), self.device, self.dtype, len(paths) if progress else None).cpu()

    def of_pictures(self, pictures):
        """PIL images -> [len(pictures), dim]"""
        batches = torch.stack([self.transform(picture) for picture in pictures]).split(64)
        return image_features(self.clip, batches, self.device, self.dtype).cpu()

    def of_texts(self, texts):
        """[len(texts), dim]"""
        return text_features(self.clip, self.tokenizer, texts, self.device).cpu()
