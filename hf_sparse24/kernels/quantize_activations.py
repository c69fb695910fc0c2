"""Activations around an 8-bit product, one pass over memory each: quantized before it, scaled after it.

`quantize_per_token` finds the largest magnitude of each token and writes the token in 8 bits with its scale, to the
bit as `kernels.reference` does: one division a token and one product a feature. The result has room for rows up to a
multiple of 16 behind the last token, so that a product which needs such a number of rows finds them without a copy;
what stands there is undefined. `scale_product_` applies what scales a library could not, in place.
"""

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from hf_sparse24.kernels.nvrtc import device_capability, launch, load
from hf_sparse24.packing import SMALLEST_TOKEN_SCALE

ROWS = 16  # of the tiles that 8-bit tensor cores take
_BYTES = 16  # that a thread reads at once
_THREADS = 256
_INPUTS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}
_SMALLEST_BITS = struct.unpack("<I", struct.pack("<f", SMALLEST_TOKEN_SCALE))[0]


def quantize_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `input` (..., K) in int8 or float8_e4m3fn, contiguous, and its scale (..., 1) in float32.

    Args:
        input (`Tensor`): float32, float16 or bfloat16, on a GPU; rows may be strided.
        dtype (`torch.dtype`): torch.int8 or torch.float8_e4m3fn.
    """
    shape, features = input.shape, input.shape[-1]
    tokens = input.numel() // features if features else 0
    rows, stride = (input, features) if input.is_contiguous() else _strided(input)
    padding = -tokens % ROWS
    if padding:
        quantized = input.new_empty((tokens + padding, features), dtype=dtype)[:tokens].view(shape)
    else:
        quantized = input.new_empty(shape, dtype=dtype)
    scale = input.new_empty((*shape[:-1], 1), dtype=torch.float32)
    if tokens:
        device = input.get_device()
        kernel, threads = _quantize_token(input.dtype, dtype, features, _width(rows, features, stride), device)
        pointers = (rows.data_ptr(), quantized.data_ptr(), scale.data_ptr())
        launch(kernel, (tokens, 1), threads, (*pointers, stride, features, _SMALLEST_BITS), device)
    return quantized, scale


def _strided(input: Tensor) -> tuple[Tensor, int]:
    """Return an input as (M, K) with contiguous features, and how far its tokens are from each other."""
    rows = input.reshape(-1, input.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def scale_product_(
    product: Tensor, token_scale: Tensor, weight_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return product * weight_scale * token_scale + bias in `dtype`, in the memory of the product.

    Args:
        product (`Tensor`): (..., N) bfloat16 on a GPU, contiguous, N divisible by 8.
        token_scale (`Tensor`): M values in float32.
        weight_scale (`Tensor`, *optional*): (N,) float32.
        bias (`Tensor`, *optional*): (N,) in `dtype`.
        dtype (`torch.dtype`): float16 or bfloat16.
    """
    outputs = product.shape[-1]
    tokens = product.numel() // outputs
    if tokens:
        device = product.get_device()
        optional = (0 if tensor is None else tensor.data_ptr() for tensor in (weight_scale, bias))
        arguments = (product.data_ptr(), token_scale.data_ptr(), *optional, outputs)
        grid = (tokens, -(-outputs // (8 * _THREADS)))
        launch(_scale_product(dtype, device), grid, _THREADS, arguments, device)
    return product if product.dtype == dtype else product.view(dtype)


def block(features: int, width: int) -> tuple[int, int]:
    """Return the threads of a block and how many vectors of `width` elements each holds.

    ```python
    >>> block(4096, 8), block(14336, 8), block(40, 1)
    ((256, 2), (512, 4), (32, 2))

    ```
    """
    vectors = -(-features // width)
    threads = next(threads for threads in (32, 64, 128, 256, 512, 1024) if vectors <= 2 * threads or threads == 512)
    return threads, -(-vectors // threads)


def definitions(dtype: torch.dtype, quantized: torch.dtype, width: int, vectors: int, threads: int) -> dict[str, int]:
    """Return what `quantize_activations.cu` wants to be defined."""
    is_fp8 = int(quantized == torch.float8_e4m3fn)
    return {"INPUT": _INPUTS[dtype], "FP8": is_fp8, "WIDTH": width, "VECTORS": vectors, "THREADS": threads}


def _width(rows: Tensor, features: int, stride: int) -> int:
    """Return how many elements a thread may read at once: 16 bytes of them where everything is aligned, else one."""
    width = _BYTES // rows.itemsize
    return width if features % width == stride % width == rows.data_ptr() % _BYTES == 0 else 1


@functools.cache
def _quantize_token(
    dtype: torch.dtype, quantized: torch.dtype, features: int, width: int, device: int
) -> tuple[Any, int]:
    """Return the kernel for tokens of a width, and the threads of a block."""
    threads, vectors = block(features, width)
    names = definitions(dtype, quantized, width, vectors, threads)
    return load("quantize_activations.cu", "quantize_token", names, device_capability(device)), threads


@functools.cache
def _scale_product(dtype: torch.dtype, device: int) -> Any:
    names = definitions(dtype, torch.int8, 1, 1, _THREADS)
    return load("quantize_activations.cu", "scale_product", names, device_capability(device))
