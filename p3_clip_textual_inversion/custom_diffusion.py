"""Custom Diffusion (Kumari et al. 2023): beside new words, the key and value projections of every cross-attention learn. Their files and their merging."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .files import UserError, atomic_path


def projections(unet):
    """{name of the weight: Linear} of the keys and values that read the text."""
    return {f"{name}.weight": module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}


def weights_of(unet):
    """{name: weight [out, dim] float32, on the CPU}"""
    return {name: module.weight.detach().float().cpu().clone() for name, module in projections(unet).items()}


def set_weights(unet, weights):
    """Puts what `weights_of` or `read_weights` gave into a UNet."""
    for name, module in projections(unet).items():
        module.weight.data.copy_(weights[name])


def save_weights(path, weights, metadata=None):
    """Only what changed, under diffusers' own names: `unet.load_state_dict(load_file(path), strict=False)` takes it."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, metadata={"format": "pt", **(metadata or {})})


def read_weights(path, unet):
    """{name: weight} of a file that `save_weights` wrote, checked against a UNet."""
    path = Path(path)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read the projections {path}: {error}") from None
    for name, module in projections(unet).items():
        if name not in weights or weights[name].shape != module.weight.shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise UserError(f"{path} does not fit this model: {name} is {found}, expected {tuple(module.weight.shape)}")
    return weights


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
