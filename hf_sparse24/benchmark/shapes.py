"""Which projections are measured: those that `selection` finds in a model, or shapes that the user names.

A model is built on the meta device from its config, so that any architecture works and no weight is read.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_sparse24.model_name import check_model_name
from hf_sparse24.selection import select

# Roles that read the same input when they stand in one module and are equally wide.
_SIBLINGS = ({"q", "k", "v", "qkv", "kv"}, {"gate", "up", "gate_up"})


class Shape(NamedTuple):
    """A projection (N, K), and what it is in the model.

    Attributes:
        out_features (`int`): N.
        in_features (`int`): K.
        label (`str`): the roles that have this shape, e.g. "gate up"; "" for a shape that the user named.
    """

    out_features: int
    in_features: int
    label: str = ""

    def __str__(self) -> str:
        """Return OUTxIN, as `parse_shapes` reads it."""
        return f"{self.out_features}x{self.in_features}"


def parse_shapes(text: str) -> list[Shape]:
    """Read shapes as `hf-sparse24 bench gemm --shapes` takes them.

    Raises:
        `ValueError`: something is no pair of sizes, or in_features is not divisible by four.

    ```python
    >>> [str(shape) for shape in parse_shapes("28672x4096,4096x14336")]
    ['28672x4096', '4096x14336']

    ```
    """
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", part)
        if match is None or int(match[2]) % 4:
            raise ValueError(
                f"--shapes takes OUTxIN with IN divisible by 4, separated by commas, as in 28672x4096; got {part!r}."
            )
        shapes.append(Shape(int(match[1]), int(match[2])))
    return shapes


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of this config on the meta device."""
    with torch.device("meta"):
        return make_model(config, torch.bfloat16)


def make_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of this config with random weights on the current device, to evaluate."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return model_class(config)(config).eval()
    finally:
        torch.set_default_dtype(before)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a config names, or the causal language model of its type, or the base model.

    Raises:
        `ValueError`: transformers has none of them.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING)
    fallback = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    found = getattr(transformers, (config.architectures or [""])[0], fallback)
    if found is None:
        raise ValueError(f"transformers has no model class for a {type(config).__name__} without architectures.")
    return found


def read_config(name: str) -> PreTrainedConfig:
    """Return the config of a folder, of a `config.json`, or of a Hub id.

    Raises:
        `ValueError`: there is no such path, and it is no Hub id.
    """
    path = Path(name).expanduser()
    check_model_name(name)
    return AutoConfig.from_pretrained(path if path.exists() else name)


def model_shapes(model: nn.Module) -> list[Shape]:
    """Return the shapes of the linear targets of a model, each once, with the roles that have it.

    Raises:
        `ValueError`: nothing in the model would be packed.
    """
    roles: dict[tuple[int, int], list[str]] = {}
    for _, role, shape in _targets(model):
        known = roles.setdefault(shape, [])
        if role not in known:
            known.append(role)
    return [Shape(*shape, label=" ".join(names)) for shape, names in roles.items()]


def layer_groups(model: nn.Module, merged: bool = False) -> list[list[Shape]]:
    """Return the projections of the first layer that has the most common set of them, grouped by shared input.

    Projections share an input when they stand in one module, are equally wide, and are siblings by their roles: q, k
    and v, or gate and up.

    Args:
        model (`nn.Module`): may be on the meta device.
        merged (`bool`): one wider projection for each group, as models with a fused qkv or gate_up have it.

    Raises:
        `ValueError`: nothing in the model would be packed.
    """
    layers: dict[str, dict[tuple[str, int, int], list[Shape]]] = {}
    for position, (name, role, (out_features, in_features)) in enumerate(_targets(model)):
        layer = re.match(r".*?\.\d+\.|\d+\.", name)
        family = next((number for number, roles in enumerate(_SIBLINGS) if role in roles), -1 - position)
        group = layers.setdefault(layer[0] if layer else "", {})
        shape = Shape(out_features, in_features, role)
        group.setdefault((name.rpartition(".")[0], in_features, family), []).append(shape)
    found = [list(groups.values()) for groups in layers.values()]
    common = max(found, key=found.count)
    return [[_merge(group)] for group in common] if merged else common


def _merge(group: Sequence[Shape]) -> Shape:
    outputs = sum(shape.out_features for shape in group)
    return Shape(outputs, group[0].in_features, "+".join(shape.label for shape in group))


def _targets(model: nn.Module) -> list[tuple[str, str, tuple[int, int]]]:
    """Return name, role, and (out, in) of every linear target."""
    found = []
    for target in select(model).targets:
        if target.packs:
            weight = getattr(model.get_submodule(target.module_name), target.parameter)
            shape = (weight.shape[1], weight.shape[0]) if target.dim == -2 else (weight.shape[0], weight.shape[1])
            found.append((target.name, target.role, shape))
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear projection that could be packed.")
    return found
