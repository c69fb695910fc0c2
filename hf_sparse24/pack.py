"""`pack_` and `unpack_`: swap the 2:4 projections of a model for packed layers, and back."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.utils import logging

from hf_sparse24.capability import check_backend
from hf_sparse24.config import Sparse24Config
from hf_sparse24.identity import declare_dense, declare_packed, record_of
from hf_sparse24.kernels import dispatch
from hf_sparse24.nn import PackedModule, SharedInput, Sparse24Experts, Sparse24Linear
from hf_sparse24.nn.mixture import pack_experts_, packable_experts, unpack_experts_
from hf_sparse24.packing import check_value_dtype
from hf_sparse24.pattern import check_finite, check_present
from hf_sparse24.prune import find_violating, refuse_packed_layers
from hf_sparse24.report import SparsityReport, sparsity_report
from hf_sparse24.roles import role_of
from hf_sparse24.selection import Selection, Target, select
from hf_sparse24.shards import is_sharded

logger = logging.get_logger(__name__)

_SIBLINGS = ({"q", "k", "v"}, {"gate", "up"})  # which read one input, where they stand side by side


@torch.no_grad()
def pack_(
    model: nn.Module,
    quantization: str | None = None,
    backend: str = "auto",
    target_modules: Sequence[str] | str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
) -> SparsityReport:
    """Pack the projections of a 2:4 model in place, ready to generate and to save.

    Each layer is verified before it is packed, and the dense one is freed at once. Layers that share their weight
    (Zamba's) become one packed layer, which stands in the place of each. The stacks of experts (3-D) of a layer are
    packed together; where that cannot be, they stay dense tensors with zeros, and the report says why.

    Args:
        model (`nn.Module`): a transformers model that `prune_` has pruned, or that was loaded dense-masked.
        quantization (`str`, *optional*): `"int8"` or `"fp8"`.
        backend (`str`): as in `Sparse24Config`.
        target_modules, modules_to_not_convert: as in `Sparse24Config`. Default: what it was pruned with, by its
        record.

    Raises:
        `ValueError`: a projection is not 2:4, or nothing can be packed; nothing was changed.
    """
    refuse_packed_layers(model)
    record = record_of(model)
    asked = {"target_modules": target_modules, "modules_to_not_convert": modules_to_not_convert}
    record |= {key: value for key, value in asked.items() if value is not None}
    selection = select(model, record.get("target_modules"), record.get("modules_to_not_convert"))
    _check_2to4(model, selection)
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
    if isinstance(model, PackedModule):
        raise ValueError("unpack_ takes a model that holds packed layers; for a single layer call its to_linear().")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    for name, module in modules.items():
        check_present(module.weight, name)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no packed 2:4 layer; there is nothing to unpack.")
    record, places = record_of(model), _places(model)
    packed = [module for module in modules.values() if isinstance(module, Sparse24Linear)]
    del modules, module
    while packed:  # each packed layer is freed as soon as its dense one stands in its place
        module = packed.pop()
        _replace(places.pop(module), module, module.to_linear())
    del places
    mixtures = [m for m in model.modules() if any(isinstance(child, Sparse24Experts) for child in m.children())]
    for mixture in mixtures:
        unpack_experts_(mixture)
    declare_dense(model, record)
    return sparsity_report(model)


def set_backend_(model: nn.Module, backend: str) -> None:
    """Let the packed layers of a model run through another backend, in place.

    For a checkpoint that was loaded packed: its config says nothing of the machine that it is loaded on.

    Args:
        model (`nn.Module`): holds packed layers.
        backend (`str`): as in `Sparse24Config`.

    Raises:
        `ValueError`: the backend is unknown, cannot run here or does not take one of the weights; nothing was changed.
    """
    check_backend(backend)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    if not packed:
        raise ValueError(f"{type(model).__name__} has no packed 2:4 layer whose backend could be set.")
    for name, module in packed.items():
        dtype = module.weight.dtype
        capability = dispatch.takes_weight(dtype, module.out_features, module.in_features, backend)
        if module.weight.is_cuda and not capability.ok:
            raise ValueError(f"backend={backend!r} does not take {name}: {capability.reason}.")
    for module in packed.values():
        module.backend = backend
        module.prepare_()


def pack_selected_(model: nn.Module, selection: Selection, quantization: str | None, backend: str) -> None:
    """Pack the targets of a selection, one at a time; experts that cannot be packed stay dense tensors with zeros.

    Raises:
        `ValueError`: a target has no packed form; nothing was changed.
    """
    _check_packable(model, selection, quantization)

    def pack(linear: nn.Module, name: str) -> nn.Module:
        return Sparse24Linear.from_linear(linear, quantization, backend, name)

    def pack_stack(stack: Tensor, target: Target) -> Sparse24Experts:
        return Sparse24Experts.from_stack(stack, target.dim, quantization, backend, target.name)

    _replace_experts(model, selection, pack_stack, "Packing experts")  # the largest go first
    _replace_targets(model, selection, pack, "Packing")


def make_packed_skeleton_(model: nn.Module, selection: Selection, quantization: str | None, backend: str) -> int:
    """Put uninitialized packed layers in place of the targets, for a checkpoint to fill; return how many."""

    def empty(linear: nn.Module, _: str) -> nn.Module:
        return Sparse24Linear.like(linear, quantization, backend)

    def empty_stack(stack: Tensor, target: Target) -> Sparse24Experts:
        return Sparse24Experts.like(stack, target.dim, quantization, backend)

    experts = _replace_experts(model, selection, empty_stack, "Preparing packed experts")
    return experts + _replace_targets(model, selection, empty, "Preparing packed layers")


def _linear_targets(selection: Selection) -> list[Target]:
    return [target for target in selection.targets if target.packs]


def _packed_targets(model: nn.Module, selection: Selection) -> list[Target]:
    """Return what becomes packed: every linear target, and the stacks of experts that can be."""
    stacks, _ = packable_experts(model, selection)
    return _linear_targets(selection) + [target for targets in stacks.values() for target in targets]


def _check_2to4(model: nn.Module, selection: Selection) -> None:
    target = find_violating(model, Selection(tuple(_packed_targets(model, selection))))
    if target is not None:
        raise ValueError(
            f"Packing needs 2:4 weights; some groups of {target.name} hold more than two nonzeros. "
            "Prune the model with prune_ first, or keep the module out with modules_to_not_convert."
        )


def _check_packable(model: nn.Module, selection: Selection, quantization: str | None) -> None:
    """Raise before anything is changed when a target has no packed form."""
    linear, packed = _linear_targets(selection), _packed_targets(model, selection)
    if not packed:
        _, left = packable_experts(model, selection)
        reasons = {matrix.reason for matrix in selection.skipped} | set(left.values())
        reasons = "; ".join(sorted(reasons)) or "no linear projection found"
        raise ValueError(f"Nothing to pack in {type(model).__name__}: {reasons}.")
    _check_tied(model, {target.module_name for target in linear})
    for target in packed:
        weight = getattr(model.get_submodule(target.module_name), target.parameter)
        check_present(weight, target.name)
        if is_sharded(weight):
            raise ValueError(
                f"Packed layers are not sharded, and {target.name} is, over processes. Save the model as it is "
                "(pack=False), load it without distributed_config, and pack it then."
            )
        check_finite(weight, target.name)
        check_value_dtype(weight.dtype, target.name)
    if quantization == "fp8":
        _refuse_casts_to_fp8(model, linear)
    if quantization is not None:
        _refuse_rescaling(model)


def _refuse_casts_to_fp8(model: nn.Module, linear: Sequence[Target]) -> None:
    """Raise when the code around a layer casts its input to the dtype of its weight, as T5's does for `wo`."""
    casting = set()
    for target in linear:
        parent, _, leaf = target.module_name.rpartition(".")
        cast = rf"\.to\(\s*(dtype=)?self\.{re.escape(leaf)}\.weight\.dtype"
        if re.search(cast, _source_of_forward(type(model.get_submodule(parent)))):
            casting.add(leaf)
    if casting:
        raise ValueError(
            f"{type(model).__name__} casts inputs to the dtype of the weight of {sorted(casting)}, which FP8 would "
            f"ruin. Use quantization='int8', or modules_to_not_convert={sorted(casting)}."
        )


def _refuse_rescaling(model: nn.Module) -> None:
    """Raise for RWKV, which divides weights in place when it runs, unless its config says that it does not."""
    for module in model.modules():
        if hasattr(module, "_rescale_layers") and getattr(module.config, "rescale_every", 0) > 0:
            raise ValueError(
                f"{type(model).__name__} divides weights in place every {module.config.rescale_every} layers, which "
                "8-bit weights do not take. Load it with rescale_every=0, or use quantization=None."
            )


@functools.cache
def _source_of_forward(module_class: type[nn.Module]) -> str:
    try:
        return inspect.getsource(module_class.forward)
    except (OSError, TypeError):  # no source: the layer itself then refuses inputs in FP8
        return ""


def _check_tied(model: nn.Module, names: set[str]) -> None:
    """Raise when the weight of a layer that is to be packed is also that of a module that cannot be the same layer."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner, first = owners.setdefault(id(parameter), (name, module))
            if owner == name or not names & {owner, name} or parameter.ndim < 2:
                continue
            if _layer_of(first) != _layer_of(module):
                raise ValueError(
                    f"{owner} and {name} share one weight and are not the same layer (type, bias or device differ), "
                    "which no packed layer can be. Use pack=False, or keep them out with modules_to_not_convert."
                )


def _layer_of(module: nn.Module) -> tuple[object, ...]:
    """Return what makes two modules one layer: their type, their parameters and where they run."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return type(module), device, *((key, id(value)) for key, value in module.named_parameters(recurse=False))


def merge_tied_(model: nn.Module) -> None:
    """Let packed layers that were read apart and share all tensors be one layer, prepared and unpacked once."""
    layers: dict[tuple[object, ...], nn.Module] = {}
    for module, places in _places(model).items():
        if isinstance(module, Sparse24Linear):
            first = layers.setdefault(_layer_of(module), module)
            if first is not module:
                _replace(places, module, first)


def _replace_targets(
    model: nn.Module, selection: Selection, make: Callable[[nn.Module, str], nn.Module], title: str
) -> int:
    linear, places = _linear_targets(selection), _places(model)
    tied: dict[int, list[nn.Module]] = {}
    for module in places:
        tied.setdefault(id(getattr(module, "weight", None)), []).append(module)
    for target in logging.tqdm(linear, desc=title, unit="layer", leave=False):
        modules = tied.pop(id(model.get_submodule(target.module_name).weight))
        packed = make(modules[0], target.name)
        while modules:  # each dense layer is freed as soon as the packed one stands in its place
            _replace(places.pop(modules[-1]), modules.pop(), packed)
    _share_inputs(model)
    return len(linear)


def _replace_experts(
    model: nn.Module, selection: Selection, make: Callable[[Tensor, Target], Sparse24Experts], title: str
) -> int:
    """Put packed stacks in the place of the experts that can be packed; return how many stacks."""
    stacks, left = packable_experts(model, selection)
    for reason in dict.fromkeys(left.values()):
        logger.warning_once(f"Experts stay dense tensors with zeros: {reason}.")
    for name, targets in logging.tqdm(stacks.items(), desc=title, unit="layer", leave=False, disable=not stacks):
        module, by_name = model.get_submodule(name), {target.parameter: target for target in targets}
        pack_experts_(module, lambda key, m=module, t=by_name: make(getattr(m, key), t[key]))
    return sum(map(len, stacks.values()))


def _share_inputs(model: nn.Module) -> None:
    """Let siblings with 8-bit weights quantize their input together."""
    groups: dict[tuple[str, int, int], list[Sparse24Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear) and module.quantization:
            role, parent = role_of(name), name.rpartition(".")[0]
            for number, roles in enumerate(_SIBLINGS):
                if role in roles:
                    groups.setdefault((parent, number, module.in_features), []).append(module)
    for siblings in groups.values():
        shared = SharedInput(len(siblings))
        for number, sibling in enumerate(siblings):
            sibling.share_input(shared, number)


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
