"""A stack of packed projections for few tokens each, as the experts of a mixture are: `decode.cu` in one launch.

Where the tokens of each expert end is read on the device alone, so that the host waits for nothing and a CUDA graph
can be captured. The host knows how many rows there are in all. From that it takes the size of a block's tile of
tokens, for what most experts have, and how many tiles there can be at most: an expert with more tokens takes more
tiles, one without takes none, and the blocks that are left end at once.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse24.kernels.decode import (
    ALIGNMENT,
    MOST_QUANTIZED_TOKENS,
    MOST_TOKENS,
    aligned,
    decode_capability,
    definitions,
    scaled_capability,
)
from hf_sparse24.kernels.decode_blocks import Block, Problem, tiles
from hf_sparse24.kernels.nvrtc import allow_shared_memory, clusters_at_once, device_capability, launch, load
from hf_sparse24.packing import PackedWeight

_SCALES = 4  # whose number is a multiple of it: scales and biases of an expert
_TOKEN_TILES = (1, 2, 4, 8, 16)  # of 8 tokens


def grouped_linear(
    input: Tensor,
    input_scale: Tensor | None,
    offsets: Tensor,
    stack: PackedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return each expert's product with its own rows, as `decode` has it for one; zeros in rows of nobody.

    Args:
        input (`Tensor`): (S, K) on a GPU, in float16 or bfloat16 or quantized as the stack is (W8A8): the rows of
            expert 0, those of expert 1 ...
        input_scale (`Tensor`, *optional*): float32, a factor for each quantized row.
        offsets (`Tensor`): (E,) int32 on the same GPU: before which row those of each expert end. They must not
            decrease; those below 0 or above S are taken for these.
        stack (`PackedWeight`): values (E, N, K/2), between whose experts there may be a gap; indices (E, N, K/8); with
            8 bits a scale (E, N) in float32.
        bias (`Tensor`, *optional*): (E, N) in `out_dtype`.
        out_dtype (`torch.dtype`): float16 or bfloat16; that of `input` if it is not quantized.

    Raises:
        `ValueError`: dtypes, a width or a GPU that the kernel does not take (see `decode`), or operands that it would
            read wrongly.
    """
    _check(input, input_scale, offsets, stack, bias, out_dtype)
    (rows, features), (experts, outputs, _) = input.shape, stack.weight.shape
    result = input.new_empty((rows, outputs), dtype=out_dtype)
    if not (rows and outputs):
        return result
    weight, indices = _aligned_experts(stack.weight), aligned(stack.weight_indices)
    scale, bias = (None if part is None else _padded(part) for part in (stack.weight_scale, bias))
    input_scale = None if input_scale is None else input_scale.contiguous()
    offsets = offsets.contiguous()
    tensors = (aligned(input), input_scale, weight, indices, scale, bias, result, offsets)
    busy, device = min(experts, rows), input.get_device()
    tile = token_tiles(rows / busy, MOST_TOKENS if input.itemsize == 2 else MOST_QUANTIZED_TOKENS)
    block, kernel = _compiled(input.dtype, weight.dtype, out_dtype, tile, outputs, features, busy, device)
    grid = (most_tiles(rows, experts, block.tokens), -(-outputs // block.rows) * block.cluster)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    sizes = (experts, weight.stride(0) * weight.itemsize, rows, outputs, features)
    size = block.shared_memory(weight.dtype, input.dtype)
    launch(kernel, grid, block.threads, (*addresses, *sizes), device, size)
    return result


def token_tiles(tokens: float, most_tokens: int) -> int:
    """Return how many tiles of 8 tokens a block should have, for what most experts have if `tokens` is the average.

    If tokens choose their experts at random, 98 of 100 experts have at most two standard deviations more than that.

    ```python
    >>> [token_tiles(tokens, 64) for tokens in (1, 4, 16, 200)]
    [1, 1, 4, 8]

    ```
    """
    likely = min(tokens + 2 * math.sqrt(tokens), most_tokens)
    return next(tiles for tiles in _TOKEN_TILES if 8 * tiles >= likely)


def most_tiles(rows: int, experts: int, tokens: int) -> int:
    """Return how many tiles of so many tokens there can be, for any offsets; rows of nobody have tiles of their own.

    ```python
    >>> most_tiles(8, 128, 8), most_tiles(128, 8, 8)  # one row each; a last row behind 7 full tiles of each expert
    (8, 23)

    ```
    """
    return (rows + min(experts + 1, rows) * (tokens - 1)) // tokens


@functools.cache
def _compiled(
    input_dtype: torch.dtype,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    tile: int,
    outputs: int,
    features: int,
    experts: int,
    device: int,
) -> tuple[Block, Any]:
    """Return the block for so many experts at work at once, and its kernel."""
    capability = device_capability(device)
    at_once = functools.partial(clusters_at_once, device=device)
    problem = Problem(outputs, features, value_dtype, input_dtype, capability, at_once, experts)
    block = tiles(tile, problem)
    kernel = _kernel(input_dtype, value_dtype, out_dtype, block, problem.blocks_at_once(block), capability)
    size = block.shared_memory(value_dtype, input_dtype)
    allow_shared_memory(kernel, size, device)
    return block, kernel


@functools.cache
def _kernel(
    input_dtype: torch.dtype,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    block: Block,
    at_once: int,
    capability: tuple[int, int],
) -> Any:
    """Return the kernel for one shape of blocks, which serves every device of a compute capability."""
    names = grouped_definitions(input_dtype, value_dtype, out_dtype, block, at_once)
    return load("decode.cu", "few_tokens_linear", names, capability)


def grouped_definitions(
    input_dtype: torch.dtype, value_dtype: torch.dtype, out_dtype: torch.dtype, block: Block, at_once: int
) -> dict[str, int]:
    """Return what `decode.cu` wants to be defined for a stack, and so many blocks of a multiprocessor at once."""
    return {**definitions(input_dtype, value_dtype, out_dtype, block), "GROUPED": 1, "LEAST_BLOCKS": at_once}


def _check(
    input: Tensor,
    input_scale: Tensor | None,
    offsets: Tensor,
    stack: PackedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise `ValueError` where the kernel does not take these operands, or would read one of them wrongly."""
    weight, device = stack.weight, input.get_device()
    if input.itemsize == 1:
        capability = scaled_capability(weight.dtype, input.shape[1], out_dtype, device_capability(device))
    else:
        capability = decode_capability(input.dtype, weight.dtype, input.shape[1])
    if not capability.ok:
        raise ValueError(f"The kernel for few tokens {capability.reason}.")
    experts, outputs, half = weight.shape
    expected = (
        (input, input.dtype if input.itemsize == 1 else out_dtype, (len(input), 2 * half)),
        (input_scale, torch.float32, (len(input), 1)),
        (offsets, torch.int32, (experts,)),
        (stack.weight_indices, torch.uint8, (experts, outputs, half // 4)),
        (stack.weight_scale, torch.float32, (experts, outputs)),
        (bias, out_dtype, (experts, outputs)),
    )
    for tensor, dtype, shape in expected:
        if tensor is not None and (tensor.dtype, tensor.shape, tensor.get_device()) != (dtype, shape, device):
            raise ValueError(
                f"The kernel for experts takes {dtype} {shape} on {input.device}; got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}."
            )
    if input.itemsize == 1 and input.dtype != weight.dtype:
        raise ValueError("The kernel for few tokens takes activations quantized as the weight is.")


def _aligned_experts(weight: Tensor) -> Tensor:
    """Return values whose experts are contiguous and aligned each, with whatever is between them."""
    begin_there = weight.data_ptr() % ALIGNMENT == weight.stride(0) * weight.itemsize % ALIGNMENT == 0
    return weight if begin_there and weight[0].is_contiguous() else aligned(weight)


def _padded(rows: Tensor) -> Tensor:
    """Return scales or biases (E, N) with room for a multiple of four in each row: a copy where there is none."""
    missing = -rows.shape[1] % _SCALES
    return aligned(F.pad(rows, (0, missing)) if missing else rows)
