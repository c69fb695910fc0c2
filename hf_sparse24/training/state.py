"""What a checkpoint needs beside the weights to go on bit-equal: masks, and what a policy keeps of pruned weights.

One file, `sparse24_training.safetensors`, in the checkpoint's folder, with whole tensors whatever the number of
processes: shards are gathered for it, and cut again from it.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_sparse24 import processes
from hf_sparse24.training.masks import Masks, local, pack_bits
from hf_sparse24.training.policies import Frozen

FILE = "sparse24_training.safetensors"
States = dict[str, dict[str, Tensor]]

_MASK = "mask"


def save_state(folder: str | Path, masks: Masks, states: States, policy: Frozen) -> None:
    """Write masks and states. Every process has to call it; the first one writes."""
    tensors = {}
    for name, mask in masks.items():
        parameter = mask.parameter
        whole = _gather(mask.kept().to(torch.uint8), parameter)
        tensors[f"{name}:{_MASK}"] = pack_bits(whole.bool()).cpu()
        for key, tensor in states.get(name, {}).items():
            tensors[f"{name}:{key}"] = _gather(tensor, parameter).cpu().contiguous()
    sums = _sums(masks)
    if not processes.is_first():
        return
    path = Path(folder) / FILE
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, {"policy": policy.name, "steps": str(policy.total_steps), "sums": json.dumps(sums)})
    unfinished.replace(path)


def load_state(folder: str | Path, masks: Masks, policy: Frozen) -> States:
    """Read masks into `masks`, and return the states.

    Raises:
        `ValueError`: the file is of another policy, of a training of another length, or of other matrices.
        `RuntimeError`: the weights in the model are not those that were saved with it.
    """
    states: States = {name: {} for name in masks}
    with safe_open(Path(folder) / FILE, "pt") as file:
        metadata = file.metadata()
        if metadata["policy"] != policy.name:
            raise ValueError(
                f"{folder} was saved with mask_policy {metadata['policy']!r}; this run has {policy.name!r}. Resume "
                "with the same, or start from its weights with resume_from_checkpoint=None."
            )
        if policy.moves and metadata["steps"] != str(policy.total_steps):
            raise ValueError(
                f"{folder} is of a training of {metadata['steps']} steps; this one has {policy.total_steps}, and the "
                f"schedule of mask_policy {policy.name!r} would jump. Resume with as many."
            )
        _compare(folder, json.loads(metadata["sums"]), _sums(masks))
        for key in file.keys():  # noqa: SIM118
            name, _, kind = key.rpartition(":")
            parameter, tensor = masks[name].parameter, file.get_tensor(key)
            if kind == _MASK:
                masks[name].replace(_cut(_unpack(tensor, parameter.shape), parameter).bool())
            else:
                states[name][kind] = _cut(tensor, parameter)
    return states


def check_restored(folder: str | Path, masks: Masks) -> None:
    """Raise `RuntimeError` when the weights in a model are not those that were saved in a folder."""
    with safe_open(Path(folder) / FILE, "pt") as file:
        _compare(folder, json.loads(file.metadata()["sums"]), _sums(masks))


def _sums(masks: Masks) -> dict[str, float]:
    """Return the sum of each weight, by which a checkpoint tells whether it has been restored."""
    sums = []
    for mask in masks.values():
        total = local(mask.parameter).sum(dtype=torch.float64)
        sums.append(processes.sum_(total) if isinstance(mask.parameter, DTensor) else total)
    return dict(zip(masks, torch.stack(sums).tolist(), strict=True))


def _compare(folder: str | Path, saved: dict[str, float], found: dict[str, float]) -> None:
    if set(saved) != set(found):
        raise ValueError(f"{folder} has masks of other matrices than the model; resume with the model it is of.")
    for name, total in saved.items():
        if not math.isclose(total, found[name], rel_tol=1e-6, abs_tol=1e-6):  # sums depend a little on their order
            raise RuntimeError(
                f"{name} was not restored from {folder}: Trainer drops weights that transformers saves under other "
                "names (transformers#48805). Use Sparse24Trainer."
            )


def _gather(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the whole of a tensor that is sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        tensor, parameter.device_mesh, parameter.placements, shape=shape, stride=stride
    ).full_tensor()


def _cut(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this process's part of a whole tensor, where the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh = parameter.device_mesh
    whole = tensor.to(parameter.to_local().device)
    return distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None).to_local().clone()


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    positions = torch.arange(8, dtype=torch.uint8)
    return (bits.unsqueeze(-1) >> positions).bitwise_and(1).view(-1)[: shape.numel()].view(shape)
