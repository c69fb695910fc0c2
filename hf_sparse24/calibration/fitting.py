"""A short training under fixed masks, on the calibration batches: what block matching and distillation have in common.

Weights are trained in float32 whatever the model's dtype, since one step is smaller than the last bit of a bfloat16
weight; on a GPU, and for a model in 16 bits, the products are bfloat16. A mask takes pruned weights out of the
gradient, so that Adam's moments for them stay zero, and is applied again after every step. Some batches are held out
and only choose the best state, which may be the first.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse24 import processes

Masks = dict[nn.Parameter, Tensor]

_SMALLEST = 1e-3  # a bias of zeros moves as one of this size


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps (`int`): of Adam, each on one calibration batch.
        learning_rate (`float`): of Adam, as a share of each parameter's root mean square, so that one value serves
            models of any size; after a warm-up of a twentieth it falls to a tenth along a cosine.
        held_out (`float`): share of the batches that only choose the best state.
    """

    steps: int
    learning_rate: float
    held_out: float = 1 / 16


@dataclass(frozen=True, slots=True)
class Fit:
    """The mean loss over the held-out batches: before, and of the state that was kept."""

    before: float
    after: float


def fit_(
    parameters: Sequence[nn.Parameter],
    masks: Masks,
    loss: Callable[[int], Tensor],
    batches: int,
    schedule: Schedule,
    seed: int,
) -> Fit:
    """Train parameters in place. Pruned weights stay exactly zero, and every parameter has its dtype at the end.

    Under torch.distributed each process has its own batches, and gradients and held-out losses are averaged. What
    fails in one, for want of memory say, fails in all.

    Args:
        parameters (`Sequence[nn.Parameter]`): what is trained, all on one device.
        masks (`dict`): the bool mask of each pruned one.
        loss (`Callable`): from the number of a batch to its loss.
        batches (`int`): how many there are.
        schedule (`Schedule`): how long and how fast.
        seed (`int`): of what is held out and of the order.
    """
    shuffle = random.Random(seed)
    order = shuffle.sample(range(batches), batches)
    held_out = max(1, round(batches * schedule.held_out)) if batches > 1 else 0
    dtypes = [parameter.dtype for parameter in parameters]
    try:
        with processes.together():
            for parameter in parameters:
                parameter.data = parameter.data.to(torch.float32, copy=True)  # what it was may be the caller's
                parameter.requires_grad_(True)
        with torch.enable_grad():
            return _train(parameters, masks, loss, order[held_out:], order[:held_out] or order, schedule, shuffle)
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a module of this dtype runs while some of its parameters are float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or dtype != torch.float32)


def _train(
    parameters: Sequence[nn.Parameter],
    masks: Masks,
    loss: Callable[[int], Tensor],
    train: list[int],
    test: list[int],
    schedule: Schedule,
    shuffle: random.Random,
) -> Fit:
    device = parameters[0].device
    groups = _by_size(parameters, schedule.learning_rate)
    optimizer = torch.optim.Adam(groups, fused=device.type == "cuda")
    with processes.together():
        best = [parameter.detach().clone() for parameter in parameters]
    before = lowest = _mean_loss(loss, test)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, schedule.steps))
    epoch = processes.largest(len(train), device)
    queue: list[int] = []
    try:
        for step in range(1, schedule.steps + 1):
            queue = queue or shuffle.sample(train, len(train))
            optimizer.zero_grad()
            with processes.together():
                loss(queue.pop()).backward()
            _average_gradients(parameters)
            for parameter, mask in masks.items():
                if parameter.grad is not None:  # else this batch does not use it
                    parameter.grad.mul_(mask)
            with processes.together():
                optimizer.step()
            for parameter, mask in masks.items():
                parameter.data.masked_fill_(~mask, 0.0)
            cosine.step()
            if step % epoch == 0 or step == schedule.steps:
                found = _mean_loss(loss, test)
                if found < lowest:
                    lowest = found
                    torch._foreach_copy_(best, [parameter.detach() for parameter in parameters])
    finally:  # also where it fails: nothing is left in the middle of a step
        torch._foreach_copy_([parameter.data for parameter in parameters], best)
    return Fit(before, lowest)


def _by_size(parameters: Sequence[nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
    """Group parameters by the power of two of their root mean square, which scales their learning rate."""
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        size = max(float(parameter.detach().square().mean().sqrt()), _SMALLEST)
        groups.setdefault(round(math.log2(size)), []).append(parameter)
    return [{"params": group, "lr": learning_rate * 2.0**power} for power, group in groups.items()]


def _share_of_rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    return min(1.0, (step + 1) / warm_up) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps))))


@torch.no_grad()
def _mean_loss(loss: Callable[[int], Tensor], batches: Sequence[int]) -> float:
    with processes.together():
        mean = torch.stack([loss(index) for index in batches]).mean()
    return float(processes.mean_(mean))


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    if processes.count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        processes.mean_(parameter.grad)
