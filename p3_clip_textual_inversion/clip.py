"""CLIP: from whatever people have it in, and the features it gives pictures and captions."""

import difflib
import gzip
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from tqdm import tqdm
from transformers import CLIPTokenizer

from .data import read_picture
from .files import UserError, first_line
from .world import MINI

BPE_FILE = "bpe.txt.gz"  # beside a CLIP with a vocabulary of its own


def read_merges(path=None):
    """The merges [(left, right), ...] of a BPE file in open_clip's format; open_clip's own by default, of which CLIP uses 48,894."""
    try:
        with gzip.open(path or default_bpe(), "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1:49152 - 256 - 2 + 1]]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"cannot read the BPE merges {path}: {error}") from None
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} is not a BPE file: each line after the first must have two parts")
    return merges


def make_clip_tokenizer(merges, context_length=77):
    """transformers' `CLIPTokenizer` with the vocabulary that CLIP numbers its merges by: bytes, bytes that end a word, merges, start, end."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), model_max_length=context_length)


def load_clip(name, pretrained=None, device="cpu"):
    """(open_clip model in eval mode, its image transform, its tokenizer).

    name: a model of open_clip, with `pretrained` a tag or a file of weights; or a local folder with open_clip_config.json and weights (and
    bpe.txt.gz, where it has a vocabulary of its own). OpenAI's weights were trained with QuickGELU: a name without -quickgelu is corrected, since
    the accuracy would suffer silently; a name with it for other weights is refused."""
    folder, options, tokenizer_options = Path(name), {}, {}
    if (folder / "open_clip_config.json").is_file():
        name, pretrained = f"local-dir:{folder.resolve()}", None
        if (folder / BPE_FILE).is_file():
            read_merges(folder / BPE_FILE)  # says what is wrong with it
            tokenizer_options["bpe_path"] = str(folder / BPE_FILE)
    else:
        if name not in open_clip.list_models():
            close = difflib.get_close_matches(str(name), open_clip.list_models(), 3, 0.3)
            raise UserError(f"no such CLIP: {name} is neither a folder with open_clip_config.json nor a model of open_clip ({', '.join(close)}, ...)")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not pretrained:
            raise UserError(f"{name} needs --pretrained: a file of weights or one of {', '.join(tags)}")
        if not Path(pretrained).is_file():
            if pretrained not in tags:
                raise UserError(f"{name} has no weights {pretrained}: expected a file or one of {', '.join(tags)}")
            trained_quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
            quick = open_clip.get_model_config(name).get("quick_gelu", False)
            if quick and not trained_quick:
                raise UserError(f"{name} has QuickGELU, but the weights {pretrained} were trained with GELU; use {name.replace('-quickgelu', '')}")
            options["force_quick_gelu"] = trained_quick and not quick
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device, **options)
    except Exception as error:  # the hub's and the loaders' libraries raise many kinds
        raise UserError(f"cannot load the CLIP {name} {pretrained or ''}: {first_line(error)}; without internet, give a local file or folder") from None
    return model.eval().requires_grad_(False), transform, open_clip.get_tokenizer(name, **tokenizer_options)


def text_classifier(clip, tokenizer, labels, templates, device):
    """One direction per label, [labels, dim] float32 of length 1: the mean of its captions' normalised features, normalised again."""
    with torch.inference_mode():
        captions = [template.format(label) for label in labels for template in templates]
        features = torch.cat([clip.encode_text(tokenizer(captions[i:i + 256]).to(device), normalize=True).float() for i in range(0, len(captions), 256)])
        return torch.nn.functional.normalize(features.reshape(len(labels), len(templates), -1).mean(1), dim=-1)


def load_pictures(paths, transform, batch_size):
    """Batches [B, 3, H, W] of pictures, decoded by threads while the one before is computed."""
    with ThreadPoolExecutor() as pool:
        ahead = None
        for start in range(0, len(paths) + batch_size, batch_size):
            batch, ahead = ahead, [pool.submit(lambda path: transform(read_picture(path)), path) for path in paths[start:start + batch_size]]
            if batch:
                yield torch.stack([future.result() for future in batch])


def image_features(clip, batches, device, dtype, total=None):
    """Normalised features [N, dim] float32 of batches of pictures."""
    features = []
    with torch.inference_mode(), tqdm(total=total, unit="img", desc="reading pictures", disable=total is None) as bar:
        for batch in batches:
            with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
                features.append(clip.encode_image(batch.to(device)).float())
            bar.update(len(batch))
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)


class Grader:
    """A CLIP with its transform and tokenizer; features of length 1, float32, on the CPU."""

    def __init__(self, model=MINI / "clip", pretrained=None, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype
        self.clip, self.transform, self.tokenizer = load_clip(str(model), pretrained, device)

    def of_files(self, paths):
        """[len(paths), dim]"""
        return image_features(self.clip, load_pictures(paths, self.transform, 64), self.device, self.dtype).cpu()

    def of_pictures(self, pictures):
        """PIL images -> [len(pictures), dim]"""
        batches = torch.stack([self.transform(picture) for picture in pictures]).split(64)
        return image_features(self.clip, batches, self.device, self.dtype).cpu()

    @torch.inference_mode()
    def of_texts(self, texts):
        """[len(texts), dim]"""
        return self.clip.encode_text(self.tokenizer(texts).to(self.device), normalize=True).float().cpu()
