"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): prune column by column, repair in the columns to come.

With U upper triangular and H^-1 = U^T U, U_jj^2 is the inverse Hessian's diagonal over the columns not yet handled:
what a pruned weight w_j costs is (w_j / U_jj)^2, and the best repair of the columns after it is a multiple of U's row.
The two weights of a group that stay are chosen when the group is reached, with the weights as updated so far.
"""

import torch
from torch import Tensor

from hf_sparse24.criteria.objective import Objective
from hf_sparse24.pattern import GROUP_SIZE


def sparsegpt(objective: Objective, block_size: int = 128) -> Tensor:
    """Return 2:4 weights (N, K) float32.

    Rows are independent: the weights of projections that read the same input may be stacked.

    Args:
        objective (`Objective`): the layer's problem; only its weights and Hessian are used.
        block_size (`int`): columns whose repairs are applied to the rest at once; divisible by 4.
    """
    upper = _inverse_factor(objective.hessian)
    # Columns are contiguous in the transposed weight, which is what the loop walks along.
    weight_KN = objective.weight.t().clone(memory_format=torch.contiguous_format)
    for start in range(0, len(weight_KN), block_size):
        end = min(start + block_size, len(weight_KN))
        errors = _prune_block_(weight_KN[start:end], upper[start:end, start:end])
        weight_KN[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return weight_KN.t().contiguous()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return U upper triangular with H^-1 = U^T U, without forming the inverse.

    With the order of rows and columns reversed a lower factor becomes an upper one: H = R R^T, and U = R^-1.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise ValueError(
            f"SparseGPT cannot factorize the Hessian of a layer with {len(hessian)} inputs. Raise dampening, or give "
            "more calibration data."
        )
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)


def _prune_block_(block_BN: Tensor, upper_BB: Tensor) -> Tensor:
    """Prune some columns in place and return the error (B, N) that each leaves to the columns after the block.

    A column costs three small operations: on a GPU their launches, not their arithmetic, are the time of the method.
    """
    errors = torch.empty_like(block_BN)
    pruned = torch.ones_like(block_BN, dtype=torch.bool)
    diagonal = upper_BB.diagonal()
    for start in range(0, len(block_BN), GROUP_SIZE):
        group = slice(start, start + GROUP_SIZE)
        cost = (block_BN[group] / diagonal[group, None]).square_()
        kept = cost.argsort(dim=0, descending=True, stable=True)[:2]  # ties to the lower column, as everywhere
        pruned[group].scatter_(0, kept, False)
        for column in range(start, start + GROUP_SIZE):
            torch.mul(block_BN[column], pruned[column], out=errors[column]).div_(diagonal[column])
            block_BN[column:].addr_(upper_BB[column, column:], errors[column], alpha=-1)
    block_BN.masked_fill_(pruned, 0)
    return errors
