"""Shows that a full-size Stable Diffusion v1 checkpoint loads and runs here, from one file in the original layout, offline.

    python -m p3_clip_textual_inversion.experiments.fullsize runs/fullsize.ckpt     # 2.1 GB of disk, about 9 GB of memory

The file has random weights in half precision, under the names of sd-v1-4.ckpt, and like it carries objects of a package that is not installed.
From it: two steps of textual inversion and two of drawing, at 64x64 pixels.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ..files import MINI, UserError, atomic_path, run, writable_folder
from ..guard import command as command_of
from ..model import CONFIGS, TEXT_PREFIX
from ..provenance import HelpFormatter

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(names, levels=4, layers=2):
    """{diffusers' name: original name} of a UNet."""
    blocks = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        first = level * (layers + 1)
        for j in range(layers):
            blocks[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{first + j + 1}.0"
            blocks[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{first + j + 1}.1"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        for j in range(layers + 1):
            blocks[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{first + j}.0"
            blocks[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{first + j}.1"
        attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in names)
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{2 if attends else 1}.conv"
    return {name: rename(name, blocks, RESNET) for name in names}


def vae_names(names, levels=4):
    """{diffusers' name: original name} of an autoencoder."""
    blocks = {}
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.conv_norm_out": f"{side}.norm_out", f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
                   f"{side}.mid_block.resnets.1": f"{side}.mid.block_2", f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}
    for level in range(levels):
        for j in range(4):
            blocks[f"encoder.down_blocks.{level}.resnets.{j}"] = f"encoder.down.{level}.block.{j}"
            blocks[f"decoder.up_blocks.{level}.resnets.{j}"] = f"decoder.up.{levels - 1 - level}.block.{j}"
        blocks[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        blocks[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
    return {name: rename(name, blocks, {"conv_shortcut": "nin_shortcut"} | (VAE_ATTENTION if "attentions" in name else {})) for name in names}


def rename(name, blocks, inner):
    """The longest block that `name` begins with, and then the part of a layer inside it, by their tables."""
    for block in sorted(blocks, key=len, reverse=True):
        if name.startswith(block + "."):
            rest = name[len(block) + 1:]
            if ".resnets." in block or ".attentions." in block:
                rest = re.sub(r"^(" + "|".join(map(re.escape, inner)) + r")(?=\.)", lambda match: inner[match[0]], rest)
            return f"{blocks[block]}.{rest}"
    return name


def original_layout(unet, vae, text_encoder, dtype=torch.float16):
    """{original name: tensor}: the state dict of a file such as sd-v1-4.ckpt."""
    weights = {}
    for prefix, model, names in (("model.diffusion_model.", unet, unet_names), ("first_stage_model.", vae, vae_names)):
        state = model.state_dict()
        for name, original in names(list(state)).items():
            tensor = state[name].to(dtype)
            square = prefix == "first_stage_model." and re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", original)
            weights[prefix + original] = tensor[:, :, None, None] if square else tensor  # the original has 1x1 convolutions there
    for name, tensor in text_encoder.state_dict().items():
        weights[TEXT_PREFIX + ("" if name.startswith("text_model.") else "text_model.") + name] = tensor.to(dtype)
    return weights


def write_checkpoint(path, weights):
    """A .ckpt as a trainer writes it: the weights, and objects of a package that whoever reads it need not have."""
    module = types.ModuleType("a_trainer_that_is_not_installed.callbacks")
    module.Checkpoint = type("Checkpoint", (), {"__module__": module.__name__})
    callback = module.Checkpoint()
    callback.best_model_score = torch.tensor(0.5)
    sys.modules |= {"a_trainer_that_is_not_installed": types.ModuleType("a_trainer_that_is_not_installed"), module.__name__: module}
    try:
        with atomic_path(path) as temporary:
            torch.save({"state_dict": weights, "epoch": 1, "callbacks": {module.Checkpoint: {"monitor": "loss", "callback": callback}}}, temporary)
    finally:
        del sys.modules[module.__name__], sys.modules["a_trainer_that_is_not_installed"]


def main():
    parser = argparse.ArgumentParser(description="Loads and runs a full-size Stable Diffusion v1 of random weights from one .ckpt.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("path", type=Path, metavar="CKPT", help="the checkpoint; made with random weights if it is not there")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the UNet; auto: bf16 or fp16 where it is fast")
    args = parser.parse_args()
    if not args.path.exists():
        writable_folder(args.path.parent)
        torch.manual_seed(0)
        started = time.perf_counter()
        models = [kind.from_config(kind.load_config(CONFIGS / part)) for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))]
        weights = original_layout(*models, CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder")))
        write_checkpoint(args.path, weights)
        print(f"wrote {args.path}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()) / 1e6:.0f} M parameters, random, "
              f"{args.path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
        del models, weights
    with tempfile.TemporaryDirectory() as folder:
        common, learned, source = ["--side", "64", "--dtype", args.dtype], f"{folder}/learned", MINI / "textual_inversion" / "input.json"
        for module, arguments in (("train", [source, "--checkpoint", args.path, "--output", learned, "--steps", 2, "--batch-size", 2, "--crops", 1,
                                             "--sample-every", 0, *common]),
                                  ("inference", [source, f"{folder}/out", args.path, "--embeddings", learned, "--steps", 2, "--num-images", 1, *common])):
            started = time.perf_counter()
            print(f"== {module}", flush=True)
            if subprocess.run([*command_of(f"p3_clip_textual_inversion.{module}"), *map(str, arguments)], check=False).returncode:
                raise UserError(f"{module} failed with {args.path}")
            print(f"{module}: {time.perf_counter() - started:.0f} s", flush=True)
    unit = 1 if sys.platform == "darwin" else 1024
    print(f"largest memory of a step: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9:.1f} GB")


if __name__ == "__main__":
    run(main)
