"""Refit: the best values for the weights that stay, once it is known which.

For a fixed mask the layer's problem is convex, and separate for each row: H_SS v_S = g_S on the row's support S.
Masked conjugate gradients solve it for all rows at once with one matrix product an iteration, and the Jacobi
preconditioner takes out the scale of the inputs.
"""

import torch
from torch import Tensor

from hf_sparse24.criteria.objective import Objective


def refit(
    objective: Objective, mask: Tensor, start: Tensor | None = None, iterations: int = 30, tolerance: float = 1e-4
) -> Tensor:
    """Return the weights (N, K) on `mask` that minimize the objective; never worse than `start` on the mask.

    Args:
        objective (`Objective`): the layer's problem, symmetric or not.
        mask (`Tensor`): bool (N, K), the weights that stay.
        start (`Tensor`, *optional*): (N, K), where to start from; default: the dense weights on the mask.
        iterations (`int`): at most this many.
        tolerance (`float`): stop when no row's residual is above this share of its right-hand side.
    """
    hessian, linear = objective.hessian, objective.linear
    weight = torch.where(mask, objective.weight if start is None else start, 0)
    diagonal = hessian.diagonal()

    def on_support(gradient: Tensor) -> Tensor:
        return torch.where(mask, gradient, 0)

    residual = on_support(linear - weight @ hessian)
    scaled = residual / diagonal
    direction = scaled
    product = _row_dot(residual, scaled)
    enough = tolerance**2 * _row_dot(on_support(linear), on_support(linear) / diagonal)
    for _ in range(iterations):
        if not (product > enough).any():
            break
        curved = on_support(direction @ hessian)
        step = product / _row_dot(direction, curved).clamp_min(torch.finfo(product.dtype).tiny)
        weight = weight + step * direction
        residual = residual - step * curved
        scaled = residual / diagonal
        product, previous = _row_dot(residual, scaled), product
        direction = scaled + product / previous.clamp_min(torch.finfo(product.dtype).tiny) * direction
    return weight


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1, keepdim=True)
