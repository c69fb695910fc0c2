"""Block matching: train what stays of a pruned block until the block writes what the dense one wrote.

A layer's own least squares problem knows nothing of the attention and the activations around it. So after all layers of
a block are pruned, a few hundred steps of Adam on the block's kept weights, norms and biases bring its output back to
the dense block's: "transformer matching" of 3BASiL (arXiv:2603.01376), reconstruction in "Free Lunch"
(arXiv:2510.14444). The weights are trained in float32 whatever the model's dtype: one step is smaller than a bfloat16
weight's last bit. A mask takes pruned weights out of the gradient and out of every step.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse24.calibration.blocks import Stream

Masks = dict[nn.Parameter, Tensor]


@dataclass(frozen=True, slots=True)
class Matching:
    """How a block is trained.

    Attributes:
        steps (`int`): of Adam, each on one calibration batch.
        learning_rate (`float`): the highest; it falls to a tenth along a cosine.
        held_out (`float`): share of the batches that only choose the best state.
        target (`str`): what is matched: "dense", the dense block's output on the dense model's hidden states, which
            also undoes the error of the blocks before; or "sparse", its output on those of the pruned model.
    """

    steps: int = 300
    learning_rate: float = 2e-4
    held_out: float = 1 / 16
    target: str = "dense"


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Mean squared error over the held-out batches, relative to the target's mean square: before, and at its best."""

    before: float
    after: float


def match_block_(
    block: nn.Module, name: str, masks: Masks, stream: Stream, targets: Sequence[Tensor], settings: Matching, seed: int
) -> MatchResult:
    """Train a pruned block in place. Pruned weights stay exactly zero; everything else keeps its dtype at the end.

    Args:
        block (`nn.Module`): the pruned block, on the device where it is to be trained.
        name (`str`): its path in the model.
        masks (`dict`): for each pruned parameter its bool mask.
        stream (`Stream`): the hidden states that the block reads.
        targets (`Sequence[Tensor]`): for each batch what it is to write, (batch, tokens, features).
        settings (`Matching`): how.
        seed (`int`): of the order of the batches.
    """
    trained = [*masks, *(parameter for parameter in block.parameters() if parameter.ndim == 1)]
    dtypes = [parameter.dtype for parameter in trained]
    held_out = max(1, round(len(stream) * settings.held_out)) if len(stream) > 1 else 0
    order = list(range(len(stream)))
    random.Random(seed).shuffle(order)
    test, train = order[:held_out] or order, order[held_out:]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    runs = _Runs(block, name, stream, targets)
    try:
        with torch.enable_grad():
            best = _train(trained, masks, runs, train, test, settings, seed)
    finally:
        for parameter, dtype in zip(trained, dtypes, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
    return best


def _train(
    trained: list[nn.Parameter],
    masks: Masks,
    runs: "_Runs",
    train: list[int],
    test: list[int],
    settings: Matching,
    seed: int,
) -> MatchResult:
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, fused=trained[0].is_cuda)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.steps))
    )
    before = lowest = runs.mean_loss(test)
    best = [parameter.detach().clone() for parameter in trained]
    shuffle = random.Random(seed)
    queue: list[int] = []
    epoch = _largest(len(train), runs.device)
    for step in range(1, settings.steps + 1):
        if not queue:
            queue = shuffle.sample(train, len(train))
        optimizer.zero_grad()
        runs.loss(queue.pop()).backward()
        _average_gradients(trained)
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        optimizer.step()
        schedule.step()
        if step % epoch == 0 or step == settings.steps:
            loss = runs.mean_loss(test)
            if loss < lowest:
                lowest = loss
                torch._foreach_copy_(best, [parameter.detach() for parameter in trained])
    with torch.no_grad():
        torch._foreach_copy_([parameter.data for parameter in trained], best)
    return MatchResult(before, lowest)


class _Runs:
    """The relative squared error of the block's output, batch by batch."""

    def __init__(self, block: nn.Module, name: str, stream: Stream, targets: Sequence[Tensor]) -> None:
        self.block, self.name, self.stream, self.targets = block, name, stream, targets
        self.device = next(block.parameters()).device
        self.scale = sum(float(target.float().square().mean()) for target in targets) / len(targets)

    def loss(self, index: int) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.stream.run(self.block, self.name, index)
        target = self.targets[index].to(self.device, non_blocking=True)
        kept = self.stream.kept_tokens(self.name, index, output.shape)
        if kept is not None:
            output, target = output[kept.to(self.device)], target[kept.to(self.device)]
        return F.mse_loss(output.float(), target.float()) / max(self.scale, torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def mean_loss(self, indices: Sequence[int]) -> float:
        total = torch.stack([self.loss(index) for index in indices]).mean()
        if _distributed():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return float(total)


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    if not _distributed():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _largest(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers: what all of them do at once must come at the same step."""
    if not _distributed():
        return number
    largest = torch.tensor([number], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
