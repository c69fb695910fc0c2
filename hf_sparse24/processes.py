"""The processes of torch.distributed, which may be one: each has its share of the calibration data.

Every function does nothing, or says one, where there is no process group.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Tell whether this is the process that writes."""
    return rank() == 0


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place, and return it."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """Average a tensor over the processes, in place, and return it."""
    return sum_(tensor).div_(count()) if count() > 1 else tensor


def broadcast_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with the first process's, and return it."""
    if count() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which each process has a shard; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers: what all of them do at once must come at the same step."""
    if count() == 1:
        return number
    tensor = torch.tensor([number], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)
