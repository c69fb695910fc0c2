"""Smoothing: even out the inputs of projections before they are rounded to 8 bits, without changing any output.

A few features of what a norm writes are many times as large as the rest, token after token. INT8 activations have one
scale a token, so these few take the precision of all others. Dividing a feature by s in the norm and multiplying the
column of the weights that read it by s moves the size to where it does less harm (SmoothQuant, Xiao et al. 2022,
arXiv:2211.10438). Zeros stay where they are.

Here s is a power of two. Floating-point numbers take that without rounding, so the block writes the same bits as
before, and that is checked: where a norm's output is read by anything else (a residual, a router), or a norm does not
scale with its weight, the check fails and the norm is left as it was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_sparse24 import processes
from hf_sparse24.calibration.blocks import Stream
from hf_sparse24.calibration.inputs import Group, module_of, producers


def smooth_(block: nn.Module, name: str, groups: Sequence[tuple[Group, Tensor]], stream: Stream) -> int:
    """Smooth the inputs of a block's projections in place, and return how many norms were rescaled.

    Args:
        block (`nn.Module`): the pruned block.
        name (`str`): its path in the model.
        groups (`Sequence[tuple]`): projections that read the same tensor, with the (in_features,) float32 norms of
            its features over the calibration tokens.
        stream (`Stream`): the hidden states that the block reads.
    """
    made_by = producers(block, name, [group for group, _ in groups], stream)
    smoothed = 0
    for (group, column_norms), norm in zip(groups, made_by, strict=True):
        elsewhere = processes.largest(int(norm is None), column_norms.device)  # on the batch of another process
        if norm is None or elsewhere:
            continue
        weights = [module_of(block, name, target).weight.movedim(target.dim, -1) for target in group.targets]
        scale = power_of_two_scale(column_norms, weights)
        if (scale == 1).all():
            continue
        smoothed += _rescale_if_exact_(block, name, norm, weights, scale, stream)
    return smoothed


def power_of_two_scale(column_norms: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return by what each input feature is to be divided: (in_features,) float32 powers of two.

    Half of a feature's size, on a logarithmic scale, goes over to the weights: the square root of the ratio of the
    feature's norm to its weights', with the features' geometric mean left as it is.

    Args:
        column_norms (`Tensor`): (in_features,) float32.
        weights (`Sequence[Tensor]`): each (out_features, in_features), all that read these features.

    ```python
    >>> power_of_two_scale(torch.tensor([256.0, 1.0, 1.0, 1.0]), [torch.ones(2, 4)]).tolist()
    [8.0, 0.5, 0.5, 0.5]

    ```
    """
    size = torch.cat([weight.float() for weight in weights]).square().mean(0).sqrt()
    logarithm = 0.5 * (_positive(column_norms) / _positive(size)).log2()
    return torch.exp2((logarithm - logarithm.mean()).round())


def _rescale_if_exact_(
    block: nn.Module, name: str, norm: nn.Module, weights: Sequence[Tensor], scale: Tensor, stream: Stream
) -> bool:
    """Divide what a norm writes and multiply what reads it, unless that changes anything; tell whether it was done."""
    affine = [parameter for parameter in (norm.weight, getattr(norm, "bias", None)) if parameter is not None]
    tensors = [*affine, *weights]
    factors = [1 / scale] * len(affine) + [scale] * len(weights)
    scaled = [tensor.detach() * factor.to(tensor.dtype) for tensor, factor in zip(tensors, factors, strict=True)]
    # What underflows or overflows does not come back.
    exact = all(
        torch.equal(new / factor.to(new.dtype), old.detach())
        for new, factor, old in zip(scaled, factors, tensors, strict=True)
    )
    if not exact:
        return False
    before = stream.run(block, name, 0)
    kept = [tensor.detach().clone() for tensor in tensors]
    _put(tensors, scaled)
    differs = not torch.equal(before, stream.run(block, name, 0))
    if processes.largest(int(differs), scale.device):
        _put(tensors, kept)
        return False
    return True


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)


def _positive(sizes: Tensor) -> Tensor:
    """Lift what is zero or next to it, as of a dead feature, to a small share of the largest."""
    return sizes.clamp_min(max(1e-5 * float(sizes.max()), torch.finfo(torch.float32).tiny))
