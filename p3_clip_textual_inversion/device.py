"""Which device and which number format to compute in."""

import torch

from .files import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name="auto"):
    """"auto" is the first GPU if there is one, otherwise the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that can be named may still compute nothing: "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def cpu_has_bf16():
    """Whether this processor multiplies bf16 natively (AVX-512 BF16 or AMX). Elsewhere bf16 is emulated, and very slow."""
    try:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    except AttributeError:  # torch before 2.12
        return any(getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("avx512_bf16", "amx_tile"))


def pick_dtype(name, device):
    """"auto" is bf16 where the device computes in it natively, fp16 on older GPUs, otherwise fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
