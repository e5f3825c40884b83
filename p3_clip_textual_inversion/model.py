"""The models of P3 and what passes between their formats: CLIP's tokenizer and text tower from open_clip's to transformers'."""

import difflib
import gzip
import zlib
from pathlib import Path

import open_clip
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .files import UserError, atomic_path, first_line

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


def make_clip_tokenizer(merges, context_length=77):
    """transformers' `CLIPTokenizer` with the vocabulary that CLIP numbers its merges by: bytes, bytes that end a word, merges, start, end."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), model_max_length=context_length)


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
