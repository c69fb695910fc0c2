"""Masks that are 2:4 along both dimensions, so that the gradient of the input can use the sparse weight as well.

In each tile of 4 x 4 every row and every column keeps two weights; there are 90 such patterns (Hubara et al. 2021,
arXiv:2102.08124). The best of them is found exactly, by one product of all tiles with all patterns (Hu et al. 2024,
arXiv:2404.01847).
"""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from hf_sparse24.pattern import GROUP_SIZE
from hf_sparse24.training.policies.base import Frozen

_TILES_AT_ONCE = 1 << 18


class Transposable(Frozen):
    """A frozen mask that is 2:4 along both dimensions, chosen at the start; best from dense weights."""

    name = "transposable"
    starts_dense = True
    shards = False

    def search(self, scores: Tensor, dim: int) -> Tensor:
        """Return the best mask for scores: bool, True for what stays."""
        return transposable_mask(scores)


def transposable_mask(scores: Tensor) -> Tensor:
    """Keep the 2:4 pattern along both dimensions whose scores have the highest sum, in each tile of 4 x 4.

    Args:
        scores (`Tensor`): (out, in), any real dtype, without NaN; both divisible by four.

    Returns:
        `Tensor`: bool, shape of `scores`; two of four in every row and column of every tile.

    Raises:
        `ValueError`: it is not a matrix of whole tiles.
    """
    if scores.ndim != 2 or scores.shape[0] % GROUP_SIZE or scores.shape[1] % GROUP_SIZE:
        raise ValueError(
            f"A transposable mask needs a matrix of both dimensions divisible by {GROUP_SIZE}; this one is "
            f"{' x '.join(map(str, scores.shape))}. Keep it dense with modules_to_not_convert."
        )
    rows, columns = (size // GROUP_SIZE for size in scores.shape)
    tiles = scores.float().view(rows, GROUP_SIZE, columns, GROUP_SIZE).transpose(1, 2).reshape(-1, GROUP_SIZE**2)
    patterns = transposable_patterns(str(scores.device))
    best = torch.cat([(part @ patterns.T).argmax(-1) for part in tiles.split(_TILES_AT_ONCE)])
    kept = patterns[best].bool().view(rows, columns, GROUP_SIZE, GROUP_SIZE)
    return kept.transpose(1, 2).reshape(scores.shape)


@cache
def transposable_patterns(device: str = "cpu") -> Tensor:
    """Return the 90 patterns of a tile: (90, 16) float32, row-major."""
    rows = [[float(column in pair) for column in range(GROUP_SIZE)] for pair in combinations(range(GROUP_SIZE), 2)]
    tiles = torch.tensor(list(product(rows, repeat=GROUP_SIZE)))
    return tiles[(tiles.sum(1) == 2).all(-1)].flatten(1).to(device)
