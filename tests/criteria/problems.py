"""Layer problems small enough to be solved outright, and their solution from the inputs, without any Hessian."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse24.criteria.objective import Objective, layer_objective

PATTERNS = torch.tensor([[i in kept for i in range(4)] for kept in itertools.combinations(range(4), 2)])


class Problem(NamedTuple):
    """A layer in float64: what it reads, what it is to give, and what the code under test makes of it."""

    weight: Tensor
    inputs: Tensor
    dense_inputs: Tensor
    objective: Objective

    def loss(self, weight: Tensor) -> Tensor:
        """||X' w - X v||^2 + ridge ||w - v||^2 of each row, from its definition."""
        weight = weight.double()
        difference = self.dense_inputs @ self.weight.t() - self.inputs @ weight.t()
        return difference.square().sum(0) + self.objective.ridge * (self.weight - weight).square().sum(1)

    def best_on(self, mask: Tensor) -> Tensor:
        """Least squares on each row's support by QR of the inputs themselves."""
        root = self.objective.ridge**0.5
        best = torch.zeros_like(self.weight)
        for row, kept in enumerate(mask):
            if kept.any():
                ridge = root * torch.eye(len(kept), dtype=torch.float64)
                target = torch.cat([self.dense_inputs @ self.weight[row], ridge @ self.weight[row]])
                columns = torch.cat([self.inputs, ridge])[:, kept]
                best[row, kept] = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
        return best

    def brute_force(self) -> Tensor:
        """The least loss of each row over all of its 2:4 masks."""
        rows, columns = self.weight.shape
        losses = [
            self.loss(self.best_on(torch.cat(patterns).expand(rows, -1)))
            for patterns in itertools.product(PATTERNS, repeat=columns // 4)
        ]
        return torch.stack(losses).amin(0)


def make_problem(seed, rows=12, columns=16, tokens=64, asymmetric=False, dtype=torch.float64, dampening=0.01):
    """Inputs that are correlated and of unequal size; the pruned model's are the dense one's with an error."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(columns, dtype=torch.float64) + randn(columns, columns) / columns**0.5
    dense_inputs = randn(tokens, columns) @ mixing * randn(columns).mul(0.7).exp()
    inputs = dense_inputs + 0.3 * randn(tokens, columns) @ mixing if asymmetric else dense_inputs
    weight = randn(rows, columns)
    objective = layer_objective(weight, (inputs.t() @ inputs).to(dtype), dampening)
    if asymmetric:
        objective = objective.asymmetric((dense_inputs.t() @ inputs).to(dtype))
    return Problem(weight, inputs, dense_inputs, objective)
