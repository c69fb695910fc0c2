"""The same model several times: dense, pruned and packed by this package, or quantized dense by torchao.

Each variant starts from the same dense weights, read again or drawn again from one seed, so that never more than one
model is in memory. What the variant is compared with, the dense model or the pruned one before packing, runs first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse24.benchmark.roofline import DTYPE
from hf_sparse24.benchmark.shapes import make_model, model_class, read_config
from hf_sparse24.config import Sparse24Config
from hf_sparse24.pack import pack_
from hf_sparse24.prune import prune_
from hf_sparse24.selection import select


class Variant(NamedTuple):
    """A form of a model.

    Attributes:
        precision (`str`): of the products: bf16, int8, fp8.
        sparse (`bool`): pruned 2:4 by magnitude and packed by this package.
        granularity (`str`): of torchao's dense FP8: PerRow or PerTensor, for weights and activations alike. torchao's
            INT8 has one.
    """

    precision: str
    sparse: bool = False
    granularity: str = ""

    @property
    def by_torchao(self) -> bool:
        """Whether torchao quantizes the dense model."""
        return not self.sparse and self.precision != "bf16"


VARIANTS = {
    "dense-bf16": Variant("bf16"),
    "dense-fp8": Variant("fp8", granularity="PerRow"),
    "dense-fp8-tensor": Variant("fp8", granularity="PerTensor"),
    "dense-int8": Variant("int8"),
    "2:4-int8": Variant("int8", sparse=True),
    "2:4-fp8": Variant("fp8", sparse=True),
    "2:4-bf16": Variant("bf16", sparse=True),
}


@dataclass(frozen=True)
class Source:
    """Where the dense weights come from.

    Args:
        name (`str`): a folder, a `config.json`, or a Hub id.
        random_weights (`bool`): read the config only, and draw weights on the device as the model initializes them.
        layers (`int`, *optional*): with random weights, this many layers in place of the config's number.
    """

    name: str
    random_weights: bool = False
    layers: int | None = None

    def config(self) -> PreTrainedConfig:
        """Return the config.

        Raises:
            `ValueError`: the model is quantized already, or another number of layers is asked of stored weights.
        """
        config = read_config(self.name)
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"{self.name} is quantized already. Name the dense model: its packed forms are made here."
            )
        if self.layers is not None:
            if not self.random_weights:
                raise ValueError("--layers changes the model, which only --random-weights can follow.")
            config.get_text_config().num_hidden_layers = self.layers
            if getattr(config.get_text_config(), "layer_types", None):
                config.get_text_config().layer_types = config.get_text_config().layer_types[: self.layers]
        return config

    def load(self, device: torch.device) -> PreTrainedModel:
        """Return the dense model in bfloat16 on a device."""
        config = self.config()
        if not self.random_weights:
            loaded = model_class(config).from_pretrained(self.name, dtype=DTYPE, device_map=str(device))
            return loaded.eval()
        torch.manual_seed(0)
        with device:
            return make_model(config, DTYPE)


@torch.no_grad()
def make_variant_(
    model: PreTrainedModel, variant: Variant, backend: str, reference: Callable[[PreTrainedModel], None]
) -> None:
    """Turn a dense model into a variant, in place.

    Args:
        model (`PreTrainedModel`): dense.
        variant (`Variant`): what it becomes.
        backend (`str`): of this package's layers.
        reference (`Callable`): is called with the bf16 model that the variant is an approximation of.

    Raises:
        `ImportError`: torchao is asked for and not installed.
    """
    if variant.sparse:
        prune_(model, Sparse24Config(method="magnitude"))
    reference(model)
    if variant.sparse:
        pack_(model, None if variant.precision == "bf16" else variant.precision, backend)
    elif variant.by_torchao:
        _quantize_dense_(model, variant)


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of layers that hold projections to be packed, or packed ones, by their paths."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{known}.") for known in stacks):
            inner = [child for child in module.modules() if isinstance(child, nn.Linear)]
            if inner and len({type(layer) for layer in module}) == 1 and len(module) > 1:
                stacks[name] = module
    return stacks


def _quantize_dense_(model: nn.Module, variant: Variant) -> None:
    """Quantize with torchao the same projections that 2:4 takes, and no head."""
    import torchao.quantization as torchao

    # torchao's settings for torch.compile are global: all variants compile under torch's own.
    if variant.precision == "int8":
        config = torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    else:
        granularity = getattr(torchao, variant.granularity)()
        config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)
    names = {target.module_name for target in select(model).targets if target.packs}
    torchao.quantize_(model, config, filter_fn=lambda module, name: name in names)
