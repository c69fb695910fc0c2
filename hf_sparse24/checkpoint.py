"""What the files of a packed checkpoint say before any tensor is read: safetensors headers only.

A layer of the file is whatever has a `<layer>.weight_indices`; names are the file's own, which transformers may rename
on the way in. The contents of the indices are checked later, when they are in memory (`verification`).
"""

from collections.abc import Iterable
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from hf_sparse24.packing import QUANTIZED_DTYPES, damaged, indices_width

_VALUE_DTYPES = {None: {"BF16", "F16", "F32"}, "int8": {"I8"}, "fp8": {"F8_E4M3"}}
_INDICES = ".weight_indices"


def check_packed_files(files: Iterable[str], quantization: str | None, expected_layers: int) -> None:
    """Raise `ValueError` when the headers do not describe a packed checkpoint of this model.

    Args:
        files (`Iterable[str]`): paths of all safetensors shards.
        quantization (`str`, *optional*): what the config of the checkpoint says.
        expected_layers (`int`): how many packed layers the model has.
    """
    tensors = {key: header for file in files for key, header in _headers(file).items()}
    layers = [key.removesuffix(_INDICES) for key in tensors if key.endswith(_INDICES)]
    for layer in layers:
        _check_layer(tensors, layer, quantization)
    if len(layers) < expected_layers:  # more is fine: a part of a larger model may be loaded
        raise ValueError(
            f"The packed checkpoint holds {len(layers)} packed layers and this model has {expected_layers} to fill: "
            "a file is missing or damaged, or it belongs to another model. Download or save it again."
        )


class Contents(NamedTuple):
    """What files hold, by their own names: packed layers, packed stacks of experts, and all weights with a shape."""

    layers: set[str]
    stacks: set[str]
    weights: set[tuple[str, tuple[int, ...]]]


def contents_of(files: Iterable[str]) -> Contents:
    """Return what the files of a packed checkpoint hold."""
    shapes = {key: shape for file in files for key, (_, shape) in _headers(file).items()}
    packed = {key.removesuffix(_INDICES): len(shape) for key, shape in shapes.items() if key.endswith(_INDICES)}
    stacks = {name for name, dimensions in packed.items() if dimensions == 3}
    weights = {(key.removesuffix(".weight"), shape) for key, shape in shapes.items()}
    return Contents(packed.keys() - stacks, stacks, weights)


def _headers(file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {key: (value.get_dtype(), tuple(value.get_shape())) for key, value in slices.items()}
    except SafetensorError as error:
        raise damaged(f"{file} is no complete safetensors file ({error})") from None


def _check_layer(tensors: dict[str, tuple[str, tuple[int, ...]]], layer: str, quantization: str | None) -> None:
    keys = ["weight", "weight_indices"] + (["weight_scale"] if quantization in QUANTIZED_DTYPES else [])
    for key in keys:
        if f"{layer}.{key}" not in tensors:
            raise damaged(f"{layer}.{key} is missing")
    value_dtype, shape = tensors[f"{layer}.weight"]
    in_features = 2 * shape[-1]
    expected = {
        "weight": (_VALUE_DTYPES[quantization], shape),
        "weight_indices": ({"U8"}, (*shape[:-1], indices_width(in_features))),
        "weight_scale": ({"F32"}, shape[:-1]),
    }
    for key in keys:
        dtype, found = tensors[f"{layer}.{key}"]
        dtypes, wanted = expected[key]
        if dtype not in dtypes:
            raise damaged(f"{layer}.{key} is {dtype} where format 1 has {' or '.join(sorted(dtypes))}")
        if found != wanted:
            raise damaged(
                f"{layer}.{key} has shape {found} where format 1 has {wanted} beside {value_dtype} values {shape}"
            )
