"""The operators in plain torch: the default kernel of every device, and the oracle of every faster one.

The arithmetic is that of the sparse tensor cores. With 8-bit weights each token is quantized by its own largest
magnitude, integer products are summed exactly (int32) and FP8 products in float32, and both scales are applied after
the sum. For bfloat16 activations the FP8 sum is rounded to bfloat16 before the scales, which lets a CPU use its
bfloat16 units.

Without sparse hardware a packed weight would have to be unpacked at every call. The operators remember instead, for as
long as the packed tensors live and are not written to, what they unpacked: a projection then costs what a dense one
does, in time and in memory. The memory comes on top of the packed weight, and the log says so once.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from hf_sparse24.kernels.ops import check_experts  # the module defines the operators that are implemented here
from hf_sparse24.packing import quantize_tokens, scatter_values

logger = logging.get_logger(__name__)


_FEWEST_ROWS = 16  # more than these torch._int_mm takes on a GPU


class _Unpacked(NamedTuple):
    state: tuple[int | torch.dtype, ...]
    storages: tuple[torch.UntypedStorage, ...]  # kept, so that no other tensor can get their addresses
    dense: Tensor


_UNPACKED = WeakTensorKeyDictionary()


def linear(
    input: Tensor,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return input @ unpacked(weight).T + bias; the contract is in `kernels.ops`."""
    if weight_scale is None:
        torch._check(input.dtype == weight.dtype, lambda: f"the input is {input.dtype}, the weight {weight.dtype}")
        return F.linear(input, unpacked_once(weight, weight_indices, weight.dtype), bias)
    quantized, scale = quantize_per_token(input, weight.dtype)
    return scaled_linear(quantized, scale, weight, weight_indices, weight_scale, bias, input.dtype)


def quantize_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `input` (..., K) in int8 or float8_e4m3fn and its scale (..., 1) in float32."""
    return quantize_tokens(input.contiguous(), dtype)


def scaled_linear(
    input: Tensor,
    input_scale: Tensor | None,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return (input @ unpacked(weight).T) * weight_scale * input_scale + bias in `out_dtype`."""
    dense = unpacked_once(weight, weight_indices, _dtype_of_sums(weight, out_dtype))
    return _scaled_product(input, input_scale, dense, weight_scale, bias, out_dtype)


def experts_linear(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return `linear` for the rows of each expert; the contract is in `kernels.ops`."""
    check_experts(input, offsets, weight, weight_scale)
    result = input.new_zeros(input.shape[0], weight.shape[1])
    if weight_scale is None:
        dense = unpacked_once(weight, weight_indices, weight.dtype)
        for expert, rows in rows_of_experts(offsets):
            result[rows] = F.linear(input[rows], dense[expert], None if bias is None else bias[expert])
        return result
    quantized, scale = quantize_per_token(input, weight.dtype)
    dense = unpacked_once(weight, weight_indices, _dtype_of_sums(weight, input.dtype))
    for expert, rows in rows_of_experts(offsets):
        of_expert = (dense[expert], weight_scale[expert], None if bias is None else bias[expert])
        result[rows] = _scaled_product(quantized[rows], scale[rows], *of_expert, input.dtype)
    return result


def rows_of_experts(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and which: those up to its offset that the experts before it do not have."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _dtype_of_sums(weight: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """Return in which dtype the dense form of 8-bit values is multiplied."""
    if weight.dtype == torch.int8:
        return torch.int8
    return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32


def _scaled_product(
    input: Tensor,
    input_scale: Tensor | None,
    dense: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (input @ dense.T) * weight_scale * input_scale + bias, of a dense weight as `_dtype_of_sums` has it."""
    rows = input.reshape(-1, input.shape[-1])
    if dense.dtype == torch.int8:
        product = integer_matmul(rows, dense).float()
    else:
        product = F.linear(rows.to(dense.dtype), dense).float()
    scaled = product.mul_(weight_scale).view(*input.shape[:-1], dense.shape[0])
    scaled = scaled if input_scale is None else scaled.mul_(input_scale)
    return (scaled if bias is None else scaled.add_(bias)).to(out_dtype)


def integer_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return the exact product of int8 `left` (M, K) and the transpose of int8 `right` (N, K)."""
    if left.device.type == "cpu" and left.shape[0] and _cpu_sums_int8_exactly():
        return torch._int_mm(left, right.t())
    if left.is_cuda and left.shape[0] > _FEWEST_ROWS and not (left.shape[1] % 8 or right.shape[0] % 8):
        return torch._int_mm(left, right.t())
    return F.linear(left.double(), right.double())  # float64 holds every sum below 2^53 exactly


@functools.cache
def _cpu_sums_int8_exactly() -> bool:
    """Old x86 instructions saturate pairs of int8 products at 16 bits: try the worst case once."""
    worst = torch.full((32, 64), 127, dtype=torch.int8)
    products = (torch._int_mm(worst, sign * worst.t()) for sign in (1, -1))
    return all(bool((p == sign * 64 * 127 * 127).all()) for p, sign in zip(products, (1, -1), strict=True))


def unpacked_once(weight: Tensor, weight_indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dense (..., N, K) form of packed values in `dtype`, from memory when neither tensor was written to.

    Writes are seen by torch's count of them; what writes through `.data` is not counted. Tensors made in inference
    mode have no count, and are unpacked at every call.
    """
    _say_once(weight.device.type)
    if weight.is_inference() or weight_indices.is_inference():  # these do not count writes
        return scatter_values(weight, weight_indices).to(dtype)
    state = (dtype, weight.data_ptr(), weight._version, weight_indices.data_ptr(), weight_indices._version)
    known = _UNPACKED.get(weight)
    if known is None or known.state != state:
        storages = (weight.untyped_storage(), weight_indices.untyped_storage())
        known = _Unpacked(state, storages, scatter_values(weight.detach(), weight_indices.detach()).to(dtype))
        _UNPACKED[weight] = known
    return known.dense


def _say_once(device_type: str) -> None:
    logger.warning_once(
        f"hf_sparse24 has no sparse kernel for {device_type} here: each packed projection is unpacked at its "
        f"first use and "
        "then runs as a dense one, which takes the memory of a dense model on top of the packed one."
    )


def _remember_operands(ctx, inputs, output) -> None:  # noqa: ANN001
    _, weight, weight_indices, weight_scale, *_ = inputs
    ctx.save_for_backward(weight, weight_indices, weight_scale)


def _input_gradient(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    """The packed weight is frozen: the input has a gradient, through the dequantized weight, and the bias."""
    weight, weight_indices, weight_scale = ctx.saved_tensors
    needs_input, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    bias_gradient = (grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad) if needs_bias else None
    if not needs_input:
        return None, None, None, None, bias_gradient, None, None
    dense = _dequantized(weight, weight_indices, weight_scale, grad.dtype)
    return grad @ dense, None, None, None, bias_gradient, None, None


def _dequantized(weight: Tensor, weight_indices: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    dense = scatter_values(weight, weight_indices).to(dtype)
    return dense if weight_scale is None else dense * weight_scale.unsqueeze(-1).to(dtype)


def experts_linear_backward(
    grad: Tensor, offsets: Tensor, weight: Tensor, weight_indices: Tensor, weight_scale: Tensor | None
) -> Tensor:
    """Return the gradient (S, K) of the input of `experts_linear`, through one expert at a time."""
    result = grad.new_zeros(grad.shape[0], 2 * weight.shape[2])
    for expert, rows in rows_of_experts(offsets):
        scale = None if weight_scale is None else weight_scale[expert]
        result[rows] = grad[rows] @ _dequantized(weight[expert], weight_indices[expert], scale, grad.dtype)
    return result


def _remember_experts(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs[1:5])


def _gradients_of_experts(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    """As `_input_gradient`; the bias of an expert has the gradients of its rows."""
    offsets, weight, weight_indices, weight_scale = ctx.saved_tensors
    input_gradient = bias_gradient = None
    if ctx.needs_input_grad[5]:
        rows = torch.arange(grad.shape[0], device=grad.device)
        # Rows behind the last offset belong to nobody: they go to one expert more, which is dropped.
        expert = torch.searchsorted(offsets.to(grad.device, rows.dtype), rows, right=True)
        bias_gradient = grad.new_zeros(weight.shape[0] + 1, grad.shape[1]).index_add(0, expert, grad)[:-1]
    if ctx.needs_input_grad[0]:
        input_gradient = torch.ops.hf_sparse24.experts_linear_backward(
            grad, offsets, weight, weight_indices, weight_scale
        )
    return input_gradient, None, None, None, None, bias_gradient, None, None


for _operator in (linear, quantize_per_token, scaled_linear, experts_linear, experts_linear_backward):
    torch.library.register_kernel(f"hf_sparse24::{_operator.__name__}", None, _operator)
torch.library.register_autograd("hf_sparse24::linear", _input_gradient, setup_context=_remember_operands)
torch.library.register_autograd("hf_sparse24::experts_linear", _gradients_of_experts, setup_context=_remember_experts)
