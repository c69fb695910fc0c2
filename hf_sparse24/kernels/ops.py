"""The operators of the package: the schema and the fake of each one, and nothing else.

Shapes: `input` (..., K); `weight` (N, K/2) and `weight_indices` (N, ceil(K/8)) in format 1 (`hf_sparse24.packing`);
`weight_metadata` what a library on this device reads in place of the indices (`kernels.dispatch.prepare`), or None;
`weight_scale` (N,) float32 exactly when `weight` is int8 or float8_e4m3fn; `bias` (N,) in the dtype of the result;
`backend` as in `Sparse24Config`. With a stack of experts everything that belongs to a weight has E in front, and
`input` (S, K) has the tokens of expert 0 first, then those of expert 1 ...; those of e end before row `offsets[e]`.

- `linear`: input @ weight.T + bias in the dtype of `input`. With 8-bit weights and more than a few tokens the input is
  quantized per token on the way (W8A8); few tokens on a GPU stay in 16 bits (W8A16). Differentiable in `input` and
  `bias`; 8-bit rounding passes gradients straight through.
- `quantize_per_token`: symmetric dynamic quantization of each row; scale (..., 1) float32.
- `scaled_linear`: the W8A8 product of an input that `quantize_per_token` made, for siblings that share one. Without
  `input_scale` (..., 1) that factor is left to the caller, in whose next operation it may be free.
- `experts_linear`: `linear` for each expert of a stack and its own rows; rows behind the last offset give zeros. On a
  GPU `offsets` (E,), int32 or int64, are read there while the average expert has few tokens or little work
  (`kernels.experts.most_grouped_rows`), and tokens count as few by that average; for more rows, and for gradients,
  they are read on the host, which waits for them. Differentiable as `linear` is; `experts_linear_backward` is the
  gradient of the input.

A backend registers kernels for these names with `torch.library.register_kernel`; `kernels.reference` is the default of
every device and the oracle of every test.
"""

import torch
from torch import Tensor

_HOW = 'Tensor? weight_metadata=None, str backend="auto"'
_SCHEMAS = {
    "linear": (
        f"(Tensor input, Tensor weight, Tensor weight_indices, Tensor? weight_scale, Tensor? bias, {_HOW}) -> Tensor"
    ),
    "quantize_per_token": "(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
    "scaled_linear": (
        "(Tensor input, Tensor? input_scale, Tensor weight, Tensor weight_indices, Tensor weight_scale, Tensor? bias, "
        f"ScalarType out_dtype, {_HOW}) -> Tensor"
    ),
    "experts_linear": (
        "(Tensor input, Tensor offsets, Tensor weight, Tensor weight_indices, Tensor? weight_scale, Tensor? bias, "
        f"{_HOW}) -> Tensor"
    ),
    "experts_linear_backward": (
        "(Tensor grad, Tensor offsets, Tensor weight, Tensor weight_indices, Tensor? weight_scale) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"hf_sparse24::{_name}", _schema)


@torch.library.register_fake("hf_sparse24::linear")
def _(
    input: Tensor,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    _check_operands(input, weight, weight_scale)
    torch._check(
        weight_scale is not None or input.dtype == weight.dtype,
        lambda: f"linear: the input is {input.dtype}, the weight {weight.dtype}",
    )
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("hf_sparse24::quantize_per_token")
def _(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape, dtype=dtype), input.new_empty(*input.shape[:-1], 1, dtype=torch.float32)


@torch.library.register_fake("hf_sparse24::scaled_linear")
def _(
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
    _check_operands(input, weight, weight_scale)
    return input.new_empty(*input.shape[:-1], weight.shape[0], dtype=out_dtype)


@torch.library.register_fake("hf_sparse24::experts_linear")
def _(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    check_experts(input, offsets, weight, weight_scale)
    return input.new_empty(input.shape[0], weight.shape[1])


@torch.library.register_fake("hf_sparse24::experts_linear_backward")
def _(grad: Tensor, offsets: Tensor, weight: Tensor, weight_indices: Tensor, weight_scale: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], 2 * weight.shape[2])


def check_experts(input: Tensor, offsets: Tensor, weight: Tensor, weight_scale: Tensor | None) -> None:
    """Raise `RuntimeError` when the operands of `experts_linear` do not fit together."""
    _check_operands(input, weight, weight_scale, dimensions=3)
    torch._check(input.ndim == 2, lambda: f"the input must be 2-D, it has {input.ndim} dimensions")
    torch._check(
        offsets.shape == weight.shape[:1] and offsets.dtype in (torch.int32, torch.int64),
        lambda: f"{weight.shape[0]} experts need as many integer offsets, not {offsets.dtype} {tuple(offsets.shape)}",
    )
    torch._check(
        weight_scale is not None or input.dtype == weight.dtype,
        lambda: f"experts_linear: the input is {input.dtype}, the weight {weight.dtype}",
    )


def _check_operands(input: Tensor, weight: Tensor, weight_scale: Tensor | None, dimensions: int = 2) -> None:
    torch._check(
        weight.ndim == dimensions,
        lambda: f"the packed weight must be {dimensions}-D, it has {weight.ndim} dimensions",
    )
    torch._check(
        input.shape[-1] == 2 * weight.shape[-1],
        lambda: f"the input has {input.shape[-1]} features, the weight {2 * weight.shape[-1]}",
    )
    torch._check(
        (weight_scale is not None) == (weight.dtype in (torch.int8, torch.float8_e4m3fn)),
        lambda: f"a {weight.dtype} weight comes {'without' if weight_scale is not None else 'with'} a scale",
    )
