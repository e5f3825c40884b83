"""Custom Diffusion (Kumari et al. 2023): beside new words, the key and value projections of every cross-attention learn. Their files and their merging."""

import re

import torch

from .files import UserError, note
from .tensors import check_numbers, read_tensors, save_tensors


def projections(unet):
    """{name of the weight: Linear} of the keys and values that read the text."""
    return {f"{name}.weight": module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}


def weights_of(unet):
    """{name: weight [out, dim] float32, on the CPU}"""
    return {name: module.weight.detach().float().cpu().clone() for name, module in projections(unet).items()}


def set_projections(unet, weights):
    """Puts what `weights_of` or `read_projections` gave into a UNet."""
    for name, module in projections(unet).items():
        module.weight.data.copy_(weights[name])


def tell_projections(given, origin):
    """A note where words learned together with projections, and none are `given` to draw with. origin: {word: (its file, its metadata)}"""
    words = [word for word, (_, metadata) in origin.items() if metadata.get("custom_diffusion") == "True"]
    if words and not given:
        note(f"{', '.join(words)} learned together with projections (--custom-diffusion): without them, which inference's --projections takes, they show less "
             "of their concepts")


def save_projections(path, weights, metadata=None):
    """Only what changed, under diffusers' own names: `unet.load_state_dict(load_file(path), strict=False)` takes it."""
    save_tensors(path, weights, metadata)


def read_projections(path, unet):
    """{name: weight} of a file of `save_projections`, or of Custom Diffusion's weights as diffusers (pytorch_custom_diffusion_weights.bin) or the paper's
    authors (delta*.bin, delta*.ckpt) save them; checked against a UNet."""
    content = read_tensors(path, "file of projections", "keys and values of Custom Diffusion", foreign=True)
    for key in ("unet", "state_dict"):  # the authors' own: beside them lie the words
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, no projections by name")
    found = {diffusers_name(name): value for name, value in content.items() if isinstance(name, str)}
    weights = {}
    for name, module in projections(unet).items():
        weight = found.get(name)
        if isinstance(weight, dict) and all(isinstance(weight.get(part), torch.Tensor) for part in "uv"):  # the authors' compressed ones, of low rank
            weight = module.weight.detach().float().cpu() + weight["u"].float() @ weight["v"].float()
        if not isinstance(weight, torch.Tensor) or weight.shape != module.weight.shape:
            shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else "missing"
            raise UserError(f"{path} does not fit this model: {name} is {shape}, expected {tuple(module.weight.shape)}")
        check_numbers(name, weight, path)
        weights[name] = weight.float()
    others = [name for name in found if name not in weights and name.endswith((".weight", ".bias"))]
    if others:
        raise UserError(f"{path} also changes {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}; expected keys and values of "
                        "cross-attention only")
    return weights


def diffusers_name(name):
    """The name in diffusers' UNet of a key or value that diffusers' processors, or the original layout, call otherwise."""
    name = re.sub(r"processor\.(to_[kv])_custom_diffusion", r"\1", name.removeprefix("unet.")).removeprefix("model.diffusion_model.")
    place = re.match(r"(input|output)_blocks\.(\d+)\.1\.|middle_block\.1\.", name)
    if not place:
        return name
    rest = name[place.end():]
    if place[1] is None:
        return f"mid_block.attentions.0.{rest}"
    number = int(place[2])
    block, layer = divmod(number - 1, 3) if place[1] == "input" else divmod(number, 3)
    return f"{'down' if place[1] == 'input' else 'up'}_blocks.{block}.attentions.{layer}.{rest}"


def merge(base, tuned, targets, regular, ridge=1e-4):
    """Several separately tuned sets of projections in one, by the paper's constrained least squares (its eq. 4 and 5).

    For each projection: the W nearest to W0 on ordinary captions, min |W C_reg' - W0 C_reg'|, that maps each concept's captions just as the set tuned
    for it does, W C' = V: W = W0 + (V - W0 C') (d C')^-1 d with d = C (C_reg' C_reg)^-1.

    base: {name: W0 [out, dim]}; tuned: a list of such, one for each concept; targets: a list of hidden states [n_i, dim] of each concept's captions, of few
    tokens in all (at most dim); regular: hidden states [N, dim] of ordinary captions. ridge: of the covariance's mean diagonal, against bad conditioning."""
    C, regular = torch.cat(targets).double(), regular.double()
    covariance = regular.T @ regular
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
    d = torch.linalg.solve(covariance, C.T).T  # [n, dim]
    merged = {}
    for name, W0 in base.items():
        V = torch.cat([weights[name].double() @ target.double().T for weights, target in zip(tuned, targets)], dim=1)  # [out, n]
        difference = V - W0.double() @ C.T
        merged[name] = (W0.double() + difference @ torch.linalg.pinv(d @ C.T) @ d).float()
    return merged
