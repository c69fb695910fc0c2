"""Saliency: how much each weight matters, as a score of the weight's own shape. The pattern keeps the highest."""

from collections.abc import Callable

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Return |w| (Mishra et al. 2021, arXiv:2104.08378). It sees no data: a language model needs retraining after it.

    Args:
        weight (`Tensor`): any shape, floating.
    """
    return weight.abs()


SALIENCY: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude}
