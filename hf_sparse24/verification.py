"""Whether packed weights that were read are format 1: shapes, dtypes, the order of indices, scales."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hf_sparse24.packing import (
    LARGEST_VALUE,
    PackedWeight,
    check_value_dtype,
    columns_of_values,
    damaged,
    dtype_name,
    indices_width,
)
from hf_sparse24.pattern import GROUP_SIZE

_CHECKED_AT_ONCE = 1 << 24  # bytes of indices


def check_packed(packed: PackedWeight, shape: tuple[int, ...], name: str) -> None:
    """Raise `ValueError` when a packed weight, as read from a file, is not format 1 of a weight of `shape`.

    Args:
        packed (`PackedWeight`): what was read.
        shape (`tuple[int, ...]`): (..., N, K) of the dense weight.
        name (`str`): the module, for the message.
    """
    check_all_packed([(name, packed, shape)])


def check_all_packed(weights: Iterable[tuple[str, PackedWeight, tuple[int, ...]]]) -> None:
    """Do as `check_packed` for many weights, in few passes: on a GPU every answer has to be waited for.

    Args:
        weights (`Iterable[tuple]`): name, packed weight and dense shape of each.
    """
    alike: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}
    scales: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, packed, shape in weights:
        _check_form(packed, shape, name)
        alike.setdefault((shape[-1], packed.weight_indices.device), []).append((name, packed.weight_indices))
        if packed.weight_scale is not None:
            scales.setdefault(packed.weight_scale.device, []).append((name, packed.weight_scale))
    for (in_features, _), named in alike.items():
        for part in _parts(named):
            if not _are_ascending(_joined(part, in_features), in_features):
                for name, indices in part:
                    _check_indices(indices, in_features, name)
    for named in scales.values():
        if not _are_scales(torch.cat([scale.flatten() for _, scale in named])):
            name = next(name for name, scale in named if not _are_scales(scale))
            raise damaged(f"{name}.weight_scale holds a value that is not a positive finite number")


def _check_form(packed: PackedWeight, shape: tuple[int, ...], name: str) -> None:
    """Check shapes and dtypes."""
    *leading, in_features = shape
    check_value_dtype(packed.weight.dtype, name)
    quantized = packed.weight.dtype in LARGEST_VALUE
    expected = {
        "weight": ((*leading, in_features // 2), packed.weight.dtype, packed.weight),
        "weight_indices": ((*leading, indices_width(in_features)), torch.uint8, packed.weight_indices),
    }
    if quantized != (packed.weight_scale is not None):
        state = "missing" if quantized else "present"
        raise damaged(f"{name}.weight_scale is {state} beside {dtype_name(packed.weight.dtype)} values")
    if packed.weight_scale is not None:
        expected["weight_scale"] = (tuple(leading), torch.float32, packed.weight_scale)
    for key, (wanted_shape, wanted_dtype, tensor) in expected.items():
        if tuple(tensor.shape) != wanted_shape:
            raise damaged(
                f"{name}.{key} has shape {tuple(tensor.shape)}, format 1 of {tuple(shape)} has {wanted_shape}"
            )
        if tensor.dtype != wanted_dtype:
            raise damaged(f"{name}.{key} is {dtype_name(tensor.dtype)}, format 1 has {dtype_name(wanted_dtype)}")


def _parts(named: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield tensors in lists of about `_CHECKED_AT_ONCE` bytes."""
    part: list[tuple[str, Tensor]] = []
    for entry in named:
        part.append(entry)
        if sum(tensor.nbytes for _, tensor in part) >= _CHECKED_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _joined(part: list[tuple[str, Tensor]], in_features: int) -> Tensor:
    rows = [indices.reshape(-1, indices_width(in_features)) for _, indices in part]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _are_ascending(indices: Tensor, in_features: int) -> bool:
    """Tell whether rows (M, ceil(K/8)) are indices of format 1, with one answer from the device."""
    first, second = columns_of_values(indices, in_features // GROUP_SIZE)
    wrong = (first >= second).any()
    if in_features % (2 * GROUP_SIZE):
        wrong |= (indices[:, -1] >= 16).any()  # the nibble of no group
    return not bool(wrong)


def _are_scales(scale: Tensor) -> bool:
    return bool((scale.isfinite() & (scale > 0)).all())


def _check_indices(indices: Tensor, in_features: int, name: str) -> None:
    first, second = columns_of_values(indices, in_features // GROUP_SIZE)
    descending = first >= second
    if bool(descending.any()):
        where = tuple(descending.nonzero()[0].tolist())
        raise damaged(f"{name}.weight_indices is not ascending, the first time at (row, group) {where}")
    if in_features % (2 * GROUP_SIZE) and bool((indices[..., -1] >> 4).any()):
        raise damaged(f"{name}.weight_indices has a nonzero unused last nibble")
