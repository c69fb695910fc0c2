"""What a weight multiplies: second moments of the inputs of a projection, summed over calibration tokens.

With inputs X_TK (tokens x in_features) of the model as pruned so far and X'_TK of the dense model, everything that a
calibrated method needs to know is the Hessian H_KK = X^T X of the layer's least squares problem, and, for the
asymmetric form that repairs the error of the layers before, C_KK = X'^T X.

Sums are kept in float32. Inputs in bfloat16 or float16 are multiplied exactly and summed in float32; they are never
summed in their own dtype.
"""

import torch
from torch import Tensor

from hf_sparse24 import processes


class InputStatistics:
    """Sums of outer products of the inputs of one or more projections that read the same tensor.

    Args:
        in_features (`int`): K.
        device (`torch.device` or `str`): where the sums are kept.
        asymmetric (`bool`): also sum the products with the dense model's inputs.

    Attributes:
        hessian (`Tensor`): (K, K) float32, X^T X.
        cross (`Tensor`, *optional*): (K, K) float32, X'^T X with X' of the dense model.
        tokens (`int`): rows of X.

    ```python
    >>> statistics = InputStatistics(2)
    >>> statistics.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> statistics.hessian.tolist(), statistics.tokens
    ([[1.0, 2.0], [2.0, 5.0]], 2)

    ```
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", asymmetric: bool = False) -> None:
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self.cross = torch.zeros(in_features, in_features, device=device) if asymmetric else None
        self.tokens = 0

    def add(self, inputs: Tensor, dense_inputs: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs (`Tensor`): (..., K), any floating dtype.
            dense_inputs (`Tensor`, *optional*): the same tokens in the dense model; needed where `cross` is summed.
            kept (`Tensor`, *optional*): bool, the shape of `inputs` without its last dimension; False for padding.
        """
        x_TK = _rows(inputs, kept)
        self.hessian += gram(x_TK, x_TK)
        if self.cross is not None:
            if dense_inputs is None:
                raise ValueError("Asymmetric statistics need the dense model's inputs with every batch; got none.")
            self.cross += gram(_rows(dense_inputs, kept), x_TK)
        self.tokens += len(x_TK)

    def all_reduce_(self) -> None:
        """Sum over the processes of torch.distributed, where each has seen its share of the calibration data."""
        for tensor in (self.hessian, self.cross):
            if tensor is not None:
                processes.sum_(tensor)
        self.tokens = int(processes.sum_(torch.tensor([self.tokens], device=self.hessian.device)))

    def check(self, name: str) -> None:
        """Raise `ValueError` when no token came, or when one of them was not finite.

        Args:
            name (`str`): how the projection is called in the message.
        """
        if not self.tokens:
            raise ValueError(no_token_reached(name))
        finite = self.hessian.diagonal().isfinite().all()
        if self.cross is not None:
            finite &= self.cross.diagonal().isfinite().all()
        if not finite:
            raise ValueError(
                f"The inputs of {name} hold NaN or Inf for this calibration data. Check the data, or load the model "
                "in bfloat16 or float32."
            )

    @property
    def column_norms(self) -> Tensor:
        """(K,) float32: the L2 norm of each input feature over all tokens."""
        return self.hessian.diagonal().clamp_min(0).sqrt()


def no_token_reached(name: str) -> str:
    """Return the message for a projection that no calibration data reached, or for all experts: `experts.*.w1`."""
    return (
        f"No calibration token reached {name}. Give calibration inputs that use it, or keep it dense with "
        f"modules_to_not_convert=['{name.partition('.*')[0]}']."
    )


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right in float32.

    Args:
        left, right (`Tensor`): (tokens, K), any floating dtype.
    """
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and left.dtype == right.dtype:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


def _rows(inputs: Tensor, kept: Tensor | None) -> Tensor:
    return inputs.flatten(0, -2) if kept is None else inputs[kept]
