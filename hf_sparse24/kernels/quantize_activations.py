"""Dynamic quantization of activations, one pass over each token: `quantize_per_token` as a Triton kernel.

A program reads one token, finds its largest magnitude and writes the token in 8 bits with its scale. The arithmetic is
that of `kernels.reference`, to the bit: one division a token and one product a feature. The result has room for rows
up to a multiple of 16 behind the last token, so that a kernel which needs such a number of rows finds them without a
copy; what stands there is undefined.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse24.packing import LARGEST_VALUE, SMALLEST_TOKEN_SCALE

ROWS = 16  # of the tiles that 8-bit tensor cores take
_LARGEST_BLOCK = 16384
_TO_NEAREST = tl.constexpr(1.5 * 2**23)  # added to a float32 below 2^22 it leaves no bits behind the point


def quantize_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `input` (..., K) in int8 or float8_e4m3fn, contiguous, and its scale (..., 1) in float32.

    Args:
        input (`Tensor`): float32, float16 or bfloat16, on a GPU; rows may be strided.
        dtype (`torch.dtype`): torch.int8 or torch.float8_e4m3fn.
    """
    *leading, features = input.shape
    rows = input.reshape(-1, features)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    count = len(rows)
    quantized = torch.empty(triton.cdiv(count, ROWS) * ROWS, features, dtype=dtype, device=input.device)[:count]
    scale = torch.empty(*leading, 1, dtype=torch.float32, device=input.device)
    if count and features:
        block = min(triton.next_power_of_2(features), _LARGEST_BLOCK)
        _quantize_row[(count,)](
            rows,
            quantized,
            scale,
            rows.stride(0),
            FEATURES=features,
            LARGEST=LARGEST_VALUE[dtype],
            SMALLEST=SMALLEST_TOKEN_SCALE,
            IS_INTEGER=dtype == torch.int8,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            enable_fp_fusion=False,  # the product is rounded before it is rounded to an integer, as in the reference
        )
    return quantized.view(input.shape), scale


@triton.jit
def _quantize_row(
    input_ptr,
    output_ptr,
    scale_ptr,
    stride,
    FEATURES: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, FEATURES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(input_ptr + token * stride + column, mask=column < FEATURES, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    top = tl.max(largest, 0)
    scale = tl.div_rn(top, LARGEST)
    scale = tl.where(scale < SMALLEST, 1.0, scale)
    is_nan = tl.max((largest != largest).to(tl.int32), 0) > 0  # which a maximum need not keep
    scale = tl.where(is_nan, float("nan"), scale)
    tl.store(scale_ptr + token, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in tl.static_range(0, FEATURES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        if FEATURES > BLOCK:  # else the only block is still in registers
            x = tl.load(input_ptr + token * stride + column, mask=column < FEATURES, other=0).to(tl.float32)
        scaled = x * inverse
        if IS_INTEGER:
            scaled = (scaled + _TO_NEAREST) - _TO_NEAREST
        scaled = tl.clamp(scaled, -LARGEST, LARGEST)
        tl.store(
            output_ptr + token * FEATURES + column,
            scaled.to(output_ptr.dtype.element_ty),
            mask=column < FEATURES,
        )
