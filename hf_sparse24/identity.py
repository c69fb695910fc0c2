"""What a model says of itself: an ordinary one with zeros in it, or a packed one.

| | dense-masked | packed |
|---|---|---|
| weights | ordinary tensors with exact zeros | `Sparse24Linear`, `Sparse24Experts` |
| `config.json` | a plain `sparse24` record | a `quantization_config` |
| loads without this package | yes, as any model | no, with an error |

The record says what was done (method, seed, roles, versions, and which modules were asked for); both forms carry it,
so that a model can be packed long after it was pruned, and unpacked again.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightTransform
from transformers.quantizers import AutoHfQuantizer

from hf_sparse24.config import QUANT_METHOD, Sparse24Config
from hf_sparse24.nn import PackedModule, Sparse24Linear

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
    model.hf_quantizer.packs_linear = any(isinstance(module, Sparse24Linear) for module in model.modules())
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    model.add_model_tags(list(TAGS))
    keep_module_names(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def keep_module_names(model: PreTrainedModel) -> None:
    """Save packed layers under their own names.

    For some models transformers splits a weight over several when it saves: experts over a file's layer for each
    (Mixtral, Qwen3-MoE), DINOv2's SwiGLU over two. It would split the values and not their indices. Unpacked again,
    the model is saved as transformers would.
    """
    names, default = packed_names(model), get_model_conversion_mapping(model, add_legacy=False)
    known = getattr(model, "_weight_conversions", None)  # those that were used in loading
    if known is None:  # a model that was never loaded is saved with the default ones
        known = [conversion for conversion in default if not isinstance(conversion, PrefixChange)]
    kept, merging = without_merges(known, names), [conversion for conversion in default if _makes(conversion, names)]
    if merging or len(kept) < len(known):
        model._weight_conversions = kept
        model._dense_weight_conversions = known if len(kept) < len(known) else kept + merging


def packed_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors of packed layers that the dense ones have too."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedModule)]
    return [f"{name}.{key}" for name in packed for key in ("weight", "bias")]


def without_merges(conversions: Sequence[WeightTransform], names: Sequence[str]) -> list[WeightTransform]:
    """Return transformers' conversions of a checkpoint without those that make a tensor of one of the names."""
    return [conversion for conversion in conversions if not _makes(conversion, names)]


def _makes(conversion: WeightTransform, names: Sequence[str]) -> bool:
    if not isinstance(conversion, WeightConverter):  # it renames
        return False
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names)
