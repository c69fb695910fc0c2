"""What a model says of itself: an ordinary one with zeros in it, or a packed one.

| | dense-masked | packed |
|---|---|---|
| weights | ordinary tensors with exact zeros | `Sparse24Linear` |
| `config.json` | a plain `sparse24` record | a `quantization_config` |
| loads without this package | yes, as any model | no, with an error |

The record says what was done (method, seed, roles, versions, and which modules were asked for); both forms carry it,
so that a model can be packed long after it was pruned, and unpacked again.
"""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import AutoHfQuantizer

from hf_sparse24.config import QUANT_METHOD, Sparse24Config
from hf_sparse24.nn import Sparse24Linear

TAGS = ("2:4", "sparsity")  # on the Hub


def record_of(model: nn.Module) -> dict[str, Any]:
    """Return the record of a pruned model, dense-masked or packed; empty for any other."""
    config = getattr(model, "config", None)
    quantization_config = getattr(config, "quantization_config", None)
    if isinstance(quantization_config, Sparse24Config):
        return quantization_config.record()
    return dict(getattr(config, "sparse24", None) or {})


def declare_dense(model: nn.Module, record: dict[str, Any]) -> None:
    """Make a model an ordinary one, for Trainer, `.half()`, FSDP and servers, with the record in its config."""
    for key in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(key, None)
    if "_dense_weight_conversions" in model.__dict__:
        model._weight_conversions = model.__dict__.pop("_dense_weight_conversions")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for key in ("quantization_config", "_is_quantized"):
                module.config.__dict__.pop(key, None)
    if isinstance(model, PreTrainedModel):
        model.config.sparse24 = record
        model.add_model_tags(list(TAGS))


def declare_packed(model: nn.Module, config: Sparse24Config) -> None:
    """Make a model a quantized one in the eyes of transformers, so that it saves, reloads and trains as such."""
    if not isinstance(model, PreTrainedModel):
        return
    model.config.__dict__.pop("sparse24", None)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    model.add_model_tags(list(TAGS))
    keep_module_names(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def keep_module_names(model: PreTrainedModel) -> None:
    """Save packed layers under their own names.

    For a few models (DINOv2's SwiGLU) transformers splits a checkpoint's weight over two layers and merges it again
    when it saves. It would merge the values and not their indices.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, Sparse24Linear)]
    names = [f"{name}.{key}" for name in packed for key in ("weight", "bias")]

    def merges_packed_layers(conversion: Any) -> bool:
        targets = conversion.target_patterns if isinstance(conversion, WeightConverter) else []
        return any(re.search(target, name) for target in targets for name in names)

    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [conversion for conversion in conversions if not merges_packed_layers(conversion)]
    if len(kept) < len(conversions):
        model._weight_conversions, model._dense_weight_conversions = kept, conversions
