"""From statistics to weights: run the method that was asked for on the projections of a group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse24.criteria.alps import alps
from hf_sparse24.criteria.objective import layer_objective
from hf_sparse24.criteria.refit import refit
from hf_sparse24.criteria.rounding import round_to_fp8
from hf_sparse24.criteria.saliency import SALIENCY, SALIENCY_OF_INPUTS
from hf_sparse24.criteria.sparsegpt import sparsegpt
from hf_sparse24.pattern import mask_2to4
from hf_sparse24.statistics import InputStatistics

_SHRINKAGE = 0.3

RECONSTRUCTING = {"sparsegpt": sparsegpt, "alps": alps}


@dataclass(frozen=True, slots=True)
class Solution:
    """What became of the projections of a group.

    Attributes:
        weights (`list[Tensor]`): float32, one (N, K) a projection, 2:4.
        masks (`list[Tensor]`): bool, which weights stay.
        dampening (`float`): what the Hessian was damped with.
        raised (`bool`): whether that is more than was meant, since it was not positive definite.
    """

    weights: list[Tensor]
    masks: list[Tensor]
    dampening: float
    raised: bool = False


def full_dampening(dampening: float, statistics: InputStatistics) -> float:
    """Return the dampening for statistics of so many tokens: with few of them a Hessian is mostly chance.

    A share of the ratio of inputs to tokens is added, in the spirit of Ledoit & Wolf's shrinkage (2004). It is
    nothing for 128 windows of 1024 tokens; with 512 tokens it takes the perplexity of Wanda with a refit from 226 to
    68, with 8,192 that of ALPS with a refit from 33.1 to 31.7 (SmolLM2; a third of
    the share gives 72 and 32.1: benchmarks/results/dampening.json).
    """
    return dampening + _SHRINKAGE * len(statistics.hessian) / statistics.tokens


def solve(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    method: str,
    refitted: bool,
    dampening: float,
    quantization: str | None = None,
) -> Solution:
    """Prune the projections that read the same inputs.

    Args:
        weights (`Sequence[Tensor]`): dense weights, each (N, K).
        statistics (`InputStatistics`): of their inputs; with `cross`, the refit targets the dense model's outputs.
        method (`str`): "magnitude", "wanda", "ria", "sparsegpt" or "alps".
        refitted (`bool`): refit the values of the weights that stay.
        dampening (`float`): share of the Hessian's mean diagonal (see `full_dampening`).
        quantization (`str`, *optional*): what the weights will be packed in. A refit for "fp8" ends on its values.
    """
    stacked = torch.cat([weight.to(torch.float32) for weight in weights])
    needs_objective = refitted or method in RECONSTRUCTING
    objective = layer_objective(stacked, statistics.hessian, dampening) if needs_objective else None
    if objective is not None and method in RECONSTRUCTING:
        values = RECONSTRUCTING[method](objective)
        mask = mask_2to4(values.abs())
    else:
        scores = [_scores(method, weight.float(), statistics.column_norms) for weight in weights]
        mask = torch.cat([mask_2to4(score) for score in scores])
        values = torch.where(mask, stacked, 0)
    if objective is not None and refitted:
        target = objective if statistics.cross is None else objective.asymmetric(statistics.cross)
        values = refit(target, mask, values)
        if quantization == "fp8":
            values = round_to_fp8(target, mask, values)
    rows = [len(weight) for weight in weights]
    found = dampening if objective is None else objective.dampening
    return Solution(list(values.split(rows)), list(mask.split(rows)), found, found > dampening)


def _scores(method: str, weight: Tensor, column_norms: Tensor) -> Tensor:
    if method in SALIENCY:
        return SALIENCY[method](weight)
    return SALIENCY_OF_INPUTS[method](weight, column_norms)
