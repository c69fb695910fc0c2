"""Algorithms of cuSPARSELt, searched ahead of the first use: what `hf-sparse24 tune` does.

A layer searches by itself when it meets a number of tokens whose power of two is new to it, a tenth of a second
each. Searched ahead, not even the first request waits. Choices are kept for this GPU and library in the Hugging Face
cache (`kernels.autotune`), for all models with these shapes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from hf_sparse24.benchmark.shapes import Shape
from hf_sparse24.capability import backend_capability, has_nvmath
from hf_sparse24.kernels.dispatch import FEW_QUANTIZED_TOKENS, FEW_TOKENS, takes_weight
from hf_sparse24.packing import QUANTIZED_DTYPES

MOST_TOKENS = 16384


class Tuned(NamedTuple):
    """The fastest algorithm for a projection (N, K), values of a dtype and about so many tokens."""

    shape: str
    dtype: str
    tokens: int
    algorithm: int
    split_k: int
    microseconds: float


def token_counts(value_dtype: torch.dtype, most: int = MOST_TOKENS) -> list[int]:
    """Return the powers of two for which a library multiplies values of a dtype, up to a number of tokens.

    ```python
    >>> token_counts(torch.int8, 256)
    [64, 128, 256]

    ```
    """
    first = 2 * max(FEW_TOKENS[value_dtype], FEW_QUANTIZED_TOKENS.get(value_dtype, 0))
    return [1 << bits for bits in range(first.bit_length() - 1, most.bit_length()) if 1 << bits <= most]


def tune(
    shapes: Sequence[Shape], precisions: Sequence[str | None], device: torch.device, most: int = MOST_TOKENS
) -> Iterator[Tuned]:
    """Search for every projection, precision and number of tokens that runs through cuSPARSELt here.

    Args:
        shapes (`Sequence[Shape]`): projections.
        precisions (`Sequence[str]`): None for bfloat16, "int8", "fp8".
        device (`torch.device`): a GPU.
        most (`int`): tokens.

    Raises:
        `ValueError`: there is nothing to search, since cuSPARSELt cannot run here or nvmath-python is missing.
    """
    capability = backend_capability("cusparselt")
    if not capability.ok or not has_nvmath():
        raise ValueError(f"There is nothing to tune: cuSPARSELt {capability.reason}.")
    from hf_sparse24.kernels import cusparselt

    for precision in precisions:
        dtype = QUANTIZED_DTYPES[precision] if precision else torch.bfloat16
        for shape in shapes:
            # What torchao's kernel takes never comes here.
            other = takes_weight(dtype, shape.out_features, shape.in_features, "cutlass").ok
            if other or not takes_weight(dtype, shape.out_features, shape.in_features, "cusparselt").ok:
                continue
            for tokens in token_counts(dtype, most):
                choice = cusparselt.tune(shape.out_features, shape.in_features, dtype, tokens, device)
                yield Tuned(str(shape), precision or "bf16", tokens, *choice)
