"""Zeros where masks have no bit, in all weights or gradients of a model at once: a launch for each dtype and device.

A mask has a bit for each weight (`training.masks`). torch's operators make a bool of each bit first, in a handful of
launches a weight; here the bits are read as they are.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_sparse24.capability import backend_capability
from hf_sparse24.kernels.decode import ALIGNMENT
from hf_sparse24.kernels.nvrtc import device_capability, launch, load

_THREADS = 256
_MOST_BLOCKS = 64  # of a tensor


def takes(tensor: Tensor, bits: Tensor) -> bool:
    """Tell whether the kernel takes a tensor and its mask.

    Args:
        tensor (`Tensor`): of any shape.
        bits (`Tensor`): (ceil(elements / 8),) uint8, a set bit for what stays, in row-major order, lowest bit first.
    """
    return (
        tensor.is_cuda
        and tensor.itemsize in (2, 4)
        and tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNMENT == 0
        and bits.get_device() == tensor.get_device()
        and _can_run()
    )


@functools.cache
def _can_run() -> bool:
    return backend_capability("nvrtc").ok


@torch.no_grad()
def zero_pruned_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write +0.0 into tensors wherever their masks have no bit, in place.

    Args:
        pairs (`Iterable[tuple[Tensor, Tensor]]`): tensors and their bits, which `takes` accepts.
    """
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for tensor, bits in pairs:
        if tensor.numel():
            groups[tensor.get_device(), tensor.itemsize].append((tensor, bits))
    for (device, size), group in groups.items():
        rows = [(tensor.data_ptr(), bits.data_ptr(), tensor.numel()) for tensor, bits in group]
        table = _on_device(torch.tensor(rows), device)
        largest = max(count for _, _, count in rows)
        blocks = min(_MOST_BLOCKS, -(-largest // (8 * _THREADS)))
        arguments = (table.data_ptr(), blocks)
        launch(_kernel(size, device), (blocks, len(rows)), _THREADS, arguments, device)
        torch.autograd.graph.increment_version([tensor for tensor, _ in group])


def _on_device(table: Tensor, device: int) -> Tensor:
    """Copy without waiting: torch keeps pinned memory until the copy is done, and the copy until the kernel is."""
    return table.pin_memory().to(torch.device("cuda", device), non_blocking=True)


def definitions(size: int) -> dict[str, int]:
    """Return what `zero_pruned.cu` wants to be defined, for elements of `size` bytes."""
    return {"SIZE": size, "THREADS": _THREADS}


@functools.cache
def _kernel(size: int, device: int) -> Any:
    return load("zero_pruned.cu", "zero_pruned", definitions(size), device_capability(device))
