"""A packed projection for few tokens, as in decoding: weights of 16 or 8 bits, read once, as format 1 has them.

With few tokens a projection takes as long as its weights take to read: 1.125 bytes a weight for 16 bits and 0.625 for
8 bits, against 2 of the dense one. Weights in 8 bits are widened in registers and their scales applied to the sum
(W8A16), so that the activations need no quantization, and are not rounded. The kernel is in `decode.cu`; NVRTC, which
torch brings along, compiles it at its first use, in half a second.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from hf_sparse24.capability import Capability
from hf_sparse24.kernels.nvrtc import device_capability, launch, load

MOST_TOKENS = 64
_ALIGNMENT = 16  # bytes, of what a lane reads at once
_DTYPES = (torch.float16, torch.bfloat16)
_VALUES_OF_A_CHUNK = 64  # bytes of a row that four lanes read at once


def decode_capability(dtype: torch.dtype, value_dtype: torch.dtype, in_features: int) -> Capability:
    """Tell whether the kernel takes activations and packed values of these dtypes and a projection of this width."""
    if dtype not in _DTYPES or (value_dtype.itemsize == 2 and value_dtype != dtype) or value_dtype.itemsize > 2:
        return Capability(False, f"takes float16 and bfloat16 activations; got {dtype} with {value_dtype} values")
    columns = columns_of_a_chunk(value_dtype)
    if in_features % columns:
        return Capability(False, f"takes in_features divisible by {columns} with {value_dtype} values")
    return Capability(True, "sparse tensor cores, weights read as stored")


def columns_of_a_chunk(value_dtype: torch.dtype) -> int:
    """Return by what in_features must be divisible: 64 for values of 16 bits, 128 for 8 bits."""
    return 2 * _VALUES_OF_A_CHUNK // value_dtype.itemsize


def few_tokens_linear(
    input: Tensor, weight: Tensor, weight_indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return input @ unpacked(weight).T + bias in the dtype of `input`; sums are in float32, in a fixed order.

    Args:
        input (`Tensor`): (..., K) float16 or bfloat16 on a GPU; made for at most `MOST_TOKENS` tokens.
        weight, weight_indices, weight_scale: a packed weight in format 1: values (N, K/2) in the dtype of `input`,
            int8 or float8_e4m3fn; indices (N, K/8); scale (N,) float32 with 8 bits.
        bias (`Tensor`, *optional*): (N,) in the dtype of `input`.

    Raises:
        `ValueError`: dtypes or a width that the kernel does not take (see `decode_capability`).
    """
    capability = decode_capability(input.dtype, weight.dtype, input.shape[-1])
    if not capability.ok:
        raise ValueError(f"The kernel for few tokens {capability.reason}.")
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    if rows.data_ptr() % _ALIGNMENT:  # a view from the middle of something
        rows = rows.clone()
    _check_operands(input, weight, weight_indices, weight_scale, bias)
    tokens, outputs = len(rows), weight.shape[0]
    result = torch.empty(*input.shape[:-1], outputs, dtype=input.dtype, device=input.device)
    if tokens and outputs:
        device, (row_tiles, token_tiles, warps) = input.device.index, tiles(tokens, outputs)
        kernel = _kernel(input.dtype, weight.dtype, row_tiles, token_tiles, warps, device_capability(device))
        grid = (-(-outputs // (16 * row_tiles)), -(-tokens // (8 * token_tiles)))
        tensors = (rows, weight, weight_indices, weight_scale, bias, result)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        launch(kernel, grid, 32 * warps, (*pointers, tokens, outputs, rows.shape[1]), device)
    return result


def _check_operands(input: Tensor, weight: Tensor, *others: Tensor | None) -> None:
    """Raise `ValueError` for what the kernel would read wrongly."""
    indices, scale, bias = others
    dtypes = {torch.uint8: indices, torch.float32: scale, input.dtype: bias}
    for dtype, tensor in dtypes.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"The kernel for few tokens takes {dtype} where it got {tensor.dtype}.")
    for tensor in (weight, *others):
        if tensor is None:
            continue
        if tensor.device != input.device or not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
            raise ValueError(
                "The kernel for few tokens takes contiguous, 16-byte aligned tensors of one device; got one on "
                f"{tensor.device} with strides {tensor.stride()}."
            )


def tiles(tokens: int, outputs: int) -> tuple[int, int, int]:
    """Return how many tiles of 16 rows and of 8 tokens a block computes, and with how many warps.

    More rows a block read the activations less often; fewer, and more warps, give every multiprocessor enough to read.
    """
    token_tiles = next(tiles for tiles in (1, 2, 4, 8) if 8 * tiles >= min(tokens, MOST_TOKENS))
    many_rows = outputs >= 16384
    return (
        (4 if token_tiles >= 4 and many_rows else 2 if token_tiles >= 4 or many_rows else 1),
        token_tiles,
        (4 if many_rows else 8),
    )


@functools.cache
def _kernel(dtype: torch.dtype, value_dtype: torch.dtype, *shape: Any) -> Any:
    """Return the kernel for one shape of blocks, which serves every device of a compute capability."""
    *block, capability = shape
    return load("decode.cu", "few_tokens_linear", definitions(dtype, value_dtype, *block), capability)


def definitions(
    dtype: torch.dtype, value_dtype: torch.dtype, row_tiles: int, token_tiles: int, warps: int
) -> dict[str, int]:
    """Return what `decode.cu` wants to be defined."""
    return {
        "HALF": int(dtype == torch.float16),
        "BITS": 8 * value_dtype.itemsize,
        "FP8": int(value_dtype == torch.float8_e4m3fn),
        "ROW_TILES": row_tiles,
        "TOKEN_TILES": token_tiles,
        "WARPS": warps,
    }
