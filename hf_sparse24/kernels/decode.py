"""A packed projection for few tokens, as in decoding: weights of 16 or 8 bits, read once, as format 1 has them.

With few tokens a projection takes as long as its weights take to read: 1.125 bytes a weight for 16 bits and 0.625 for
8 bits, against 2 of the dense one. Weights in 8 bits come in two forms. They are widened in registers and their scales
applied to the sum (W8A16): the activations need no quantization, and are not rounded. Or the activations are quantized
as well (W8A8): half the products, no widening, half the activations to read, and all scales and the bias in the same
kernel. The kernel is in `decode.cu`; NVRTC, which torch brings along, compiles it at its first use, in half a second.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse24.capability import Capability
from hf_sparse24.kernels.decode_blocks import UNIT, Block, Problem, tiles
from hf_sparse24.kernels.nvrtc import allow_shared_memory, clusters_at_once, device_capability, launch, load

MOST_TOKENS, MOST_QUANTIZED_TOKENS = 64, 128  # of a block; more tokens take more blocks
# Tiles of 8 tokens of a block, by the number of tokens.
_TOKEN_TILES = [
    next(tiles for tiles in (1, 2, 4, 8, 16) if 8 * tiles >= tokens) for tokens in range(MOST_QUANTIZED_TOKENS + 1)
]
ALIGNMENT = 16  # bytes, of what a lane copies at once
_DTYPES = (torch.float16, torch.bfloat16)
_OLDEST_FP8 = (8, 9)
# Elsewhere the compiler makes mma.sp of FP8 from 16-bit products and exchanges between lanes: 2247 instructions where
# INT8 takes 141, for sm_90 and the block (2, 7, 1, 8, 2, 4, 1).
_NATIVE_FP8 = (8, 12)  # major numbers


@functools.cache
def decode_capability(dtype: torch.dtype, value_dtype: torch.dtype, in_features: int) -> Capability:
    """Tell whether the kernel takes activations and packed values of these dtypes and a projection of this width."""
    if dtype not in _DTYPES or (value_dtype.itemsize == 2 and value_dtype != dtype) or value_dtype.itemsize > 2:
        return Capability(False, f"takes float16 and bfloat16 activations; got {dtype} with {value_dtype} values")
    if in_features % UNIT:
        return Capability(False, f"takes in_features divisible by {UNIT}")
    return Capability(True, "sparse tensor cores, weights read as stored")


@functools.cache
def scaled_capability(
    value_dtype: torch.dtype, in_features: int, out_dtype: torch.dtype, compute: tuple[int, int]
) -> Capability:
    """Tell whether the kernel takes activations quantized as packed values of this dtype (W8A8) on such a GPU."""
    if value_dtype.itemsize != 1 or out_dtype not in _DTYPES:
        return Capability(False, f"takes 8-bit values for a 16-bit result; got {value_dtype} for {out_dtype}")
    if in_features % UNIT:
        return Capability(False, f"takes in_features divisible by {UNIT}")
    if value_dtype == torch.float8_e4m3fn and (compute < _OLDEST_FP8 or compute[0] not in _NATIVE_FP8):
        return Capability(False, "needs sparse FP8 products of a warp, which compute capability 8.9 and 12.x have")
    return Capability(True, "sparse tensor cores of 8 bits, weights read as stored")


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
    return _run(input, None, weight, weight_indices, weight_scale, bias, input.dtype, MOST_TOKENS)


def scaled_linear(
    input: Tensor,
    input_scale: Tensor | None,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (input @ unpacked(weight).T) * weight_scale * input_scale + bias, every factor in the same kernel (W8A8).

    Integer products are summed exactly, FP8 ones in float32; partial sums are added in float32, in a fixed order.

    Args:
        input (`Tensor`): (..., K) in the dtype of `weight`, on a GPU.
        input_scale (`Tensor`, *optional*): a float32 factor for each token, (..., 1).
        weight, weight_indices, weight_scale: a packed weight in format 1: values (N, K/2) in int8 or float8_e4m3fn,
            indices (N, K/8), scale (N,) float32.
        bias (`Tensor`, *optional*): (N,) in `out_dtype`.
        out_dtype (`torch.dtype`): float16 or bfloat16.

    Raises:
        `ValueError`: dtypes, a width or a GPU that the kernel does not take (see `scaled_capability`).
    """
    compute = device_capability(input.get_device())
    capability = scaled_capability(weight.dtype, input.shape[-1], out_dtype, compute)
    if not capability.ok or input.dtype != weight.dtype:
        reason = "takes activations quantized as the weight is" if capability.ok else capability.reason
        raise ValueError(f"The kernel for few tokens {reason}.")
    return _run(input, input_scale, weight, weight_indices, weight_scale, bias, out_dtype, MOST_QUANTIZED_TOKENS)


def _run(
    input: Tensor,
    input_scale: Tensor | None,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    most_tokens: int,
) -> Tensor:
    """Launch the kernel, with blocks of at most so many tokens."""
    *leading, features = input.shape
    rows, scale = aligned(input), None if input_scale is None else aligned(input_scale)
    outputs, tokens = weight.shape[0], input.numel() // features
    pointers = _addresses(rows, scale, tokens, weight, weight_indices, weight_scale, bias, out_dtype)
    result = input.new_empty((*leading, outputs), dtype=out_dtype)
    if tokens and outputs:
        device = input.get_device()
        token_tiles = _TOKEN_TILES[min(tokens, most_tokens)]
        compiled = _compiled(input.dtype, weight.dtype, out_dtype, token_tiles, outputs, features, device)
        grid = (-(-tokens // compiled.tokens), compiled.blocks)
        arguments = (*pointers, result.data_ptr(), tokens, outputs, features)
        launch(compiled.kernel, grid, compiled.threads, arguments, device, compiled.shared_memory)
    return result


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor as kernels read it: a copy of one that is strided or a view from the middle of something."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _addresses(
    input: Tensor,
    input_scale: Tensor | None,
    tokens: int,
    weight: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[int, ...]:
    """Return where the operands stand.

    Raises:
        `ValueError`: the kernel would read one of them wrongly.
    """
    device = input.get_device()
    addresses = (
        input.data_ptr(),
        0 if input_scale is None else input_scale.data_ptr(),
        weight.data_ptr(),
        indices.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    readable = (
        not (addresses[2] | addresses[3] | addresses[4] | addresses[5]) % ALIGNMENT
        and weight.get_device() == indices.get_device() == device
        and weight.is_contiguous()
        and indices.is_contiguous()
        and indices.dtype == torch.uint8
        and (
            scale is None or (scale.dtype == torch.float32 and scale.is_contiguous() and scale.get_device() == device)
        )
        and (bias is None or (bias.dtype == out_dtype and bias.is_contiguous() and bias.get_device() == device))
        and (
            input_scale is None
            or (
                input_scale.dtype == torch.float32
                and input_scale.get_device() == device
                and input_scale.numel() == tokens
            )
        )
    )
    if not readable:
        raise ValueError(
            "The kernel for few tokens takes contiguous, 16-byte aligned tensors of one device: indices in uint8, "
            f"scales in float32, one for each token, a bias in {out_dtype}."
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
    input_dtype: torch.dtype,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    token_tiles: int,
    outputs: int,
    features: int,
    device: int,
) -> _Compiled:
    """Return the kernel for a projection."""
    capability = device_capability(device)
    at_once = functools.partial(clusters_at_once, device=device)
    block = tiles(token_tiles, Problem(outputs, features, value_dtype, input_dtype, capability, at_once))
    kernel = _kernel(input_dtype, value_dtype, out_dtype, block, capability)
    size = block.shared_memory(value_dtype, input_dtype)
    allow_shared_memory(kernel, size, device)
    return _Compiled(kernel, block.threads, -(-outputs // block.rows) * block.cluster, block.tokens, size)


@functools.cache
def _kernel(
    input_dtype: torch.dtype,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    block: Block,
    capability: tuple[int, int],
) -> Any:
    """Return the kernel for one shape of blocks, which serves every device of a compute capability."""
    names = definitions(input_dtype, value_dtype, out_dtype, block)
    return load("decode.cu", "few_tokens_linear", names, capability)


def definitions(
    input_dtype: torch.dtype, value_dtype: torch.dtype, out_dtype: torch.dtype, block: Block
) -> dict[str, int]:
    """Return what `decode.cu` wants to be defined."""
    return {
        "HALF": int(out_dtype == torch.float16),
        "BITS": 8 * value_dtype.itemsize,
        "FP8": int(value_dtype == torch.float8_e4m3fn),
        "X_BITS": 8 * input_dtype.itemsize,
        **{name.upper(): value for name, value in block._asdict().items()},
    }
