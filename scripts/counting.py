"""Counts the memory that work needs on a GPU, without a GPU: torch runs it with tensors that have a shape, a type and the device "cuda", but no numbers."""

import contextlib
import ctypes
import functools
import sys
import warnings
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common import UserError


class Fake(FakeTensorMode):
    """torch's, without ever asking for a driver."""
    avoid_device_init = True


class Counter(TorchDispatchMode):
    """Counts the bytes of storages on the GPU that are alive, each rounded up to 512 as torch's allocator does: `now`, and the `peak` so far.

    What happens on the CPU happens really. A number that is asked of the GPU is 1 (true), a tensor that comes from it has zeros."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.living = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        if target != "cuda" and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "prim":  # which device?
            return func(*args, **kwargs)
        with self:  # an operation that is made of others, whose results count: in inference mode it comes in one piece
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten._to_copy.default and target == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.living:
            self.living[key] = weakref.finalize(storage, self.free, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, key, size):
        del self.living[key]
        self.now -= size


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """scaled_dot_product_attention by the memory-efficient kernel, in autocast's number format."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(attn_mask.logical_not(), float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]


@functools.cache
def answer_for_the_driver():
    """Before a backward pass autograd asks the driver whether it has a context; where there is no driver, the tests' simulated GPU has the answer."""
    if torch.cuda.is_available():
        return
    sys.path.append(str(Path(__file__).parent / "tests"))
    from simulated_gpu import compiled

    if compiled() is None:
        raise UserError("without a GPU this needs a C++ compiler (g++ or clang++)")
    ctypes.CDLL(str(compiled())).patch()


@contextlib.contextmanager
def counted():
    """Around what is to be counted. Yields the `Counter`."""
    answer_for_the_driver()
    plain, counter = torch.nn.functional.scaled_dot_product_attention, Counter()

    def attend(q, *args, **options):
        return attention(q, *args, **options) if isinstance(q, FakeTensor) else plain(q, *args, **options)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend), mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True), \
         mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False), mock.patch("torch.nn.Module._apply", converted), \
         Fake(allow_non_fake_inputs=True), counter, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # of a tensor without numbers, to tell a tensor of its own from none
        yield counter


def converted(self, convert, recurse=True):
    """What Module.to, .half() and .float() do, for tensors that cannot change places with others: new ones in the old ones' places, one by one."""
    for own in self.modules():
        for name, tensor in [*own._parameters.items(), *own._buffers.items()]:
            if tensor is None:
                continue
            with torch.no_grad():
                new = convert(tensor)
            if new is not tensor:
                place = own._parameters if name in own._parameters else own._buffers
                place[name] = torch.nn.Parameter(new, tensor.requires_grad) if name in own._parameters else new
    return self
