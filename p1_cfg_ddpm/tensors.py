"""Tensors in files, which may come from anywhere: read without running any code, known by their first bytes, checked before they are used."""

import hashlib
import json
import os
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import UserError, atomic_path, existing_file, first_line, note, parse_json, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights and noises are; fp8 and integers would need their scales
HEADER = 100_000_000  # bytes; safetensors' own limit
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # torch.save before 1.6 begins with its magic number, pickled
SIGNATURES = {b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`, or download it from the page of the file",
              b"\x1f\x8b": "a gzip archive: unpack it", b"7z\xbc\xaf": "a 7z archive: unpack it", b"\xfd7zXZ": "an xz archive: unpack it",
             b"Rar!": "a RAR archive: unpack it",
              b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture", b"RIFF": "a picture or a sound", b"%PDF": "a PDF document",
              b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF model, which is quantised", b"\x89HDF": "an HDF5 file (Keras)"}
PARAMETERS = "torch.nn.modules.container.ParameterDict"
NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "unet",
          "ema", "model_ema", "ema_model", "ema_state_dict", "params_ema")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "unet.", "diffusion_model.", "ema_model.")


def what_is(path):
    """(kind, in words) of a file by its first bytes, whatever its name. Kinds: "torch" (torch.save's zip), "legacy" (before 1.6), "pickle" (a plain one),
    "torchscript", "safetensors", and "" for what holds no tensors that are read here, which the words tell."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)
        file.seek(max(size - 70_000, 0))
        tail = file.read()
    if not head.strip(b"\0"):
        return "", "empty" if not size else "nothing but zeros: its download or its disk failed"
    # before all others: a header of 640 bytes begins as a pickle does, one of 19,280 as a zip archive
    if size > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < HEADER:
        return "safetensors", "a safetensors file"
    for signature, words in SIGNATURES.items():
        if head.startswith(signature):
            return "", words
    if head.startswith(b"PK"):
        return kind_of_zip(path, tail)
    if head.startswith(LEGACY):
        return "legacy", "a file of torch.save before version 1.6"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle", "a pickle"
    if head[257:262] == b"ustar":
        return "", "a tar archive: unpack it"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "", "a web page, not the file: the download asks for a confirmation or a login"
    if text.startswith((b"{", b"[")):
        return "", "a text of JSON"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "", "a text"
    return "", "none of the kinds known here, or damaged"


def kind_of_zip(path, tail):
    """What a zip archive holds."""
    if b"PK\x05\x06" not in tail:
        return "", "a zip archive without its end: the download was broken off"
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        return "", f"a damaged zip archive ({first_line(error)})"
    names = {name.split("/", 1)[-1] for name in (info.filename for info in infos)}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript", "a TorchScript archive, a program of torch.jit"
    if "data.pkl" in names:
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            return "", "packed once more: torch.save does not compress, and a small file could become of any size"
        return "torch", "a file of torch.save"
    if infos and all(info.filename.endswith(".npy") for info in infos):
        return "", "a NumPy archive (.npz)"
    return "", "a zip archive without tensors: unpack it, if the file is inside"


def read_tensors(path, what, expected="", foreign=False):
    """The content of a file: of a safetensors {name: tensor}, of torch.save's whatever plain containers it holds. Tensors are on the CPU.

    No code of the file is run. foreign: classes of packages that are not installed, as a published checkpoint holds them beside its tensors, become
    inert stand-ins, in place of a refusal. expected: what would be right, for the messages."""
    path = existing_file(path, what)
    hint = f"; expected {expected}" if expected else ""
    try:
        kind, words = what_is(path)
        if kind == "safetensors":
            return read_safetensors(path)[0]
        if kind == "torchscript" or not kind:
            raise UserError(f"{path} cannot be read as a {what}: it is {words}{hint}")
        content = unpickle(path, kind, foreign)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle makes its reader raise anything, struct.error too
        raise UserError(f"{path} cannot be read as a {what}: it is {reason(error)}{hint}") from None
    check_bombs(content, path)
    return content


def unpickle(path, kind, foreign):
    """torch's reader of weights, which builds tensors and plain containers only."""
    inert = []
    if foreign and kind != "legacy":  # whose classes torch cannot list
        inert = [(Parameters if name == PARAMETERS else type("Inert", (Inert,), {}), name)
                 for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
    with torch.serialization.safe_globals(inert):
        if kind == "torch" and foreign and path.suffix != ".safetensors":  # a large file: what is not used is not read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with open(path, "rb") as file:  # torch would believe a name that ends in .safetensors
            return torch.load(file, map_location="cpu", weights_only=True)


class Inert:
    """Stands in for a foreign class in a pickle, and for any function that it would call: takes what it is given, does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


class Parameters(dict):
    """Stands in for torch's ParameterDict, a module, in which the authors' code of textual inversion saves its words."""

    def __setstate__(self, state):
        self.update(state["_parameters"])


def reason(error):
    """Why torch's reader refused a file, not in torch's own words, which advise to read it in a way that runs code."""
    text = str(error)
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", text)
    if found:
        return f"a pickle of objects ({found[1]}), which is not read, as that would run code: save its state_dict"
    if "weights_only" in text or "Unsupported" in text or "Weights only" in text:
        return "a pickle of more than tensors, which is not read, as that would run code: save its state_dict"
    return f"damaged or no such file ({first_line(error)})"


def read_safetensors(path):
    """({name: tensor}, metadata {str: str}) of a safetensors file."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(length)
    if len(header) < length:
        raise UserError(f"{path} cannot be read: it is a safetensors file without its end: the download was broken off")
    try:
        entries = parse_json(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
        if 8 + length + end > size:
            raise UserError(f"{path} cannot be read: it is a safetensors file of {size:,} bytes in place of {8 + length + end:,}: the download was broken off")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read: it is a damaged safetensors file ({first_line(error)})") from None


def tensors_in(content):
    """(name, tensor) of every tensor in nested containers, each container once."""
    seen, pending = set(), [("", content)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending += [(f"{name}.{key}" if name else str(key), part) for key, part in (value.items() if isinstance(value, dict) else enumerate(value))]


def check_bombs(content, path):
    """Refuses tensors of more numbers than the file holds: a stride of 0 makes a few bytes as large as one likes."""
    for name, tensor in tensors_in(content):
        if is_plain(tensor) and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path} holds {shown(name) or 'a tensor'} as {tuple(tensor.shape)} values, but is too small for them")


def is_plain(value):
    """Whether it is a tensor of numbers in memory: not sparse, nested, quantised or without data, as a file may have them too."""
    return isinstance(value, torch.Tensor) and not (value.is_nested or value.is_quantized or value.is_meta) and value.layout == torch.strided


def is_finite(tensor):
    """Whether every number is: one pass, without a copy."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(value.isfinite() for value in tensor.detach().aminmax())


def tensor_fingerprint(tensor):
    """16 hexadecimal digits of a tensor's shape and values, as float32: the same for the same word in a file of any format."""
    values = tensor.detach().float().cpu().contiguous()
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()[:16]


def check_numbers(name, tensor, path):
    """A `UserError` unless it is a plain tensor of finite floating-point numbers, as weights, noises and embeddings are."""
    if not is_plain(tensor):
        raise UserError(f"{path} holds {name} as {type(tensor).__name__ if not isinstance(tensor, torch.Tensor) else 'a tensor that is not dense'}; "
                        "expected a plain (dense) tensor")
    if tensor.dtype not in FLOATS:
        raise UserError(f"{path} holds {name} as {str(tensor.dtype).removeprefix('torch.')}; expected floating point (float32, float16 or bfloat16)")
    if not is_finite(tensor):
        raise UserError(f"{path} holds values in {name} that are not finite; expected numbers")


def find_state_dict(content, path, own=None, expected="a state dict"):
    """({name: tensor}, which part it is) of a file's content: itself, or what is under `state_dict`, `model`, ..., without the prefixes that wrappers add.

    own: the names that the network has; of several candidates that one is taken of which most fit, the plain ones before averaged ones, with a note."""
    candidates = {"": content}
    for key in NESTED:
        for place, value in list(candidates.items()):
            if isinstance(value, dict) and isinstance(value.get(key), dict):
                candidates[f"{place}.{key}".lstrip(".")] = value[key]
    found = {}
    for place, value in candidates.items():
        items = value.items() if isinstance(value, dict) else ()
        tensors = {name: tensor for name, tensor in items if isinstance(name, str) and isinstance(tensor, torch.Tensor)}
        if tensors:
            found[place] = strip_wrappers(tensors, own)
    if not found:
        raise UserError(f"{path} holds no tensors by name; expected {expected}")
    best = max(found, key=lambda place: (sum(name in found[place] for name in own or ()), len(found[place])))
    others = [place for place in found if place != best and found[place].keys() == found[best].keys()]
    if others:
        note(f"{path} holds the same weights more than once, as {', '.join([best, *others])}; those of {best} are used")
    return found[best], best


def strip_wrappers(tensors, own=None):
    """The tensors without a prefix that all their names have and the network's have not: DataParallel's module., torch.compile's _orig_mod., ..."""
    own, again = set(own or ()), True
    while again and not own & set(tensors):
        again = False
        for prefix in WRAPPERS:
            inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if inside and (len(tensors) - len(inside) <= min(2, len(inside) // 2) or own & set(inside)):  # averaging counts its updates (n_averaged)
                tensors, again = inside, True
                break
    return tensors


def fill(module, state_dict, path):
    """Strictly puts a state dict's tensors into a module, which may be without data (on the device "meta"), as the dtypes that it has.
    Names the first offending tensors: missing, unexpected, of another shape, of integers or complex, not finite."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state_dict]
    problems += [f"unexpected {shown(name)}" for name in state_dict if name not in own]
    problems += [f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(own[name].shape)}"
                 for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit the network: {'; '.join(problems[:3])}{more}")
    for name, tensor in state_dict.items():
        if own[name].is_floating_point():
            check_numbers(name, tensor, path)
    module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state_dict.items()}, assign=True)
    return module


def save_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as safetensors; the same content is the same file. metadata: {str: str}"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        mode = os.stat(temporary).st_mode
        save_file(tensors, temporary, {"format": "pt", **(metadata or {})})
        os.chmod(temporary, mode)  # safetensors puts a file of its own there, which nobody else may read
        sort_metadata(temporary)


def sort_metadata(path):
    """safetensors writes the metadata of a header in an order of chance, and results know what they were made of by its file's bytes."""
    with open(path, "r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entries = json.loads(file.read(length))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:  # as long as it was, for what lies behind it stays where it is
            file.seek(8)
            file.write(text)


def save_weights(path, state_dict, metadata):
    """Writes a state dict as safetensors; `metadata` (JSON-able) goes into its header under "config"."""
    save_tensors(path, state_dict, {"config": json.dumps(metadata)})


def load_weights(path):
    """Reads a file written by `save_weights`. Returns (state dict, metadata)."""
    path = existing_file(path, "checkpoint")
    kind, words = what_is(path)
    if kind != "safetensors":
        raise UserError(f"{path} is not a readable safetensors file: it is {words}; expected one that this project wrote")
    tensors, metadata = read_safetensors(path)
    try:
        return tensors, parse_json(metadata["config"])
    except (LookupError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} has no configuration in its header; expected a file written by this project") from None
