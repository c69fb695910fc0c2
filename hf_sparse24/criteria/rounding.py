"""Rounding with feedback: FP8 values for the weights that stay, each chosen with the errors of the others in view.

Rounded to the nearest value each weight adds an error of its own to the layer's output. Here the columns are visited
one by one, and a weight takes the FP8 value next to the one that would be best for it, given all others as they stand:
those already rounded push the ones to come the other way. This is cyclic coordinate descent on the layer's problem
(QuantEase, Behdin et al. 2023, arXiv:2309.01885) restricted to the mask: no step raises the objective but the first
rounding itself, and every further sweep lowers it or ends it.

INT8 has no such function: its steps are finer than FP8's for the large weights that count, and rounding its weights to
the nearest cost 0.2 % of a perplexity (benchmarks/results/smoothing.json).
"""

import torch
from torch import Tensor

from hf_sparse24.criteria.objective import Objective
from hf_sparse24.packing import round_to, weight_scale

_FP8 = torch.float8_e4m3fn


def round_to_fp8(objective: Objective, mask: Tensor, weight: Tensor, sweeps: int = 2, block_size: int = 128) -> Tensor:
    """Return weights (N, K) float32 on `mask` that `packing.quantize_rows(..., "fp8")` stores as they are.

    So do they after bfloat16, which holds all of them; float16 loses the smallest of rows of very small weights.

    Args:
        objective (`Objective`): the layer's problem, symmetric or not.
        mask (`Tensor`): bool (N, K), the weights that stay.
        weight (`Tensor`): (N, K), what is to be rounded; refitted, for the first sweep to know where to push.
        sweeps (`int`): how often each column is visited.
        block_size (`int`): columns whose changes reach the others at once.
    """
    weight = torch.where(mask, weight, 0)
    scale_N = weight_scale(weight, _FP8).squeeze(-1)
    # Columns are contiguous in the transposed tensors, which is what the loop walks along.
    weight_KN, mask_KN = weight.t().contiguous(), mask.t().contiguous()
    gradient_KN = (objective.hessian @ weight_KN).sub_(objective.linear.t())
    for _ in range(sweeps):
        for start in range(0, len(weight_KN), block_size):
            block = slice(start, start + block_size)
            before, gradient = weight_KN[block].clone(), gradient_KN[block].clone()
            _round_block_(weight_KN[block], mask_KN[block], gradient, objective.hessian[block, block], scale_N)
            gradient_KN.addmm_(objective.hessian[:, block], weight_KN[block] - before)
    return weight_KN.t() + 0.0  # no -0.0


def _round_block_(
    weight_BN: Tensor, mask_BN: Tensor, gradient_BN: Tensor, hessian_BB: Tensor, scale_N: Tensor
) -> None:
    """Visit some columns once, in place; the gradient of the block is moved along, that of the others is not."""
    for column in range(len(weight_BN)):
        best = weight_BN[column] - gradient_BN[column] / hessian_BB[column, column]
        rounded = round_to(best / scale_N, _FP8).to(best.dtype).mul_(scale_N).mul_(mask_BN[column])
        gradient_BN[column:].addr_(hessian_BB[column, column:], rounded - weight_BN[column])
        weight_BN[column] = rounded
