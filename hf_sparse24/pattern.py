"""The 2:4 pattern itself: which two of every four consecutive weights stay.

A weight is 2:4 when every group of four consecutive elements along its *input* dimension holds at most two nonzeros
(Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378). The input dimension is the last one
of `nn.Linear.weight` (out, in) and of most fused experts (expert, out, in); it is `dim=-2` for `Conv1D` (in, out) and
for transposed experts (expert, in, out).

Everything here works on blocks of rows that fit a core's cache: on a CPU that is eight times as fast as `topk`.
Only `apply_mask_` and `prune_into` write to an argument, and nothing makes a -0.0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZE = 4

# A core's cache wants small blocks; a GPU large launches, but no second model in memory.
_BLOCK_ELEMENTS = 1 << 18
_BLOCK_ELEMENTS_GPU = 1 << 24


@dataclass(frozen=True, slots=True)
class Violations:
    """What a check of the pattern found.

    Attributes:
        count (`int`): groups of four with more than two nonzeros.
        groups (`int`): all groups of the tensor.
        first (`tuple[int, ...]` or `None`): index of the first element of the first violating group.
    """

    count: int
    groups: int
    first: tuple[int, ...] | None


def check_in_features(in_features: int, name: str) -> None:
    """Raise `ValueError` when rows of `in_features` weights cannot be cut into groups of four."""
    if in_features % GROUP_SIZE:
        remedy = f"modules_to_not_convert=['{name.rpartition('.')[2]}']" if "." in name else "modules_to_not_convert"
        raise ValueError(
            f"2:4 needs in_features divisible by {GROUP_SIZE}; {name} has {in_features}. Keep it dense with {remedy}."
        )


def check_present(weight: Tensor, name: str) -> None:
    """Raise `ValueError` when a weight has no values here: it is on the meta device, as offloaded weights are."""
    if weight.is_meta:
        raise ValueError(f"{name} is offloaded or on the meta device. Load the model onto one device first.")


def check_finite(weight: Tensor, name: str) -> None:
    """Raise `ValueError` when `weight` holds a NaN or an infinity, which no saliency can rank.

    Args:
        weight (`Tensor`): any shape, any floating dtype.
        name (`str`): how the tensor is called in the message.
    """
    for block in _row_blocks(weight, -1):
        # One pass that carries NaN and inf; a sum that merely overflows is told apart by the exact test.
        if not torch.isfinite(_comparable(block).sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(_comparable(weight))).sum())
            if bad:
                raise ValueError(
                    f"2:4 needs finite weights; {name} holds {bad} NaN or infinite value(s). "
                    "Repair the checkpoint, or keep this module dense with modules_to_not_convert."
                )
            return


def mask_2to4(scores: Tensor, dim: int = -1) -> Tensor:
    """Keep the two highest scores of every four consecutive ones along `dim`.

    Of equal scores the one with the lower column stays. The mask therefore depends on nothing but the scores.

    Args:
        scores (`Tensor`): 2-D or 3-D, any real dtype, without NaN; `scores.shape[dim]` divisible by 4.
        dim (`int`): the input dimension.

    Returns:
        `Tensor`: bool, shape of `scores`; exactly two of four are True.

    Raises:
        `ValueError`: when the dimension is not divisible by four.

    ```python
    >>> mask_2to4(torch.tensor([[1.0, -4.0, 3.0, 3.0]]).abs()).int().tolist()
    [[0, 1, 1, 0]]

    ```
    """
    check_in_features(scores.shape[dim], "the tensor")
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for score_block, mask_block in zip(_row_blocks(scores, dim), _row_blocks(mask, dim), strict=True):
        torch.stack(_top_two(score_block), -1, out=mask_block.unflatten(-1, (-1, GROUP_SIZE)))
    return mask


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Write +0.0 into `weight`, in place, wherever `mask` is False or the weight is zero of either sign; return it.

    Multiplying by the mask would make -0.0 of every negative weight, which compressors take for a nonzero.

    Args:
        weight (`Tensor`): any shape, any floating dtype.
        mask (`Tensor`): bool, the shape of `weight`.
    """
    for block, kept in zip(_row_blocks(weight, -1), _row_blocks(mask, -1), strict=True):
        bits_of(block).copy_(keep_bits(positive_zero_bits(block), kept))
    return weight


def prune_2to4(weight: Tensor, scores: Tensor | None = None, dim: int = -1) -> Tensor:
    """Return a 2:4 copy of `weight`, keeping in each group the two weights with the highest scores.

    Args:
        weight (`Tensor`): 2-D or 3-D, any floating dtype.
        scores (`Tensor`, *optional*): shape of `weight`; default is the magnitude.
        dim (`int`): the input dimension.
    """
    return apply_mask_(weight.clone(), mask_2to4(_comparable(weight).abs() if scores is None else scores, dim))


def prune_into(target: Tensor, weight: Tensor, saliency: Callable[[Tensor], Tensor], dim: int = -1) -> None:
    """Write a 2:4 copy of `weight` into `target`, which may be `weight` itself, a block of rows at a time.

    Nothing of the size of the weight is allocated, and a block stays in the cache for all that is done to it.

    Args:
        target (`Tensor`): the shape and dtype of `weight`.
        weight (`Tensor`): 2-D or 3-D, any floating dtype.
        saliency (`Callable`): from a block of whole rows (rows, K) to scores of that shape.
        dim (`int`): the input dimension.
    """
    for source, written in zip(_row_blocks(weight, dim), _row_blocks(target, dim), strict=True):
        mask = mask_2to4(saliency(source))
        bits_of(written).copy_(keep_bits(positive_zero_bits(source), mask))


def find_violations(weight: Tensor, dim: int = -1) -> Violations:
    """Count the groups of four along `dim` that hold more than two nonzeros, and say where the first one is.

    Args:
        weight (`Tensor`): 2-D or 3-D, any dtype; -0.0 counts as zero, NaN as a nonzero.
        dim (`int`): the input dimension.

    ```python
    >>> find_violations(torch.tensor([[1.0, 0, 2, 0], [1, 2, 3, 0]]))
    Violations(count=1, groups=2, first=(1, 0))

    ```
    """
    check_in_features(weight.shape[dim], "the tensor")
    count, start, first_flat = 0, 0, None
    for block in _row_blocks(weight, dim):
        crowded = crowded_groups(is_nonzero(block))
        found = int(crowded.sum())
        if found and first_flat is None:
            first_flat = start + int(crowded.flatten().to(torch.uint8).argmax())
        count, start = count + found, start + crowded.numel()
    return Violations(count, start, None if first_flat is None else _group_index(first_flat, weight.shape, dim))


def density(weight: Tensor) -> float:
    """Return the share of nonzeros, from 0 to 1. -0.0 counts as zero."""
    nonzeros = sum(int(is_nonzero(block).sum()) for block in _row_blocks(weight, -1))
    return nonzeros / max(weight.numel(), 1)


def group_columns(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four columns of all groups: views of `weight` (..., K), each of shape (..., K / 4)."""
    first, second, third, fourth = weight.unflatten(-1, (-1, GROUP_SIZE)).unbind(-1)
    return first, second, third, fourth


def bits_of(tensor: Tensor) -> Tensor:
    """View a tensor as signed integers of the same width: what moves bits need not know their meaning."""
    return tensor.view(_BITS[tensor.element_size()])


def is_nonzero(tensor: Tensor) -> Tensor:
    """Return a bool tensor, False for zeros of either sign. For all dtypes, and faster than comparing with zero."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = bits_of(tensor) & 127
    return tensor.to(torch.bool)


def positive_zero_bits(tensor: Tensor) -> Tensor:
    """Return a copy of the bits with +0.0 for -0.0, the one value that is zero and has bits."""
    if tensor.is_floating_point() and tensor.element_size() > 1:
        return bits_of(tensor + 0)
    return keep_bits(bits_of(tensor), is_nonzero(tensor))


def keep_bits(bits: Tensor, kept: Tensor) -> Tensor:
    """Return `bits` where `kept`, else 0: on a CPU twenty times as fast as `torch.where`."""
    return kept.to(bits.dtype).neg_().bitwise_and_(bits)


def crowded_groups(nonzero: Tensor) -> Tensor:
    """Tell which groups of four of a bool tensor (..., K) hold more than two True: bool, (..., K / 4)."""
    a, b, c, d = (column.contiguous() for column in group_columns(nonzero))
    return (a & b & (c | d)) | (c & d & (a | b))


def _top_two(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tell which of the four columns stay: those that beat two others; a tie goes to the lower column."""
    a, b, c, d = group_columns(_order_preserving_integers(scores))
    pairs = ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d))
    if scores.dtype == torch.bool:  # logic is faster than comparing
        a_b, a_c, a_d, b_c, b_d, c_d = (x | ~y for x, y in pairs)
    else:
        a_b, a_c, a_d, b_c, b_d, c_d = (x >= y for x, y in pairs)
    b_a, c_a, c_b = ~a_b, ~a_c, ~b_c
    lost_by_d = (a_d & b_d) | ((a_d | b_d) & c_d)
    return (
        (a_b & a_c) | ((a_b | a_c) & a_d),
        (b_a & b_c) | ((b_a | b_c) & b_d),
        (c_a & c_b) | ((c_a | c_b) & c_d),
        lost_by_d.logical_not_(),
    )


def _order_preserving_integers(tensor: Tensor) -> Tensor:
    """Map floats to integers of the same width and order: 16-bit floats compare slowly, 8-bit ones not at all."""
    if not tensor.is_floating_point() or tensor.element_size() > 2:
        return tensor
    bits = bits_of(tensor)
    sign = bits >> (8 * bits.element_size() - 1)  # -1 for negative values, else 0
    return (bits & torch.iinfo(bits.dtype).max).bitwise_xor_(sign).sub_(sign)


def _group_index(flat: int, shape: torch.Size, dim: int) -> tuple[int, ...]:
    """Turn the running number of a group, counted with `dim` moved last, into an index of the tensor."""
    moved = [size for axis, size in enumerate(shape) if axis != dim % len(shape)] + [shape[dim] // GROUP_SIZE]
    index = []
    for size in reversed(moved):
        flat, position = divmod(flat, size)
        index.append(position)
    group, *rest = index
    result = rest[::-1]
    result.insert(dim % len(shape), group * GROUP_SIZE)
    return tuple(result)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _comparable(tensor: Tensor) -> Tensor:
    """8-bit floats have no arithmetic of their own in torch: widen them. Everything else is returned as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _row_blocks(tensor: Tensor, dim: int) -> Iterator[Tensor]:
    """Yield views of some whole rows each, with `dim` moved last."""
    rows = tensor.movedim(dim, -1) if tensor.ndim > 1 else tensor[None]
    for matrix in rows if rows.ndim > 2 else (rows,):
        elements = _BLOCK_ELEMENTS if tensor.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
        yield from matrix.split(max(1, elements // max(matrix.shape[-1], 1)))
