"""A packed projection for few tokens, as in decoding: weights of 16 or 8 bits, read once, as format 1 has them.

With few tokens a projection takes as long as its weights take to read: 1.125 bytes a weight for 16 bits and 0.625 for
8 bits, against 2 of the dense one. Weights in 8 bits are widened in registers and their scales applied to the sum
(W8A16), so that the activations need no quantization, and are not rounded. The kernel is in `decode.cu`; NVRTC, which
torch brings along, compiles it at its first use, in half a second.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse24.capability import Capability
from hf_sparse24.kernels.decode_blocks import UNIT, Block, tiles
from hf_sparse24.kernels.nvrtc import allow_shared_memory, device_capability, launch, load

MOST_TOKENS = 64
# Tiles of 8 tokens of a block, by the number of tokens.
_TOKEN_TILES = [next(tiles for tiles in (1, 2, 4, 8) if 8 * tiles >= tokens) for tokens in range(MOST_TOKENS + 1)]
_ALIGNMENT = 16  # bytes, of what a lane copies at once
_DTYPES = (torch.float16, torch.bfloat16)
_USUAL_SHARED_MEMORY = 48 * 1024  # bytes that a block may have without asking


@functools.cache
def decode_capability(dtype: torch.dtype, value_dtype: torch.dtype, in_features: int) -> Capability:
    """Tell whether the kernel takes activations and packed values of these dtypes and a projection of this width."""
    if dtype not in _DTYPES or (value_dtype.itemsize == 2 and value_dtype != dtype) or value_dtype.itemsize > 2:
        return Capability(False, f"takes float16 and bfloat16 activations; got {dtype} with {value_dtype} values")
    if in_features % UNIT:
        return Capability(False, f"takes in_features divisible by {UNIT}")
    return Capability(True, "sparse tensor cores, weights read as stored")


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
    *leading, features = input.shape
    capability = decode_capability(input.dtype, weight.dtype, features)
    if not capability.ok:
        raise ValueError(f"The kernel for few tokens {capability.reason}.")
    rows = input.reshape(-1, features).contiguous()
    if rows.data_ptr() % _ALIGNMENT:  # a view from the middle of something
        rows = rows.clone()
    pointers = _addresses(input, weight, weight_indices, weight_scale, bias)
    outputs, tokens = weight.shape[0], rows.shape[0]
    result = input.new_empty((*leading, outputs))
    if tokens and outputs:
        device = input.get_device()
        token_tiles = _TOKEN_TILES[min(tokens, MOST_TOKENS)]
        compiled = _compiled(input.dtype, weight.dtype, token_tiles, outputs, features, device)
        grid = (-(-tokens // compiled.tokens), compiled.blocks)
        arguments = (rows.data_ptr(), *pointers, result.data_ptr(), tokens, outputs, features)
        launch(compiled.kernel, grid, compiled.threads, arguments, device, compiled.shared_memory)
    return result


def _addresses(
    input: Tensor, weight: Tensor, indices: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[int, int, int, int]:
    """Return where the operands stand.

    Raises:
        `ValueError`: the kernel would read one of them wrongly.
    """
    device = input.get_device()
    addresses = (
        weight.data_ptr(),
        indices.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    readable = (
        not (addresses[0] | addresses[1] | addresses[2] | addresses[3]) % _ALIGNMENT
        and weight.get_device() == indices.get_device() == device
        and weight.is_contiguous()
        and indices.is_contiguous()
        and indices.dtype == torch.uint8
        and (
            scale is None or (scale.dtype == torch.float32 and scale.is_contiguous() and scale.get_device() == device)
        )
        and (bias is None or (bias.dtype == input.dtype and bias.is_contiguous() and bias.get_device() == device))
    )
    if not readable:
        raise ValueError(
            "The kernel for few tokens takes contiguous, 16-byte aligned tensors of one device: indices in uint8, "
            f"scales in float32, a bias in {input.dtype}."
        )
    return addresses


class _Compiled(NamedTuple):
    """A kernel, and how to launch it: threads of a block, blocks for the outputs, tokens of a block, bytes."""

    kernel: Any
    threads: int
    blocks: int
    tokens: int
    shared_memory: int


@functools.cache
def _compiled(
    dtype: torch.dtype, value_dtype: torch.dtype, token_tiles: int, outputs: int, features: int, device: int
) -> _Compiled:
    """Return the kernel for a projection."""
    capability, properties = device_capability(device), torch.cuda.get_device_properties(device)
    block = tiles(token_tiles, outputs, features, value_dtype, capability, properties.multi_processor_count)
    kernel, size = _kernel(dtype, value_dtype, block, capability), block.shared_memory(value_dtype)
    if size > _USUAL_SHARED_MEMORY:
        allow_shared_memory(kernel, size, device)
    return _Compiled(kernel, block.threads, -(-outputs // block.rows) * block.cluster, block.tokens, size)


@functools.cache
def _kernel(dtype: torch.dtype, value_dtype: torch.dtype, block: Block, capability: tuple[int, int]) -> Any:
    """Return the kernel for one shape of blocks, which serves every device of a compute capability."""
    return load("decode.cu", "few_tokens_linear", definitions(dtype, value_dtype, block), capability)


def definitions(dtype: torch.dtype, value_dtype: torch.dtype, block: Block) -> dict[str, int]:
    """Return what `decode.cu` wants to be defined."""
    return {
        "HALF": int(dtype == torch.float16),
        "BITS": 8 * value_dtype.itemsize,
        "FP8": int(value_dtype == torch.float8_e4m3fn),
        **{name.upper(): value for name, value in block._asdict().items()},
    }
