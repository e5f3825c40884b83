"""Files of weights that others wrote: read, never run."""

import torch
from safetensors.torch import load_file

from .files import UserError, first_line, is_plain


class Inert:
    """Stands in for a foreign class in a pickle: takes what it is given, does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def read_checkpoint(path):
    """{name: tensor} of a .safetensors or of a pickle, of which no code is run.

    A published .ckpt also holds objects of the package that trained it: their classes, and any function a pickle would call, become inert stand-ins
    under torch's reader of weights, which knows no other classes; what even that refuses (the module os, say) is refused here."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(type("Inert", (Inert,), {}), name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle makes its reader raise anything, struct.error too
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    named = content.items() if isinstance(content, dict) else ()
    weights = {name: tensor for name, tensor in named if isinstance(name, str) and is_plain(tensor)}
    if not weights:
        raise UserError(f"{path} holds no tensors by name; expected a checkpoint of Stable Diffusion")
    return weights
