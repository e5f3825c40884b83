"""The same network and sampler by an independent implementation, diffusers, with our weights: for the miniature's reference
images, the benchmark and the tests."""

import torch
from diffusers import DDIMScheduler, UNet2DModel


def to_diffusers(model):
    """Our `UNet` as a diffusers `UNet2DModel` with the same weights (diffusers' names, its attention as three linear layers)."""
    config, state = model.config, model.state_dict()
    attention = [level in config.attention for level in range(len(config.widths))]
    theirs = UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=config.widths, layers_per_block=config.num_blocks,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        downsample_padding=1, flip_sin_to_cos=False, freq_shift=0, norm_num_groups=config.groups, norm_eps=1e-5, act_fn="silu",
        attention_head_dim=None, time_embedding_dim=None)
    mapped = {f"conv_in.{p}": state[f"down1.{p}"] for p in ("weight", "bias")}

    def copy(ours, to, names):
        for name, target in names.items():
            for p in ("weight", "bias"):
                if f"{ours}.{name}.{p}" in state:
                    mapped[f"{to}.{target}.{p}"] = state[f"{ours}.{name}.{p}"]

    def block(ours, residual, attended):
        copy(f"{ours}.resblocks", residual, {"norm1": "norm1", "conv1": "conv1", "time.1": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
                                             "skip": "conv_shortcut"})
        if f"{ours}.attention.qkv.weight" in state:
            copy(f"{ours}.attention", attended, {"norm": "group_norm"})
            for p in ("weight", "bias"):
                parts = state[f"{ours}.attention.qkv.{p}"].flatten(1).squeeze(1).chunk(3) if p == "weight" else state[f"{ours}.attention.qkv.{p}"].chunk(3)
                mapped.update({f"{attended}.to_{name}.{p}": part for name, part in zip("qkv", parts)})
                out = state[f"{ours}.attention.out.{p}"]
                mapped[f"{attended}.to_out.0.{p}"] = out.flatten(1) if p == "weight" else out

    number = 2
    for level in range(len(config.widths)):
        for i in range(config.num_blocks):
            block(f"down{number}", f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}")
            number += 1
        if level + 1 < len(config.widths):
            copy(f"down{number}", f"down_blocks.{level}.downsamplers.0", {"0": "conv"})
            number += 1
    block("mid1", "mid_block.resnets.0", "mid_block.attentions.0")
    block("mid2", "mid_block.resnets.1", "")
    number = 1
    for level in range(len(config.widths)):
        for i in range(config.num_blocks + 1):
            block(f"up{number}", f"up_blocks.{level}.resnets.{i}", f"up_blocks.{level}.attentions.{i}")
            number += 1
        if level + 1 < len(config.widths):
            copy(f"up{number}", f"up_blocks.{level}.upsamplers.0", {"1": "conv"})
            number += 1
    for p in ("weight", "bias"):
        mapped |= {f"time_embedding.linear_1.{p}": state[f"time.1.{p}"], f"time_embedding.linear_2.{p}": state[f"time.3.{p}"],
                   f"conv_norm_out.{p}": state[f"out.0.{p}"], f"conv_out.{p}": state[f"out.2.{p}"]}
    theirs.load_state_dict(mapped)
    return theirs.eval()


def scheduler(num_steps=50, clip=True):
    """diffusers' DDIMScheduler, set to the course's convention."""
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="leading", steps_offset=1,
                           set_alpha_to_one=False, clip_sample=clip)
    theirs.set_timesteps(num_steps)
    return theirs


@torch.inference_mode()
def sample(model, x):
    """The final state from noise x [B, 3, H, W], by diffusers alone (`model`: ours, converted here)."""
    theirs, steps = to_diffusers(model), scheduler()
    for t in steps.timesteps:
        x = steps.step(theirs(x, t).sample, t, x, eta=0.0).prev_sample
    return x
