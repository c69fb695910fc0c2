"""AdamW that keeps float32 weights and moments for what stays of a pruned matrix, and for nothing else.

Two of four weights never change, so their masters and moments hold nothing. Without them the optimizer takes 6 bytes a
weight in place of 12, beside the weight and its gradient in 16 bits.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_sparse24.identity import record_of
from hf_sparse24.pattern import GROUP_SIZE, find_violations, mask_2to4
from hf_sparse24.selection import select

_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


class CompactAdamW(torch.optim.AdamW):
    """AdamW on the kept weights of 2:4 matrices, in float32; the model's own weights are rounded from them.

    What it optimizes are tensors of its own, which a scheduler treats as it does any others; a state dict holds them
    too, for the model's weights may be rounded.

    Args:
        params: groups of the model's parameters, as every optimizer takes them.
        kept (`dict`): for each 2:4 parameter the bool mask of what stays, two of four along its last dimension.
        kwargs: as `torch.optim.AdamW` takes them.
    """

    def __init__(self, params: Iterable[dict[str, Any]], kept: dict[nn.Parameter, Tensor], **kwargs: Any) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, Tensor | None]] = []
        groups = []
        for group in params:
            masters = [self._master(parameter, kept.get(parameter)) for parameter in group["params"]]
            groups.append({**group, "params": masters})
        super().__init__(groups, **kwargs)

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> "CompactAdamW":
        """Return one for a trainer's model, with the learning rate, betas, decay and groups of its arguments.

        Raises:
            `ValueError`: the trainer shards the model, scales losses, or asks for another optimizer.
        """
        args, model = trainer.args, trainer.model
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.mixed_precision == "fp16":
            raise ValueError("compact_optimizer works with one device or DDP, in float32 or bf16; leave it out here.")
        if args.optim not in _ADAMW:
            raise ValueError(f"compact_optimizer is AdamW; got optim={args.optim!r}. Use optim='adamw_torch'.")
        record, kept = record_of(model), {}
        selection = select(model, record.get("target_modules"), record.get("modules_to_not_convert"), strict=False)
        for target in selection.targets:
            weight = getattr(model.get_submodule(target.module_name), target.parameter)
            if target.dim == -1 and weight.requires_grad and not find_violations(weight.detach()).count:
                kept[weight] = mask_2to4(weight.detach().abs())
        decayed = set(trainer.get_decay_parameter_names(model))
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": args.weight_decay},
            {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
        ]
        fused = args.optim == OptimizerNames.ADAMW_TORCH_FUSED
        betas = (args.adam_beta1, args.adam_beta2)
        return cls(groups, kept, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step with the gradients of the model's parameters, and round the result into them."""
        for parameter, master, columns in self._pairs:
            gradient = parameter.grad
            if gradient is not None:
                master.grad = _take(gradient, columns).float()
                parameter.grad = None
        loss = super().step(closure)
        for parameter, master, columns in self._pairs:
            if master.grad is not None:
                _put(parameter, master, columns)
                master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the model's parameters."""
        for parameter, master, _ in self._pairs:
            parameter.grad = master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, the float32 weights, and which columns they are of."""
        kept = [(master.detach().clone(), columns) for _, master, columns in self._pairs]
        return super().state_dict() | {"kept": kept}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read moments and weights."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kept"})
        pairs = []
        for (parameter, master, _), (saved, columns) in zip(self._pairs, state_dict["kept"], strict=True):
            master.copy_(saved)
            pairs.append((parameter, master, None if columns is None else columns.to(master.device)))
        self._pairs = pairs

    def _master(self, parameter: nn.Parameter, kept: Tensor | None) -> nn.Parameter:
        columns = None if kept is None else _columns(kept)
        master = nn.Parameter(_take(parameter.detach(), columns).float().clone())
        self._pairs.append((parameter, master, columns))
        return master


def _columns(kept: Tensor) -> Tensor:
    """Return which two of every four stay: (..., K / 4, 2) uint8, ascending."""
    columns = kept.unflatten(-1, (-1, GROUP_SIZE)).to(torch.uint8).topk(2, sorted=False).indices
    return columns.sort(-1).values.to(torch.uint8)


def _take(tensor: Tensor, columns: Tensor | None) -> Tensor:
    """Return the kept half of a matrix: (..., K / 4, 2); or all of it."""
    return tensor if columns is None else tensor.unflatten(-1, (-1, GROUP_SIZE)).gather(-1, columns.long())


def _put(parameter: Tensor, values: Tensor, columns: Tensor | None) -> None:
    """Write the kept half, rounded, and leave the zeros."""
    if columns is None:
        parameter.copy_(values)
        return
    groups = parameter.unflatten(-1, (-1, GROUP_SIZE))
    groups.scatter_(-1, columns.long(), values.to(parameter.dtype))
