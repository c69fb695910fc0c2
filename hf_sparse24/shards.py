"""Weights that are sharded over processes, as tensor parallelism and FSDP2 leave them: `DTensor`s.

A shard is treated as a matrix of its own, which is right as long as no group of four is cut in two; that is checked.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hf_sparse24.pattern import GROUP_SIZE


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of several processes together."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the values of a tensor in this process, without a gradient; what is written to them, it has.

    Other memory a `DTensor` cannot be given: assigning to its `data` does nothing.
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all values of a tensor, without a gradient; every process has to call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_shards(parameter: nn.Parameter, dim: int, name: str) -> None:
    """Raise the same `ValueError` in every process when shards cut groups of four in two.

    Args:
        parameter (`nn.Parameter`): sharded or not.
        dim (`int`): its input dimension.
        name (`str`): how it is called in the message.
    """
    if hasattr(parameter, "ds_tensor"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO-3, which cuts groups of four. Use FSDP2 or ZeRO-2.")
    if not isinstance(parameter, DTensor):
        return
    size, axis = parameter.shape[dim], dim % parameter.ndim
    for placement, count in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
        if not isinstance(placement, Shard) or placement.dim != axis or count == 1:
            continue
        size = -(-size // count)
        if size % GROUP_SIZE:
            raise ValueError(
                f"2:4 needs shards of whole groups of {GROUP_SIZE}; {name} has {parameter.shape[dim]} inputs, and its "
                f"shards {size}. Use another number of processes, or keep it dense with modules_to_not_convert."
            )
