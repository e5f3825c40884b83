"""A CUDA device where there is none, to test on: tensors that say they are on cuda:0 and compute on the CPU.

It refuses what a real GPU refuses (tensors of two devices in one operation, a generator of another device, .numpy() of a GPU's tensor), follows CUDA's
autocast, and counts what a real one would wait for: values that are read, and copies in either direction that are not "non_blocking".

Not reached: real kernels and their numbers, speed, memory, cuDNN, NCCL, torch.compile, the range of fp16. `inference_mode` becomes `no_grad`."""

import collections
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda:0")
WAITS = collections.Counter()  # {"what file:line": how often a GPU would have been waited for}
GENERATORS = {}  # {generator: its device's type}
READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.unique", "aten._unique", "aten.masked_select")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put")
NO_SCALARS = ("aten.cat", "aten.stack", "aten.mm", "aten.addmm", "aten.bmm", "aten.convolution", "aten.embedding")  # elsewhere a CPU's scalar will do
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.convolution")  # and its backward
HALVES = ({torch.float16}, {torch.bfloat16})
RESHAPED_IN_PLACE = ("aten.t_.", "aten.squeeze_.", "aten.unsqueeze_.", "aten.transpose_.", "aten.resize_.", "aten.resize_as_.", "aten.set_.")


class CudaTensor(torch.Tensor):
    """Holds a CPU tensor, `elem`, and says that it is on cuda:0."""

    @staticmethod
    def __new__(cls, elem):
        own = torch.Tensor._make_wrapper_subclass(cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
                                                  layout=elem.layout, device=CUDA, requires_grad=False)
        own.elem = elem.detach() if elem.requires_grad else elem
        return own

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.elem = new.elem

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return self.detach().elem.clone().__reduce_ex__(protocol)

    def __repr__(self, **_):
        return f"CudaTensor({self.elem!r})"


class Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def waited(what):
    """Counts a wait, by the project's line that caused it."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(f"{ROOT}/p"):
        frame = frame.f_back
    WAITS[f"{what} {os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}" if frame else what] += 1


def unwrap(value):
    """The CPU's tensors in an argument: a tensor, a list of some, or something else."""
    if isinstance(value, CudaTensor):
        return value.elem
    return [unwrap(item) for item in value] if isinstance(value, (list, tuple)) else value


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@functools.cache
def declared_by(func):
    """(name, names of the arguments) of an operation."""
    return str(func), [a.name for a in func._schema.arguments]


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def compute(func, args, kwargs):
    """One operation, on the CPU, with the devices checked as CUDA checks them."""
    name, declared = declared_by(func)
    kwargs = dict(kwargs)
    if "device" in declared[:len(args)]:  # given by position
        at = declared.index("device")
        kwargs |= zip(declared[at:len(args)], args[at:])
        args = args[:at]
    tensors = list(tensors_in((*args, *kwargs.values())))
    wrapped, plain = [a for a in tensors if isinstance(a, CudaTensor)], [a for a in tensors if not isinstance(a, CudaTensor)]
    device, generator = kwargs.get("device"), kwargs.get("generator")
    drawn_on = "cpu" if generator is None else GENERATORS.get(generator._cdata, "cpu")
    if not wrapped and not is_cuda(device):
        if drawn_on == "cuda":
            raise RuntimeError(f"Expected a 'cpu' device type for generator but found 'cuda' ({name})")
        return func(*args, **kwargs)
    if name.startswith(RESHAPED_IN_PLACE):
        raise NotImplementedError(name)
    to_cuda = True
    if "device" in kwargs:
        to_cuda = is_cuda(device) if device is not None else bool(wrapped)
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
    if generator is not None and (drawn_on == "cuda") != to_cuda:
        raise RuntimeError(f"Expected a '{'cuda' if to_cuda else 'cpu'}' device type for generator but found '{drawn_on}' ({name})")
    if name.startswith(("aten._to_copy", "aten.to.")):
        if not kwargs.get("non_blocking") and ((wrapped and "device" in kwargs and not to_cuda) or (plain and to_cuda)):
            waited("copy")
    elif name.startswith("aten.copy_"):
        if wrapped and plain and plain[0].dim() and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
            waited("copy")
        unwrap(args[0]).copy_(unwrap(args[1]))
        return args[0]
    elif name.startswith(READS):
        waited(name.removeprefix("aten."))
    if plain and not name.startswith(("aten._to_copy", "aten.to.", "aten.equal")):
        refuse_mixed(name, args, plain, tensors)
    out = on_cpu(func, name, [unwrap(value) for value in args], {key: unwrap(value) for key, value in kwargs.items()})
    if name == "aten.to.other":
        to_cuda = isinstance(args[1], CudaTensor)
    elif name.startswith("aten.to.") and "device" not in kwargs:
        to_cuda = bool(wrapped)
    schema = func._schema
    written = [value for a, value in zip(schema.arguments, [*args, *(kwargs.get(a.name) for a in schema.arguments[len(args):])])
               if a.alias_info is not None and a.alias_info.is_write]
    if written and schema.returns and schema.returns[0].alias_info is not None and schema.returns[0].alias_info.is_write:
        return written[0] if len(schema.returns) == 1 else tuple(written)  # in place: the same objects
    known = {} if schema.name.endswith("detach") else {id(a.elem): a for a in wrapped}

    def wrap(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(wrap, value))
        if not isinstance(value, torch.Tensor) or isinstance(value, CudaTensor):
            return value
        return known[id(value)] if id(value) in known else CudaTensor(value)

    return wrap(out) if to_cuda else out


def on_cpu(func, name, args, kwargs):
    """One operation on a CPU's tensors. Products in half precision are computed in fp32 and rounded, as a GPU does: a CPU that emulates the format would take
    a hundred times as long."""
    formats = {a.dtype for a in tensors_in(args) if a.is_floating_point()} if name.startswith(PRODUCTS) else ()
    if formats not in HALVES:
        return func(*args, **kwargs)
    half, = formats
    change = functools.partial(cast, old=half, new=torch.float32)
    return cast(func(*change(args), **kwargs), torch.float32, half)


def cast(value, old, new):
    """Every tensor of the format `old`, alone or in a list, in the format `new`."""
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, old, new) for item in value)
    return value.to(new) if isinstance(value, torch.Tensor) and value.dtype == old else value


def refuse_mixed(name, args, plain, tensors):
    """Raises where CUDA would for a CPU's tensor among a GPU's."""
    index = name.startswith(INDEXING)
    if index and not isinstance(args[0], CudaTensor):
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) [{name}]")
    for tensor in plain:
        if tensor.dim() == 0 and not name.startswith(NO_SCALARS):
            continue
        if not index or tensor.is_floating_point():
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! [{name}] "
                               f"{[tuple(t.shape) for t in tensors]}")
        waited("copy")  # of an index


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention written out, as autocast and CUDA's checks of number formats have it."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {q.dtype} {k.dtype} {v.dtype}")
    with torch.autocast("cuda", enabled=False):
        weights = (q.float() @ k.float().mT) * (scale if scale is not None else q.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
        if attn_mask is not None:
            weights = weights.masked_fill(attn_mask.logical_not(), float("-inf")) if attn_mask.dtype == torch.bool else weights + attn_mask
        return (weights.softmax(-1) @ v.float()).to(q.dtype)


def compiled():
    """The library of simulated_gpu.cpp, compiled once for each torch, or None without a compiler."""
    library = Path(tempfile.gettempdir()) / f"simulated_gpu_{torch.__version__}_{os.getuid()}.so"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not library.exists() and compiler:
        root, part = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O1", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                        f"-I{root / 'include'}", str(Path(__file__).with_suffix(".cpp")), "-o", str(part), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
                        f"-Wl,-rpath,{root / 'lib'}"], check=True, capture_output=True)
        os.replace(part, library)
    return library if library.exists() else None


def install(bf16):
    """Makes torch see a GPU, an Ampere one with bf16 or a Turing one without. Returns the dispatch mode in which everything then has to run."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    plain_apply = torch.nn.Module._apply

    def apply(self, fn, recurse=True):
        own = {name: p for name, p in self._parameters.items() if isinstance(p, CudaTensor)}
        for name in own:
            self._parameters[name] = None
        plain_apply(self, fn, recurse)
        for name, parameter in own.items():
            with torch.no_grad():
                new = fn(parameter)
            if isinstance(new, CudaTensor) and new is not parameter:
                parameter.data = new
            self._parameters[name] = parameter if isinstance(new, CudaTensor) else torch.nn.Parameter(new, parameter.requires_grad)
        return self

    class GeneratorType(type):
        def __instancecheck__(cls, value):
            return isinstance(value, plain_generator)

    class Generator(metaclass=GeneratorType):
        kept = []  # noqa: RUF012

        def __new__(cls, device="cpu"):
            generator = plain_generator()
            GENERATORS[generator._cdata] = torch.device(device).type
            cls.kept.append(generator)
            return generator

    def as_tensor(data, *args, device=None, **options):
        tensor = data if isinstance(data, CudaTensor) else plain_as_tensor(data, *args, **options)
        return tensor if device is None else tensor.to(device)

    def sdpa(q, *args, **options):
        return (attention if isinstance(q, CudaTensor) else plain_sdpa)(q, *args, **options)

    plain_generator, plain_as_tensor, plain_sdpa = torch.Generator, torch.as_tensor, torch.nn.functional.scaled_dot_product_attention
    torch.nn.Module._apply, torch.Generator, torch.as_tensor = apply, Generator, as_tensor
    plain_save_file = safetensors.torch.save_file  # which looks for the memory of a tensor; a real GPU's it copies itself
    safetensors.torch.save_file = lambda tensors, *args, **options: plain_save_file({name: part.cpu() for name, part in tensors.items()}, *args, **options)
    torch.nn.functional.scaled_dot_product_attention = sdpa
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None, "set_device": None, "empty_cache": None, "synchronize": None,
               "get_device_name": "simulated", "get_device_capability": (8, 6) if bf16 else (7, 5), "max_memory_allocated": 0, "is_initialized": False,
               "reset_peak_memory_stats": None, "manual_seed_all": None, "manual_seed": None, "is_current_stream_capturing": False,
               "get_device_properties": types.SimpleNamespace(total_memory=11 * 2**30, name="simulated")}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: bf16 or including_emulation
    torch.backends.cudnn.enabled = False  # whose batch norm has no counterpart on the CPU
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(str(compiled())).patch()
    return Simulation()
