"""What the miniature needs of CLIP: a smaller vocabulary, and its text tower as transformers' `CLIPTextModel`."""

import gzip

import open_clip
from transformers import CLIPTextConfig, CLIPTextModel

from .clip import make_clip_tokenizer, read_merges
from .files import atomic_path


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
