"""Saliency: how much each weight matters, as a score of the weight's own shape. The pattern keeps the highest.

Shapes: W_NK is a weight (out, in); `column_norms` is (K,), the L2 norm of each input feature over the calibration
tokens.
"""

from collections.abc import Callable

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Return |w| (Mishra et al. 2021, arXiv:2104.08378). It sees no data: a language model needs retraining after it.

    Args:
        weight (`Tensor`): any shape, floating.
    """
    return weight.abs()


def wanda(weight: Tensor, column_norms: Tensor) -> Tensor:
    """Return |w_ij| * ||x_j||: how much of the output a weight carries (Sun et al. 2023, arXiv:2306.11695).

    Args:
        weight (`Tensor`): (N, K), floating.
        column_norms (`Tensor`): (K,) float32.
    """
    return weight.abs() * column_norms


def ria(weight: Tensor, column_norms: Tensor, power: float = 0.5) -> Tensor:
    """Return relative importance times activation (Zhang et al. 2024, "Plug-and-Play", ICLR): RIA.

    A weight counts by its share of its row and of its column, so that no output and no input is cut off whole:
    (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||^power.

    Args:
        weight (`Tensor`): (N, K), floating; one matrix, since the shares are of it alone.
        column_norms (`Tensor`): (K,) float32.
        power (`float`): 0.5 in the paper.
    """
    size = weight.abs()
    tiny = 1e-30  # an all-zero row or column has no shares
    shares = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return shares * column_norms.pow(power)


# Those that see no data work on any block of rows; the others need the whole matrix and its statistics.
SALIENCY: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude}
SALIENCY_OF_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"wanda": wanda, "ria": ria}
