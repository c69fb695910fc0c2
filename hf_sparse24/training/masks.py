"""The masks of a model under training: by the name of the parameter, a bit a weight, on local shards.

`accelerate` may replace every parameter of a model (FSDP2 makes DTensors of them), and a resumed run fills them anew.
So masks are made after both, hold no parameter, and ask its module for it whenever they are applied. A shard of
a DTensor is treated as a matrix of its own (`hf_sparse24.shards`).

What keeps zeros zero: gradients of pruned weights are zeroed at the end of the backward pass that accumulated them,
which also keeps them out of the clipped norm and of the optimizer's moments, and pruned weights are zeroed after every
step, which holds under any optimizer. On a GPU either is one kernel for all weights.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle

from hf_sparse24 import processes
from hf_sparse24.identity import record_of
from hf_sparse24.kernels import zero_pruned
from hf_sparse24.nn import PackedModule
from hf_sparse24.selection import select
from hf_sparse24.shards import check_shards, is_sharded, local

_WRAPPER = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")


@dataclass(slots=True)
class Mask:
    """The mask of one parameter, or of this process's shard of it.

    Attributes:
        module (`nn.Module`): which has the parameter, whatever tensor that is at the time.
        key (`str`): its name there.
        dim (`int`): the input dimension, -1 or -2.
        shape (`torch.Size`): of the parameter or the shard.
        bits (`Tensor`): (ceil(weights / 8),) uint8, a set bit for a weight that stays, in row-major order.
    """

    module: nn.Module
    key: str
    dim: int
    shape: torch.Size
    bits: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the mask is of now."""
        return getattr(self.module, self.key)

    def kept(self) -> Tensor:
        """Return which weights stay: bool, the shape of the weight."""
        return self._flat().ne(0).view(-1)[: self.shape.numel()].view(self.shape)

    def pruned(self) -> Tensor:
        """Return which weights are zero: bool, the shape of the weight."""
        return self._flat().eq(0).view(-1)[: self.shape.numel()].view(self.shape)

    def replace(self, kept: Tensor) -> None:
        """Take another mask: bool, the shape of the weight."""
        self.bits = pack_bits(kept)

    def _flat(self) -> Tensor:
        return self.bits.unsqueeze(-1).bitwise_and(_powers(self.bits.device))


class Masks(dict[str, Mask]):
    """The masks of a model, by the names of its parameters without what wrappers put into them."""

    @classmethod
    def of(cls, model: nn.Module, choose: Callable[[str, Tensor, int], Tensor]) -> "Masks":
        """Make a mask for each projection that was, or by default would be, pruned.

        Args:
            model (`nn.Module`): as it is trained: prepared by accelerate, resumed, perhaps with adapters.
            choose (`Callable`): from a name, the local weight and its input dimension to the bool mask of what stays.

        Raises:
            `ValueError`: there is nothing to prune, the model is packed, or it is sharded so that groups of four are
                cut in two.
        """
        model = bare(model)
        refuse_packed(model)
        masks = cls()
        for path, dim in _targets(model):
            parameter, name = model.get_parameter(path), _WRAPPER.sub("", path)
            check_shards(parameter, dim, name)
            weight = local(parameter)
            kept = choose(name, weight, dim)
            owner, _, key = path.rpartition(".")
            masks[name] = Mask(model.get_submodule(owner), key, dim, weight.shape, pack_bits(kept))
        if not masks:
            raise ValueError(f"{type(model).__name__} has no projection that can be 2:4; there is nothing to train.")
        return masks

    @torch.no_grad()
    def apply_(self) -> None:
        """Write +0.0 into every pruned weight."""
        zero_pruned_((local(mask.parameter), mask) for mask in self.values())

    def mask_gradients(self) -> list[RemovableHandle]:
        """Zero the gradients of pruned weights from now on, at the end of each backward pass; return the hooks.

        Plain tensor hooks never fire under FSDP2; these do, there on the shard.
        """
        hook = _GradientHook(self)
        return [
            mask.parameter.register_post_accumulate_grad_hook(hook)
            for mask in self.values()
            if mask.parameter.requires_grad
        ]

    @torch.no_grad()
    def zero_gradients_(self) -> None:
        """Write +0.0 into the gradient of every pruned weight."""
        gradients = ((mask.parameter.grad, mask) for mask in self.values() if mask.parameter.requires_grad)
        zero_pruned_((local(gradient), mask) for gradient, mask in gradients if gradient is not None)

    @torch.no_grad()
    def violations(self) -> int:
        """Count the nonzeros outside the masks, in all processes together where the model is sharded."""
        return int(self._sum(lambda mask, weight: weight.ne(0).logical_and_(mask.pruned())))

    @torch.no_grad()
    def density(self) -> float:
        """Return the share of nonzeros, from 0 to 1."""
        numbers = sum(mask.parameter.numel() for mask in self.values())
        return float(self._sum(lambda _, weight: weight.ne(0))) / max(numbers, 1)

    def verify(self) -> None:
        """Raise `RuntimeError` when a pruned weight is not zero."""
        count = self.violations()
        if count:
            raise RuntimeError(
                f"{count} pruned weights are not zero: something wrote to them after the optimizer's step. Write to "
                "weights before Sparse24Callback.on_optimizer_step, or keep those modules out of the masks."
            )

    def _sum(self, marks: Callable[[Mask, Tensor], Tensor]) -> Tensor:
        counts, sharded = [], False
        for mask in self.values():
            counts.append(marks(mask, local(mask.parameter)).sum())
            sharded = sharded or is_sharded(mask.parameter)
        total = torch.stack(counts).sum()
        return processes.sum_(total) if sharded else total


def refuse_packed(model: nn.Module) -> None:
    """Raise `ValueError` when a model has packed layers, whose weights are not there to be trained."""
    packed = sum(isinstance(module, PackedModule) for module in model.modules())
    if packed:
        raise ValueError(
            f"2:4 training needs the dense weights of a model, and {packed} layers of {type(model).__name__} are "
            "packed. Prune with pack=False or call unpack_ on it, train that, and pack it afterwards (pack_)."
        )


def bare(model: nn.Module) -> nn.Module:
    """Return a model without what DDP and torch.compile wrap around it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool mask as (ceil(n / 8),) uint8, the first element in the lowest bit.

    ```python
    >>> pack_bits(torch.tensor([True, False, False, True])).tolist()
    [9]

    ```
    """
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return flat.mul_(_powers(flat.device)).sum(-1, dtype=torch.uint8)


@cache
def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def zero_pruned_(pairs: Iterable[tuple[Tensor, Mask]]) -> None:
    """Write +0.0 into tensors wherever their masks prune: on a GPU into all of them at once."""
    together = []
    for tensor, mask in pairs:
        if zero_pruned.takes(tensor, mask.bits):
            together.append((tensor, mask.bits))
        else:
            tensor.masked_fill_(mask.pruned(), 0)
    zero_pruned.zero_pruned_(together)


class _GradientHook:
    """Called after each gradient is accumulated: has all of them masked when the backward pass is over.

    DDP averages gradients and writes them back at the end of the pass, in a callback that it queues when the last one
    is there. By the time the first callback of this hook runs every other is queued, so what it queues comes last.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks, self._pass = masks, -1

    def __call__(self, parameter: nn.Parameter) -> None:
        current = torch._C._current_graph_task_id()  # of a pass that failed there is nothing left to wait for
        if current == -1:  # not called by autograd
            self._masks.zero_gradients_()
        elif current != self._pass:
            self._pass = current
            _queue(lambda: _queue(self._masks.zero_gradients_))


def _queue(callback: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that runs."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _targets(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the path and input dimension of each weight that the model's record, or else the default, chooses."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("FSDP1 flattens parameters, which cuts groups of four in two. Use FSDP2: fsdp_version: 2.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of adapters
    prefix = next(name for name, module in model.named_modules() if module is base)
    record = record_of(base)
    selection = select(base, record.get("target_modules"), record.get("modules_to_not_convert"), strict=False)
    for target in selection.targets:
        parts = (prefix, target.module_name, target.parameter)
        yield ".".join(part for part in parts if part), target.dim
