"""The least squares problem that every calibrated method solves for a layer.

A layer with dense weights W_NK reads inputs X_TK in the pruned model and X'_TK in the dense one. New weights V_NK are
to give the dense output on the pruned inputs:

    minimize  || X' W^T - X V^T ||^2  =  tr(V H V^T) - 2 tr(V G^T) + const,   H = X^T X,   G = W X'^T X.

With X' = X (the symmetric form) G is W H, and the layer alone is reproduced; the asymmetric form also undoes what the
layers before it did wrong. The damping is a ridge towards the dense weights, H + d I and G + d W; it also decides for
inputs that no calibration token used, whose weights then count by their magnitude, and less than any others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Damping is raised tenfold until the Hessian has a Cholesky factor; above this the data no longer say anything.
_LARGEST_DAMPENING = 10.0
_SMALLEST_DAMPENING = 1e-4


class Objective(NamedTuple):
    """A layer's problem, in float32 (float64 where the weights are).

    Attributes:
        weight (`Tensor`): (N, K), the dense weights.
        hessian (`Tensor`): (K, K), damped, positive definite.
        linear (`Tensor`): (N, K), G.
        factor (`Tensor`): (K, K), the lower Cholesky factor of the Hessian.
        ridge (`float`): what was added to the diagonal.
        dampening (`float`): the same as a share of the Hessian's mean diagonal.
    """

    weight: Tensor
    hessian: Tensor
    linear: Tensor
    factor: Tensor
    ridge: float
    dampening: float

    def asymmetric(self, cross: Tensor) -> "Objective":
        """Return the problem whose target is the dense model's output.

        Args:
            cross (`Tensor`): (K, K), X'^T X with the dense model's inputs X'.
        """
        return self._replace(linear=(self.weight @ cross).add_(self.weight, alpha=self.ridge))

    def loss(self, weight: Tensor) -> Tensor:
        """Return the objective for weights (N, K), less a constant that depends on the problem alone: (N,)."""
        return (weight * (weight @ self.hessian - 2 * self.linear)).sum(-1)


def layer_objective(weight: Tensor, hessian: Tensor, dampening: float = 0.01) -> Objective:
    """Set up the symmetric problem of a layer.

    Args:
        weight (`Tensor`): (N, K), any floating dtype.
        hessian (`Tensor`): (K, K) float32 or float64, X^T X.
        dampening (`float`): added to the diagonal, as a share of its mean; raised tenfold while the Hessian is not
            positive definite. The result says what it came to.

    Raises:
        `ValueError`: no damping makes the Hessian positive definite.
    """
    weight = weight.to(hessian.dtype)
    mean = float(hessian.diagonal().mean())
    level = dampening
    while level <= max(dampening, _LARGEST_DAMPENING):
        damped = hessian.clone()
        damped.diagonal().add_(level * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and factor.isfinite().all():
            return Objective(weight, damped, weight @ damped, factor, level * mean, level)
        level = 10 * level or _SMALLEST_DAMPENING
    raise ValueError(
        f"The Hessian of a layer ({hessian.shape[0]} inputs) is not positive definite with a dampening of up to "
        f"{max(dampening, _LARGEST_DAMPENING)}. Give more calibration data, or load the model in bfloat16 or float32."
    )
