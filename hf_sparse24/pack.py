"""`pack_` and `unpack_`: swap the 2:4 projections of a model for packed layers, and back."""

from collections.abc import Callable, Sequence

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.utils import logging

from hf_sparse24.config import Sparse24Config
from hf_sparse24.identity import declare_dense, declare_packed, record_of
from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.prune import find_violating
from hf_sparse24.report import SparsityReport, sparsity_report
from hf_sparse24.selection import Selection, Target, select

logger = logging.get_logger(__name__)


@torch.no_grad()
def pack_(
    model: nn.Module,
    quantization: str | None = None,
    backend: str = "auto",
    target_modules: Sequence[str] | str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
) -> SparsityReport:
    """Pack the projections of a 2:4 model in place, ready to generate and to save.

    Each layer is verified before it is packed, and the dense one is freed at once. Fused experts (3-D) have no packed
    layer: they stay dense tensors with zeros.

    Args:
        model (`nn.Module`): a transformers model that `prune_` has pruned, or that was loaded dense-masked.
        quantization (`str`, *optional*): `"int8"` or `"fp8"`.
        backend (`str`): as in `Sparse24Config`.
        target_modules, modules_to_not_convert: as in `Sparse24Config`. Default: what it was pruned with, by its
        record.

    Raises:
        `ValueError`: a projection is not 2:4, or nothing can be packed; nothing was changed.
    """
    record = record_of(model)
    asked = {"target_modules": target_modules, "modules_to_not_convert": modules_to_not_convert}
    record |= {key: value for key, value in asked.items() if value is not None}
    selection = select(model, record.get("target_modules"), record.get("modules_to_not_convert"))
    _check_packable(model, selection)
    pack_selected_(model, selection, quantization, backend)
    record = {**Sparse24Config().record("unknown", selection.roles), **record, "roles": selection.roles}
    declare_packed(model, Sparse24Config.of_checkpoint(record, quantization))
    return sparsity_report(model)


@torch.no_grad()
def unpack_(model: nn.Module) -> SparsityReport:
    """Replace every packed layer by a dense one with explicit zeros, in place.

    With INT8 or FP8 the dense weights are the quantized values times their scales. The model is an ordinary one
    afterwards: it can be trained, moved with `.half()`, and saved for any server.

    Raises:
        `ValueError`: the model has no packed layer, or has some that are offloaded.
    """
    packed = [module for module in model.modules() if isinstance(module, Sparse24Linear)]
    if not packed:
        raise ValueError(f"{type(model).__name__} has no packed 2:4 layer; there is nothing to unpack.")
    if any(module.weight.is_meta for module in packed):
        raise ValueError("Packed layers that are offloaded cannot be unpacked. Load the model onto one device first.")
    record, places = record_of(model), _places(model)
    while packed:  # each packed layer is freed as soon as its dense one stands in its place
        module = packed.pop()
        _replace(places.pop(module), module, module.to_linear())
    declare_dense(model, record)
    return sparsity_report(model)


def pack_selected_(model: nn.Module, selection: Selection, quantization: str | None, backend: str) -> None:
    """Pack the linear targets of a selection, one at a time."""

    def pack(linear: nn.Module, name: str) -> nn.Module:
        return Sparse24Linear.from_linear(linear, quantization, backend, name)

    _replace_targets(model, selection, pack)


def make_packed_skeleton_(model: nn.Module, selection: Selection, quantization: str | None, backend: str) -> int:
    """Put uninitialized packed layers in place of the linear targets, for a checkpoint to fill; return how many."""
    return _replace_targets(model, selection, lambda linear, _: Sparse24Linear.like(linear, quantization, backend))


def _linear_targets(selection: Selection) -> list[Target]:
    return [target for target in selection.targets if not target.is_expert_stack]


def _check_packable(model: nn.Module, selection: Selection) -> None:
    """Raise before anything is changed: there must be linear targets, and each must be 2:4."""
    linear = _linear_targets(selection)
    if not linear:
        reasons = sorted({matrix.reason for matrix in selection.skipped})
        raise ValueError(f"Nothing to pack in {type(model).__name__}: {'; '.join(reasons) or 'no projection found'}.")
    target = find_violating(model, Selection(tuple(linear)))
    if target is not None:
        raise ValueError(
            f"Packing needs 2:4 weights; some groups of {target.name} hold more than two nonzeros. "
            "Prune the model with prune_ first, or keep the module out with modules_to_not_convert."
        )


def _replace_targets(model: nn.Module, selection: Selection, make: Callable[[nn.Module, str], nn.Module]) -> int:
    linear, places = _linear_targets(selection), _places(model)
    for target in logging.tqdm(linear, desc="Packing", unit="layer", leave=False):
        module = model.get_submodule(target.module_name)
        _replace(places.pop(module), module, make(module, target.name))
    return len(linear)


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return where each module stands: parent and name, several for a shared layer."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, key))
    return places


def _replace(places: list[tuple[nn.Module, str]], old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `old` stands, and hand accelerate's hook over."""
    for parent, key in places:
        parent._modules[key] = new
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
