"""A packed projection for few tokens, as in decoding: a Triton kernel that reads the portable weight as it is.

With few tokens a projection takes as long as its weights take to read, so what counts is their bytes: 1.125 a weight
for 16 bits and 0.625 for 8 bits, against 2 for the dense weight. The sparse tensor cores are of no use here. A program
takes some rows; it reads pairs of values and the nibbles that place them, puts each pair into its group of four in
registers, and multiplies with dense tensor-core products. A group's four columns go into four products, one for each
place in the group: the sum over the inputs does not care about their order, and nothing has to be shuffled.

Weights in 8 bits are widened to the activations' dtype and their scales applied to the sum (W8A16): the activations
need no quantization, and are not rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse24.pattern import GROUP_SIZE

MOST_TOKENS = 64
_INPUT_DTYPES = (torch.float16, torch.bfloat16)
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU


def few_tokens_linear(
    input: Tensor, weight: Tensor, weight_indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return input @ unpacked(weight).T + bias in the dtype of `input`; sums are in float32.

    Args:
        input (`Tensor`): (..., K) float16 or bfloat16; made for at most `MOST_TOKENS` tokens.
        weight, weight_indices, weight_scale: a packed weight in format 1: values (N, K/2) in the dtype of `input`,
            int8 or float8_e4m3fn; indices (N, ceil(K/8)); scale (N,) float32 with 8 bits.
        bias (`Tensor`, *optional*): (N,) in the dtype of `input`.

    Raises:
        `ValueError`: another dtype.
    """
    if input.dtype not in _INPUT_DTYPES or (weight_scale is None and weight.dtype != input.dtype):
        raise ValueError(f"The kernel for few tokens takes float16 or bfloat16; got {input.dtype} and {weight.dtype}.")
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    tokens, outputs = len(rows), weight.shape[0]
    result = torch.empty(tokens, outputs, dtype=input.dtype, device=input.device)
    if tokens and outputs:
        block_m = max(16, triton.next_power_of_2(min(tokens, MOST_TOKENS)))
        block_n = 16 if triton.cdiv(outputs, 32) < _PROGRAMS else 32
        _linear[(triton.cdiv(outputs, block_n), triton.cdiv(tokens, block_m))](
            rows.view(torch.int64),  # the four features of a group at once
            weight.view(torch.int32 if weight.element_size() == 2 else torch.int16),  # the two values of a group
            weight_indices,
            weight_scale,
            bias,
            result,
            tokens,
            outputs,
            GROUPS=input.shape[-1] // GROUP_SIZE,
            INDEX_STRIDE=weight_indices.shape[-1],
            BITS=8 * weight.element_size(),
            IS_FP8=weight.dtype == torch.float8_e4m3fn,
            HAS_SCALE=weight_scale is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_G=64,
            num_warps=4,
        )
    return result.view(*input.shape[:-1], outputs)


@triton.jit
def _linear(
    input_ptr,
    pairs_ptr,
    indices_ptr,
    scale_ptr,
    bias_ptr,
    output_ptr,
    tokens,
    outputs,
    GROUPS: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, token = n.to(tl.int64)[:, None], m.to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, GROUPS, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        inside = (n < outputs)[:, None] & (g < GROUPS)[None, :]
        pair = tl.load(pairs_ptr + row * GROUPS + g[None, :], mask=inside, other=0)
        byte = tl.load(indices_ptr + row * INDEX_STRIDE + (g >> 1)[None, :], mask=inside, other=0)
        nibble = byte.to(tl.int32) >> ((g & 1) * 4)[None, :]
        low, high = _value(pair, BITS, IS_FP8, dtype), _value(pair >> BITS, BITS, IS_FP8, dtype)
        four = tl.load(
            input_ptr + token * GROUPS + g[:, None], mask=(m < tokens)[None, :] & (g < GROUPS)[:, None], other=0
        )
        zero = tl.zeros((BLOCK_N, BLOCK_G), dtype)
        for place in tl.static_range(4):
            weight = tl.where((nibble >> 2) & 3 == place, high, zero)
            weight = tl.where(nibble & 3 == place, low, weight)
            feature = (four >> (16 * place)).to(tl.int16).to(dtype, bitcast=True)
            total = tl.dot(weight, feature, total)
    if HAS_SCALE:
        total *= tl.load(scale_ptr + n, mask=n < outputs, other=0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < outputs, other=0).to(tl.float32)[:, None]
    inside = (n < outputs)[:, None] & (m < tokens)[None, :]
    tl.store(output_ptr + token * outputs + row, total.to(dtype), mask=inside)


@triton.jit
def _value(bits, BITS: tl.constexpr, IS_FP8: tl.constexpr, dtype: tl.constexpr):
    """Return the value in the lowest bits of a pair."""
    if BITS == 16:
        return bits.to(tl.int16).to(dtype, bitcast=True)
    if IS_FP8:
        return bits.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
    return bits.to(tl.int8).to(dtype)
