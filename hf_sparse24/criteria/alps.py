"""ALPS (Meng et al. 2024, arXiv:2406.07831): ADMM on the layer's least squares problem, with 2:4 as the constraint.

Columns are normalized so that the Hessian has a unit diagonal: the projection to 2:4 then weighs each weight by the
norm of its input, as Wanda does. Two copies of the weights are pulled together, B which fits the outputs and Z which
is 2:4, and the pull rho grows while the support of Z still moves.

It is a heuristic: the problem is not convex, and even without any correlation it ends up to a percent above the best.

The paper decomposes the Hessian into eigenvectors once and puts the inverse of H + rho I together from them. Here it
is formed through a new Cholesky factor whenever rho changes: half the arithmetic of the putting together, and no
eigenvectors.
"""

import torch
from torch import Tensor

from hf_sparse24.criteria.objective import Objective
from hf_sparse24.pattern import prune_2to4

_FIRST_RHO = 0.1
_CHECK_EVERY = 3
_FEWEST, _STABLE = 30, 3e-4  # iterations, and the share of the support that may still move after them
# By how much rho grows, by the share of the support that moved since the last check.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(objective: Objective, iterations: int = 60) -> Tensor:
    """Return 2:4 weights (N, K) float32.

    Rows are independent but for the schedule of rho: the weights of projections that read the same input may be
    stacked.

    Args:
        objective (`Objective`): the layer's problem, symmetric or not.
        iterations (`int`): at most this many; it stops when the support is stable.
    """
    norms = objective.hessian.diagonal().sqrt()
    hessian = objective.hessian / norms / norms[:, None]
    linear = objective.linear / norms
    kept = prune_2to4(objective.weight * norms)  # Z
    dual = torch.zeros_like(kept)  # Y
    rho, support = _FIRST_RHO, kept != 0
    inverse = _inverse(hessian, rho)
    for iteration in range(1, iterations + 1):
        fitted = (linear - dual + rho * kept) @ inverse  # B
        kept = prune_2to4(fitted + dual / rho)
        dual.add_(fitted - kept, alpha=rho)
        if iteration % _CHECK_EVERY:
            continue
        moved, support = _moved(support, kept != 0), kept != 0
        if moved == 0 or (iteration >= _FEWEST and moved < _STABLE):
            break
        rho *= next(factor for least, factor in _GROWTH if moved > least)
        inverse = _inverse(hessian, rho)
    return kept / norms


def _inverse(hessian: Tensor, rho: float) -> Tensor:
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _moved(before: Tensor, after: Tensor) -> float:
    """Return the share of the support that is new."""
    return float((after & ~before).sum() / after.sum().clamp_min(1))
