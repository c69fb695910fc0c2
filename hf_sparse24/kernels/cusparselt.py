"""Matrix products of 2:4 weights through cuSPARSELt: 16 bits, INT8 and FP8.

The library reads a weight as one buffer: first the kept values, exactly as format 1 has them, then its own metadata.
`compress` makes it; a layer's `weight` is a view of its beginning, so that nothing is stored twice. Where
nvmath-python is not installed, torch's own operator runs the product, which makes a plan at every call and takes the
library's default algorithm, on Hopper a slow one; a warning says so.
"""

import functools
import threading

import torch
from torch import Tensor
from transformers.utils import logging

from hf_sparse24.capability import Capability, gpu_capability, has_nvmath
from hf_sparse24.kernels.autotune import Choice
from hf_sparse24.kernels.cusparselt_plans import Library, Operands, Problem
from hf_sparse24.packing import PackedWeight, dtype_name, ones_in_places, pack_weight
from hf_sparse24.pattern import prune_2to4

logger = logging.get_logger(__name__)

# Tokens come in multiples of these. The library takes 8 for float16 too, where a search of its algorithms crashed.
ROWS = {torch.float16: 16, torch.bfloat16: 8, torch.int8: 16, torch.float8_e4m3fn: 16}
FEATURES = {torch.float16: 16, torch.bfloat16: 16, torch.int8: 32, torch.float8_e4m3fn: 32}  # inputs and outputs too
_SMALLEST = 128  # of either: a search on less crashed a GPU, with float16

_opening = threading.Lock()


def cusparselt_capability(value_dtype: torch.dtype, out_features: int, in_features: int) -> Capability:
    """Tell whether the library takes a weight of this dtype and shape."""
    if value_dtype not in FEATURES:
        return Capability(False, f"cuSPARSELt takes 16-bit, INT8 and FP8 weights, not {dtype_name(value_dtype)}")
    step = FEATURES[value_dtype]
    if in_features % step or out_features % step:
        return Capability(False, f"cuSPARSELt takes features divisible by {step} with {dtype_name(value_dtype)}")
    if value_dtype == torch.float8_e4m3fn and gpu_capability() < (8, 9):
        return Capability(False, "FP8 products need compute capability 8.9 or newer; quantization='int8' runs here")
    if min(in_features, out_features) < _SMALLEST:
        return Capability(False, f"cuSPARSELt is used from {_SMALLEST} features up")
    return Capability(True, "cuSPARSELt")


def compress(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return the library's form of a packed weight: its values, and the metadata that follow them in memory.

    Args:
        packed (`PackedWeight`): (N, K/2) values on a GPU in a dtype and shape that `cusparselt_capability` takes.

    Returns:
        `tuple[Tensor, Tensor]`: the values of format 1, and the metadata as bytes, two views of one buffer.
    """
    buffer = torch._cslt_compress(ones_in_places(packed)).flatten().view(torch.uint8)
    size = packed.weight.nbytes
    values = buffer[:size].view(packed.weight.dtype).view_as(packed.weight)
    values.copy_(packed.weight)
    return values, buffer[size:]


def matmul(
    input: Tensor,
    weight: Tensor,
    metadata: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return input @ unpacked(weight).T, with int8 times the scale of each output, plus bias, in `out_dtype`.

    Args:
        input (`Tensor`): (..., K) in the dtype of the weight; rows behind the last are read where the memory is there.
        weight, metadata (`Tensor`): (N, K/2) and bytes, as `compress` returned them. Copies that do not follow each
            other in memory are put together at every call.
        weight_scale (`Tensor`, *optional*): (N,) float32, with int8.
        bias (`Tensor`, *optional*): (N,) in `out_dtype`, without a scale.
        out_dtype (`torch.dtype`): float16 or bfloat16; that of the weight, if it is one of them.
    """
    leading, features, outputs = input.shape[:-1], input.shape[-1], weight.shape[0]
    tokens, rows = input.numel() // features, ROWS[weight.dtype]
    padded = -(-tokens // rows) * rows
    if not tokens:
        return input.new_empty((*leading, outputs), dtype=out_dtype)
    input = _with_rows(input, tokens, padded)
    if metadata.data_ptr() != weight.data_ptr() + weight.nbytes:
        logger.warning_once("Metadata of a packed weight do not follow it in memory: both are copied at every call.")
        buffer = torch.cat((weight.reshape(-1).view(torch.uint8), metadata))
        weight = buffer[: weight.nbytes].view(weight.dtype).view_as(weight)
    if not has_nvmath():
        out = _matmul_of_torch(input, weight, metadata, weight_scale, out_dtype, padded)[:tokens]
        return (out if bias is None else out.add_(bias)).view(*leading, outputs)
    out = input.new_empty((*leading, outputs) if tokens == padded else (padded, outputs), dtype=out_dtype)
    device = input.get_device()
    problem = Problem(outputs, features, padded, weight.dtype, out_dtype, bias is not None)
    operands = Operands(input, weight, weight_scale, bias, out)
    if torch._C._cuda_getDevice() == device:
        _library(device).run(problem, operands)
    else:
        with torch.cuda.device(device):
            _library(device).run(problem, operands)
    return out if tokens == padded else out[:tokens].view(*leading, outputs)


def tune(out_features: int, in_features: int, dtype: torch.dtype, tokens: int, device: torch.device) -> Choice:
    """Search the fastest algorithm for products of about this size, if it is not known yet, and return it.

    Args:
        out_features, in_features (`int`): N and K, which `cusparselt_capability` takes.
        dtype (`torch.dtype`): of the values; float16 and bfloat16 also of the result, which else is bfloat16.
        tokens (`int`): M.
        device (`torch.device`): a GPU.
    """
    out_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    weight = prune_2to4(torch.randn(out_features, in_features, device=device)).to(dtype)
    values, metadata = compress(pack_weight(weight))
    scale = torch.ones(out_features, device=device) if dtype == torch.int8 else None
    rows = -(-tokens // ROWS[dtype]) * ROWS[dtype]
    matmul(torch.randn(rows, in_features, device=device).to(dtype), values, metadata, scale, None, out_dtype)
    return _library(values.device.index).choice(Problem(out_features, in_features, rows, dtype, out_dtype, False))


def _with_rows(input: Tensor, tokens: int, rows: int) -> Tensor:
    """Return a contiguous, aligned input (..., K) of some tokens, behind which there is memory for as many rows."""
    if input.is_contiguous() and input.data_ptr() % 16 == 0:
        if tokens == rows:
            return input
        room = input.untyped_storage().nbytes() // input.itemsize - input.storage_offset()
        if room >= rows * input.shape[-1]:
            return input
    padded = input.new_empty(rows, input.shape[-1])
    padded[:tokens] = input.reshape(tokens, -1)
    return padded


def _library(device: int) -> Library:
    with _opening:
        return _open(device)


@functools.cache
def _open(device: int) -> Library:
    return Library(device)


def _matmul_of_torch(
    input: Tensor, weight: Tensor, metadata: Tensor, alpha: Tensor | None, out_dtype: torch.dtype, rows: int
) -> Tensor:
    logger.warning_once(
        "nvmath-python is not installed: 2:4 products go through torch, which takes 0.4 to 0.7 ms of the host for "
        "each and an algorithm that is no faster than dense. pip install nvmath-python makes them fast."
    )
    outputs, width = weight.shape
    width += metadata.nbytes // weight.itemsize // outputs
    buffer = weight.as_strided((outputs, width), (width, 1))  # the values and what follows them
    input = input.as_strided((rows, input.shape[-1]), (input.shape[-1], 1))
    integer_or_fp8 = out_dtype if weight.itemsize == 1 else None
    return torch._cslt_sparse_mm(buffer, input.t(), alpha=alpha, out_dtype=integer_or_fp8, transpose_result=True)
