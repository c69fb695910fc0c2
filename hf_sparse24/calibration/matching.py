"""Block matching: train what stays of a pruned block until the block writes what the dense one wrote.

A layer's own least squares problem knows nothing of the attention and the activations around it. So after all layers
of a block are pruned, a few hundred steps of Adam on the block's kept weights, norms and biases bring its output back
to the dense block's: "transformer matching" of 3BASiL (arXiv:2603.01376), reconstruction in "Free Lunch"
(arXiv:2510.14444).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse24.calibration.blocks import Stream
from hf_sparse24.calibration.fitting import Fit, Masks, Schedule, fit_, mixed_precision
from hf_sparse24.roles import is_router


@dataclass(frozen=True, slots=True)
class Matching(Schedule):
    """How a block is trained, and towards what.

    Attributes:
        target (`str`): "dense", the dense block's output on the dense model's hidden states, which also undoes the
            error of the blocks before; or "sparse", its output on those of the pruned model.
    """

    steps: int = 300
    learning_rate: float = 5e-3
    held_out: float = 1 / 16
    target: str = "dense"


def match_block_(
    block: nn.Module, name: str, masks: Masks, stream: Stream, targets: Sequence[Tensor], matching: Matching, seed: int
) -> Fit:
    """Train a pruned block in place; the loss is the squared error relative to the target's mean square.

    Args:
        block (`nn.Module`): the pruned block, on the device where it is to be trained.
        name (`str`): its path in the model.
        masks (`dict`): for each pruned parameter its bool mask.
        stream (`Stream`): the hidden states that the block reads.
        targets (`Sequence[Tensor]`): for each batch what it is to write, (batch, tokens, features).
        matching (`Matching`): how.
        seed (`int`): of the order of the batches.
    """
    device = next(block.parameters()).device
    scale = sum(float(target.float().square().mean()) for target in targets) / len(targets)

    def loss(index: int) -> Tensor:
        with mixed_precision(device, stream.hidden[index].dtype):
            output = stream.run(block, name, index)
        target = targets[index].to(device, non_blocking=True)
        kept = stream.kept_tokens(index, output)
        if kept is not None:
            output, target = output[kept], target[kept]
        return F.mse_loss(output.float(), target.float()) / max(scale, torch.finfo(torch.float32).tiny)

    return fit_(trained_parameters(block, masks), masks, loss, len(stream), matching, seed)


def trained_parameters(module: nn.Module, masks: Masks) -> list[nn.Parameter]:
    """Return what may be trained beside the pruned weights: norms and biases, but no router and no embedding."""
    free = [
        parameter
        for name, owner in module.named_modules()
        for parameter in owner.parameters(recurse=False)
        if parameter.ndim == 1 and not is_router(name, owner)
    ]
    return [*masks, *free]
