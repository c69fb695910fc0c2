"""A GPU that is not there: everything between a layer and the kernels runs as on a GPU, the kernels on a CPU.

Tensors of the CPU say that they are on a GPU. The package's own kernels are emulated (`emulation`), libraries are
replaced by what they are documented to compute, from the forms in which they take their operands: so a wrong form, a
wrong order of arguments or a wrong choice shows without a GPU. What a library really does, and speed, does not.
"""

import contextlib
import ctypes
import importlib.util

import torch
import torch.nn.functional as F

from hf_sparse24 import capability
from hf_sparse24.kernels import cusparselt, decode, dispatch, float8, grouped, quantize_activations, zero_pruned
from hf_sparse24.packing import SMALLEST_TOKEN_SCALE, scatter_values

from .emulation import emulator

_CACHED = (
    capability.backend_capability,
    capability.gpu_capability,
    capability.has_nvmath,
    dispatch.takes_weight,
    dispatch.takes_quantized,
    decode._compiled,
    decode._kernel,
    grouped._compiled,
    grouped._kernel,
    quantize_activations._quantize_token,
    quantize_activations._scale_product,
    cusparselt._open,
    zero_pruned._can_run,
    zero_pruned._kernel,
)
_ENTRIES = {"few_tokens_linear": "run", "quantize_token": "quantize", "scale_product": "scale", "zero_pruned": "zero"}


def load(file, function, names, capability):
    """Return an emulated kernel."""
    return getattr(emulator(file.removesuffix(".cu"), **names), _ENTRIES[function])


def launch(kernel, grid, threads, arguments, device, shared_memory=0):
    """Run an emulated kernel."""
    grouped = kernel.__name__ == "run" and len(arguments) == 13
    integers = 5 if grouped else 1 if kernel.__name__ in ("scale", "zero") else 3
    pointers, numbers = arguments[:-integers], arguments[-integers:]
    numbers = (numbers[0], ctypes.c_uint64(numbers[1]), *numbers[2:]) if grouped else numbers
    if kernel.__name__ == "quantize":
        numbers = (*numbers[:2], ctypes.c_float(SMALLEST_TOKEN_SCALE))
    extra = (shared_memory,) if kernel.__name__ == "run" else ()
    kernel(*grid, *extra, *map(ctypes.c_void_p, pointers), *numbers)


class Library:
    """cuSPARSELt on buffers as `compress` makes them here: values, then the indices of format 1 as metadata."""

    def __init__(self, device):
        self.problems = []

    def run(self, problem, operands):
        """Compute a problem from the memory that its operands point at."""
        self.problems.append(problem)
        count = problem.outputs * problem.features
        start = operands.weight.data_ptr()
        values = _at(start, (problem.outputs, problem.features // 2), problem.dtype)
        indices = _at(
            start + count // 2 * problem.dtype.itemsize, (problem.outputs, problem.features // 8), torch.uint8
        )
        rows = _at(operands.input.data_ptr(), (problem.tokens, problem.features), problem.dtype)
        product = F.linear(rows.double(), scatter_values(values, indices).double())
        product = product if operands.alpha is None else product * operands.alpha.double()
        product = product if operands.bias is None else product + operands.bias.double()
        operands.out.view_as(product).copy_(product)


def _at(address, shape, dtype):
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape).clone()


def _compress(dense):
    """Take ones in the places of the values; return as many values, and the indices."""
    groups = dense.float().unflatten(-1, (-1, 4)) != 0
    columns = groups.float().topk(2, -1).indices.sort(-1).values
    nibbles = (columns[..., 0] | columns[..., 1] << 2).to(torch.uint8)
    indices = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    values = torch.ones(dense.numel() // 2, dtype=torch.float32).to(dense.dtype)
    return torch.cat([values.view(torch.uint8), indices.flatten()])


def _cutlass(input, input_scale, weight, metadata, weight_scale, bias, out_dtype):
    exact = F.linear(input.double(), scatter_values(weight, metadata).double())
    exact = exact * input_scale.view(-1, 1).double() * weight_scale.double()
    return (exact if bias is None else exact + bias.double()).to(out_dtype)


@contextlib.contextmanager
def emulated_device(patch, compute=(9, 0)):
    """Be a machine with a GPU of a compute capability, and nvmath-python and torchao installed.

    Args:
        patch (`pytest.MonkeyPatch`): undone by its owner.
        compute (`tuple[int, int]`): the compute capability.
    """
    find_spec = importlib.util.find_spec
    there = ("cuda", "cuda.bindings", "nvmath", "torchao")
    patch.setattr(importlib.util, "find_spec", lambda name: name if name in there else find_spec(name))
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: compute)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    patch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    patch.setattr(torch.Tensor, "get_device", lambda tensor: 0, raising=False)
    patch.setattr(torch, "_cslt_compress", _compress, raising=False)
    library = Library(0)
    patch.setattr(cusparselt, "_library", lambda device: library)
    patch.setattr(capability, "_has_operator", lambda: True)
    patch.setattr(float8, "metadata_of", lambda packed: packed.weight_indices.clone())
    patch.setattr(float8, "scaled_linear", _cutlass)
    patch.setattr(zero_pruned, "_on_device", lambda table, device: table)
    for module in (decode, grouped, quantize_activations, zero_pruned):
        patch.setattr(module, "load", load)
        patch.setattr(module, "launch", launch)
        patch.setattr(module, "device_capability", lambda device: compute)
    for module in (decode, grouped):
        patch.setattr(module, "clusters_at_once", lambda size, device: 132 // size)
        patch.setattr(module, "allow_shared_memory", lambda *arguments: None)
    for cached in _CACHED:
        cached.cache_clear()
    try:
        yield library
    finally:
        for cached in _CACHED:
            cached.cache_clear()
