"""Files of weights that others wrote: read, never run."""

import io
import math
import pickle
import zipfile

import torch

from ..files import UserError, first_line, note, shown
from ..tensors import FLOATS, find_state_dict, is_plain, read_tensors

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}
AVERAGED = 100  # a published file without averaged weights still has their counters, such as model_ema.decay


def read_checkpoint(path):
    """{name: tensor} of a file, of which no code is run: a published .ckpt also holds objects of the package that trained it."""
    content = read_tensors(path, "checkpoint", "a checkpoint of Stable Diffusion or CLIP", foreign=True)
    named, _ = find_state_dict(content, path, expected="a checkpoint of Stable Diffusion")
    if sum(name.startswith("model_ema.") for name in named) > AVERAGED:
        note(f"{path} also holds averaged weights (model_ema); the plain ones are used, as diffusers does")
    for name, tensor in named.items():
        if not is_plain(tensor):
            raise UserError(f"{path} holds {shown(name)} as a tensor that is not dense; expected plain weights")
        if tensor.ndim and tensor.dtype not in (*FLOATS, torch.int32, torch.int64):  # which number positions
            raise UserError(f"{path} holds {shown(name)} as {str(tensor.dtype).removeprefix('torch.')}; expected floating point (float32, float16 or bfloat16)")
    return named


class Module:
    """A module of a TorchScript archive, of which only the attributes are of interest."""


class ArchiveReader(pickle.Unpickler):
    """The data.pkl of a TorchScript archive. The classes that its `code` would define become `Module`s, tensors are made here, anything else is refused."""

    def __init__(self, archive, root):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return type(name, (Module,), {})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle":  # lists of numbers, and types: what is in them is kept
            return lambda content, *_: content
        known = {("torch._utils", "_rebuild_tensor_v2"): self.tensor, ("collections", "OrderedDict"): dict}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, what):
        _, dtype, key, _, count = what
        record = self.archive.getinfo(f"{self.root}/data/{key}")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"its record {record.filename} has not the size of {count} numbers")
        if key not in self.storages:
            self.storages[key] = torch.frombuffer(bytearray(self.archive.read(record)), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return self.storages[key]

    @staticmethod
    def tensor(storage, offset, size, stride, *_):
        if math.prod(size) > len(storage):  # a stride of 0 makes much of little
            raise pickle.UnpicklingError("a tensor is larger than what is stored of it")
        return torch.as_strided(storage, size, stride, offset)


def read_torchscript(path):
    """({name: tensor}, {name: class of a module}) of a TorchScript archive (what torch.jit.save writes, OpenAI's CLIPs for instance), whose code
    is neither compiled nor run."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).rsplit("/", 1)[0]
            pending, seen, weights, classes = [("", ArchiveReader(archive, root).load())], set(), {}, {}
    except Exception as error:  # a damaged pickle makes its reader raise anything
        raise UserError(f"{path} cannot be read as a TorchScript archive: {first_line(error)}") from None
    while pending:
        prefix, module = pending.pop()
        for name, value in vars(module).items() if isinstance(module, Module) else ():
            if is_plain(value):
                weights[prefix + name] = value
            elif isinstance(value, Module) and id(value) not in seen:
                seen.add(id(value))
                classes[prefix + name] = type(value).__name__
                pending.append((f"{prefix}{name}.", value))
    if not weights:
        raise UserError(f"{path} is a TorchScript archive without weights")
    return weights, classes
