"""Format 1: the portable form of a 2:4 weight, as it stands in a checkpoint.

For a projection of shape (N, K), K divisible by 4 (a leading expert dimension is allowed everywhere):

- `weight` (N, K/2): the two kept values of each group of four, ascending column order, row-major;
- `weight_indices` (N, ceil(K/8)) uint8: a nibble a group, `i0 | i1 << 2` with i0 < i1 the columns of the two values;
  the even group lies in the low nibble, and the high nibble of an odd last byte is zero;
- `weight_scale` (N,) float32, only with 8-bit values: real weight = value * scale.

No vendor layout: cuSPARSELt's, CUTLASS's and torchao's buffers all begin with these same values, and their metadata is
rebuilt on the device. A group with fewer than two nonzeros stores explicit zeros in its lowest free columns, so that a
weight has exactly one packed form. Nothing here knows of modules or files.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse24.pattern import (
    GROUP_SIZE,
    bits_of,
    check_in_features,
    crowded_groups,
    find_violations,
    group_columns,
    is_nonzero,
    keep_bits,
    mask_2to4,
    positive_zero_bits,
)

FORMAT_VERSION = 1

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn)
QUANTIZED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST_VALUE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_TOKEN_SCALE = 2.0**-120  # below it a token is zero: the inverse of its scale would be too large for float32

_BLOCK_ELEMENTS = 1 << 20


class PackedWeight(NamedTuple):
    """A 2:4 weight in format 1; the shapes are in the module's docstring."""

    weight: Tensor
    weight_indices: Tensor
    weight_scale: Tensor | None = None

    def of_expert(self, expert: int) -> "PackedWeight":
        """Return the packed weight (N, K/2) of one expert of a stack, a view."""
        scale = None if self.weight_scale is None else self.weight_scale[expert]
        return PackedWeight(self.weight[expert], self.weight_indices[expert], scale)


def indices_width(in_features: int) -> int:
    """Return how many bytes hold the indices of one row."""
    return math.ceil(in_features / (2 * GROUP_SIZE))


def pack_weight(weight: Tensor, quantization: str | None = None, name: str = "the weight") -> PackedWeight:
    """Pack a weight that is already 2:4.

    Args:
        weight (`Tensor`): (N, K) or (E, N, K) in one of `VALUE_DTYPES`.
        quantization (`str`, *optional*): `"int8"` or `"fp8"` to quantize the kept values per output channel.
        name (`str`): how the tensor is called in a message.

    Raises:
        `ValueError`: the weight is not 2:4, or its shape, dtype or `quantization` has no packed form.

    ```python
    >>> packed = pack_weight(torch.tensor([[0.0, 5, 0, 7, 1, 0, 0, 0]]))
    >>> packed.weight.tolist(), packed.weight_indices.tolist()
    ([[5.0, 7.0, 1.0, 0.0]], [[77]])

    ```
    """
    check_value_dtype(weight.dtype, name)
    check_in_features(weight.shape[-1], name)
    *leading, in_features = weight.shape
    values = torch.empty(*leading, in_features // 2, dtype=weight.dtype, device=weight.device)
    indices = torch.empty(*leading, indices_width(in_features), dtype=torch.uint8, device=weight.device)
    for source, value_block, index_block in zip(
        _blocks(weight, in_features), _blocks(values, in_features), _blocks(indices, in_features), strict=True
    ):
        nonzero = is_nonzero(source)
        if bool(crowded_groups(nonzero).any()):
            raise _not_2to4(weight, name)
        _pack_block(source, nonzero, value_block, index_block)
    if quantization is None:
        return PackedWeight(values, indices)
    quantized, scale = quantize_rows(values, quantization)
    return PackedWeight(quantized, indices, scale)


def unpack_weight(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dense (..., N, K) weight with explicit zeros.

    Args:
        packed (`PackedWeight`): as `pack_weight` returns it. With a scale the values are multiplied by it.
        dtype (`torch.dtype`, *optional*): of the result; default is that of the values, or float32 with a scale.
    """
    values, scale = packed.weight, packed.weight_scale
    if scale is not None:
        values = values.float() * scale.unsqueeze(-1)
    wanted = dtype or (packed.weight.dtype if scale is None else torch.float32)
    if values.dtype != wanted:
        values = values.to(wanted)
        values = positive_zero_bits(values).view(wanted)  # small negative values may have become -0.0
    return scatter_values(values, packed.weight_indices)


def scatter_values(values: Tensor, indices: Tensor) -> Tensor:
    """Write packed values (..., K/2) into a dense tensor (..., K) of the same dtype, +0 elsewhere."""
    in_features = values.shape[-1] * 2
    dense = torch.empty(*values.shape[:-1], in_features, dtype=values.dtype, device=values.device)
    for value_block, index_block, target in zip(
        _blocks(values, in_features), _blocks(indices, in_features), _blocks(dense, in_features), strict=True
    ):
        low, high = bits_of(value_block).unflatten(-1, (-1, 2)).unbind(-1)
        first, second = columns_of_values(index_block, in_features // GROUP_SIZE)
        columns = [keep_bits(low, first == c) | keep_bits(high, second == c) for c in range(GROUP_SIZE)]
        bits_of(target).copy_(torch.stack(columns, -1).flatten(-2))
    return dense


def ones_in_places(packed: PackedWeight) -> Tensor:
    """Return a dense (..., N, K) tensor in the dtype of the values: one where a value is kept, also a zero, else zero.

    From it a library makes its own form of the indices; from the weight it would drop the zeros that format 1 keeps.
    """
    one = bits_of(torch.ones((), dtype=torch.float32).to(packed.weight.dtype))
    ones = torch.full(packed.weight.shape, int(one), dtype=one.dtype, device=packed.weight.device)
    return scatter_values(ones.view(packed.weight.dtype), packed.weight_indices)


def quantize_rows(weight: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """Quantize symmetrically, one scale an output channel.

    INT8 rounds to the nearest integer (halves to even) in [-127, 127], to which the largest magnitude of a row maps.
    FP8 is e4m3 with scales that are powers of two: its steps grow with the value, so that a finer scale buys nothing,
    and values that were rounded before (see `criteria.rounding`) are packed as they are. A row of zeros has scale 1.
    Zero stays zero and never becomes -0.0.

    Args:
        weight (`Tensor`): (..., N, K), floating; dense or the values of a packed weight.
        quantization (`str`): `"int8"` or `"fp8"`.

    Returns:
        `tuple[Tensor, Tensor]`: values (..., N, K) in int8 or float8_e4m3fn, and scale (..., N) in float32.
    """
    if quantization not in QUANTIZED_DTYPES:
        raise ValueError(f"quantization must be one of {sorted(QUANTIZED_DTYPES)}; got {quantization!r}.")
    dtype = QUANTIZED_DTYPES[quantization]
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise ValueError(f"Only float32, float16 and bfloat16 weights can be quantized; got {weight.dtype}.")
    width = weight.shape[-1]
    quantized = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    for source, target, target_scale in zip(
        _blocks(weight, width), _blocks(quantized, width), _blocks(scale.unsqueeze(-1), width), strict=True
    ):
        target_scale.copy_(weight_scale(source, dtype))
        rounded = round_to(source.float() / target_scale, dtype)
        bits_of(target).copy_(positive_zero_bits(rounded))
    return quantized, scale


def absmax_scale(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 scale (..., 1) that maps each row's largest magnitude to the largest value of `dtype`.

    A row of zeros gets 1. NaN and infinity stay in the scale, so that what is computed with it is not finite either.
    """
    largest = tensor.abs().amax(-1, keepdim=True).float()
    # Tensor by tensor: a GPU multiplies by the reciprocal of a scalar, which is another float now and then.
    scale = largest / torch.full_like(largest, LARGEST_VALUE[dtype])
    return torch.where(scale == 0, 1.0, scale)


def weight_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 scale (..., 1) of each row of a weight: `absmax_scale`, for FP8 the power of two above it."""
    scale = absmax_scale(weight, dtype)
    if dtype != torch.float8_e4m3fn:
        return scale
    mantissa, _ = torch.frexp(scale)  # in [0.5, 1)
    return torch.where(mantissa == 0.5, scale, scale / mantissa)


def quantize_tokens(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize activations symmetrically, one scale a token.

    A token is multiplied by the inverse of its scale: a division for every feature would cost a GPU more than reading
    them. A token of zeros, or next to it, has scale 1; NaN and infinity stay in the scale.

    Args:
        input (`Tensor`): (..., K), any floating dtype.
        dtype (`torch.dtype`): torch.int8 or torch.float8_e4m3fn.

    Returns:
        `tuple[Tensor, Tensor]`: values (..., K) in `dtype`, and scale (..., 1) in float32.
    """
    scale = absmax_scale(input, dtype)
    scale = torch.where(scale < SMALLEST_TOKEN_SCALE, 1.0, scale)
    return round_to(input.float() * (torch.ones_like(scale) / scale), dtype), scale


def round_to(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 `scaled` to int8 (halves to even) or to float8_e4m3fn, saturating; FP8 may give -0.0."""
    bound = LARGEST_VALUE[dtype]
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(-bound, bound).to(dtype)


def damaged(found: str) -> ValueError:
    """Return the error for a packed checkpoint that is not format 1."""
    return ValueError(f"The packed checkpoint is damaged: {found}. Download or save it again.")


def check_value_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise `ValueError` when values of `dtype` have no packed form."""
    if dtype not in VALUE_DTYPES:
        known = ", ".join(map(dtype_name, VALUE_DTYPES))
        raise ValueError(
            f"Format 1 stores {known}; {name} is {dtype_name(dtype)}. Load the model with one of these dtypes."
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def _not_2to4(weight: Tensor, name: str) -> ValueError:
    found = find_violations(weight)
    return ValueError(
        f"Packing needs a 2:4 weight; {found.count} of the {found.groups} groups of {name} hold more than two "
        f"nonzeros, the first at {found.first}. Prune it with prune_ first."
    )


def _pack_block(weight: Tensor, nonzero: Tensor, values: Tensor, indices: Tensor) -> None:
    """Fill `values` and `indices` with the packed form of a block of rows."""
    # The mask of "is nonzero" is the canonical one: nonzeros first, then the lowest columns.
    keeps_a, keeps_b, keeps_c, keeps_d = group_columns(mask_2to4(nonzero))
    drops_a, drops_d = ~keeps_a, ~keeps_d
    a, b, c, d = group_columns(positive_zero_bits(weight))
    low = keep_bits(a, keeps_a) | keep_bits(b, drops_a & keeps_b) | keep_bits(c, drops_a & ~keeps_b)
    high = keep_bits(d, keeps_d) | keep_bits(c, drops_d & keeps_c) | keep_bits(b, drops_d & ~keeps_c)
    bits_of(values).copy_(torch.stack((low, high), -1).flatten(-2))
    first = drops_a.to(torch.uint8).add_(drops_a & ~keeps_b)
    second = (keeps_c | keeps_d).to(torch.uint8).add_(keeps_d).add_(1)
    nibbles = second.mul_(4).add_(first)
    indices.copy_(nibbles[..., ::2])
    indices[..., : nibbles.shape[-1] // 2].add_(nibbles[..., 1::2] * 16)


def columns_of_values(indices: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the columns, 0 to 3, of the first and second value of each group, each (..., groups) uint8."""
    nibbles = torch.stack((indices & 15, indices >> 4), -1).flatten(-2)[..., :groups]
    return nibbles & 3, nibbles >> 2


def _blocks(tensor: Tensor, row_elements: int) -> tuple[Tensor, ...]:
    """Cut a (..., N, x) tensor into blocks of the rows that hold about a million weights on a CPU, all on a GPU."""
    rows = tensor.flatten(0, -2)
    if tensor.device.type != "cpu":
        return (rows,)
    return rows.split(max(1, _BLOCK_ELEMENTS // max(row_elements, 1)))
