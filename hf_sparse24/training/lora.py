"""Adapters whose merged weights are 2:4: MaskLoRA, and plain LoRA merged and pruned again.

The product of two thin matrices is dense, so that merging LoRA into a pruned weight fills its zeros. A masked adapter
adds `mask * (B A)` instead: what it learns it keeps when it is merged, and zeros stay zeros (PERP, arXiv:2312.15230).
Each forward pass makes that product, out x in, which batches of a few thousand tokens hide.

Adapters are for training; publish the merged model. A masked adapter that is saved by itself looks like any other, and
PEFT alone would load it without its mask: read it with `load_masked_lora`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from hf_sparse24.identity import record_of
from hf_sparse24.pattern import find_violations, mask_2to4, prune_2to4
from hf_sparse24.selection import select
from hf_sparse24.training.masks import Mask, pack_bits


class MaskedLoraLinear(lora.Linear):
    """LoRA on a 2:4 linear layer, masked as the layer is; on any other layer it is LoRA as it always was."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        weight = base_layer.weight.detach()
        self._masked = weight.shape[-1] % 4 == 0 and not find_violations(weight).count
        if self._masked and (self.lora_variant or self.lora_bias[adapter_name]):
            raise ValueError("Masked adapters are plain LoRA: leave out use_dora, lora_bias and other variants.")
        bits = pack_bits(mask_2to4(weight.abs())) if self._masked else torch.empty(0, dtype=torch.uint8)
        self.register_buffer("_kept_bits", bits.to(weight.device), persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to the weight: (out, in), zero wherever the weight is pruned."""
        delta = super().get_delta_weight(adapter)
        return delta.masked_fill(self._pruned(), 0) if self._masked else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the adapters that are active."""
        if not self._masked or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Masked adapters take no adapter_names: one batch, one set of adapters.")
        result = self.base_layer(x)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                delta = self.get_delta_weight(adapter)
                read = self.lora_dropout[adapter](self._cast_input_dtype(x, delta.dtype))
                result = result + F.linear(read, delta).to(result.dtype)
        return result

    def _pruned(self) -> Tensor:
        layer = self.get_base_layer()
        return Mask(layer, "weight", -1, layer.weight.shape, self._kept_bits).pruned()


def add_masked_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Put masked adapters on a pruned model, in place of `peft.get_peft_model`.

    Trains with any trainer; `merge_and_unload` then gives a dense-masked model, 2:4 as before.

    Args:
        model (`nn.Module`): dense-masked; packed layers take ordinary adapters, for inference.
        config (`LoraConfig`): as PEFT takes it.

    Raises:
        `ValueError`: no module that is adapted is 2:4.
    """
    adapted = get_peft_model(model, _masked(config))
    _refuse_dense(adapted)
    return adapted


def load_masked_lora(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put masked adapters that were saved on the pruned model that they were trained on."""
    config = _masked(LoraConfig.from_pretrained(folder))
    adapted = PeftModel.from_pretrained(model, folder, config=config, is_trainable=is_trainable)
    _refuse_dense(adapted)
    return adapted


@dataclass(frozen=True, slots=True)
class MergeLoss:
    """What pruning a merged adapter again took from it.

    Attributes:
        name (`str`): of the projection.
        relative_error (`float`): the norm of what was pruned, relative to that of what the adapter had added.
    """

    name: str
    relative_error: float


@torch.no_grad()
def merge_and_prune_(adapted: PeftModel) -> tuple[nn.Module, list[MergeLoss]]:
    """Merge plain LoRA into a pruned model and prune the result to the nearest 2:4 weights.

    Args:
        adapted (`PeftModel`): with adapters on a dense-masked model.

    Returns:
        The model without adapters, and for each projection what the pruning lost: 1 is as much as was learned. Masked
        adapters lose nothing.
    """
    base = adapted.get_base_model()
    record = record_of(base)
    selection = select(base, record.get("target_modules"), record.get("modules_to_not_convert"), strict=False)
    before = {}
    for target in selection.targets:
        weight = getattr(base.get_submodule(target.module_name), target.parameter)
        if target.module_name.endswith(".base_layer") and not find_violations(weight, target.dim).count:
            before[target.name] = (weight.detach().clone(), target.dim)
    if not before:
        raise ValueError("No adapted projection is 2:4, so there is nothing to keep so. Use merge_and_unload.")
    model = adapted.merge_and_unload()
    losses = []
    for name, (weight, dim) in before.items():
        merged = model.get_submodule(name).weight
        pruned = prune_2to4(merged.data, dim=dim)
        added = (merged - weight).float().norm()
        losses.append(MergeLoss(name, float((merged - pruned).float().norm() / added.clamp_min(1e-30))))
        merged.data.copy_(pruned)
    return model, losses


def _masked(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    return config


def _refuse_dense(adapted: PeftModel) -> None:
    if not any(isinstance(module, MaskedLoraLinear) and module._masked for module in adapted.modules()):
        raise ValueError(
            "Masked adapters need a pruned, dense-masked model, and no adapted module is 2:4. Call hf_sparse24.prune_ "
            "first, or unpack_ for a packed model."
        )
