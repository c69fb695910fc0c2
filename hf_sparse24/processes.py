"""The processes of torch.distributed, which may be one: each has its share of the calibration data.

Every function does nothing, or says one, where there is no process group. `join` makes one of the processes that
torchrun or accelerate launch have started.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Join the processes started by torchrun or accelerate launch, as RANK and WORLD_SIZE say, unless that is done.

    As accelerate does it, so that a Trainer may follow: NCCL and the GPU of LOCAL_RANK, with gloo for what is on the
    CPU; or gloo alone.

    Raises:
        `RuntimeError`: accelerate has taken this process for a single one before.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    from accelerate import PartialState  # here, since statistics need torch alone

    if torch.cuda.is_available():
        PartialState(backend="cuda:nccl,cpu:gloo")
    else:
        PartialState(cpu=True)
    if count() == 1:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and accelerate was set up in this process before, for one "
            "alone. Call torch.distributed.init_process_group first thing in the script."
        )


def leave() -> None:
    """Leave the other processes, at the end of a program."""
    if count() > 1:
        dist.destroy_process_group()


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


def largest(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers: what all of them do at once must come at the same step."""
    if count() == 1:
        return number
    tensor = torch.tensor([number], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather(value: Any) -> list[Any]:
    """Return every process's value, which can be pickled, in the order of their numbers."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Let an error in one process be one in all: else the others would wait for it in the next collective.

    What runs inside must not communicate itself.

    Raises:
        `RuntimeError`: another process failed; an `OutOfMemoryError` if it ran out of memory.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = gather(None if failed is None else (isinstance(failed, torch.OutOfMemoryError), str(failed)))
    if failed is not None:
        raise failed
    for number, (out_of_memory, message) in enumerate(entry or (False, None) for entry in told):
        if message is not None:
            kind = torch.OutOfMemoryError if out_of_memory else RuntimeError
            raise kind(f"Process {number} of {count()} stopped: {message}")
