"""Which weights become 2:4, and why each of the others stays dense.

The rule: inside a numbered layer (`.N.` in the module path), every attention and feed-forward projection by its
*role*; never embeddings, heads, poolers, routers, or anything outside the numbered layers. Decisions rest on
module types and the last parts of a module's name, never on stored full names, which change between versions.

What is left out is data too: every matrix is either a `Target` or a `Skipped` with a reason.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse24.packing import dtype_name
from hf_sparse24.pattern import GROUP_SIZE
from hf_sparse24.roles import is_router, path_inside_layer, role_of

_SAME_AS_LINEAR = ("FalconLinear",)  # has a forward of its own, which computes what nn.Linear's does
_TRANSPOSED = ("Llama4TextExperts", "AriaGroupedExpertsGemm")
_READS_WEIGHTS = ("MultiheadAttention", "WavLMAttention")  # hand the weights of their projections to a function
_BESIDE_VALUES = ("weight_indices", "weight_scale")  # in a packed layer


class Target(NamedTuple):
    """A matrix that is to become 2:4.

    Attributes:
        name (`str`): path of the module, or of the parameter for fused experts.
        module_name (`str`): path of the module.
        parameter (`str`): name of the parameter in it.
        role (`str`): one of `roles.ROLES`, or `"other"` for a module that the user named and the table does not know.
        dim (`int`): its input dimension, -1 or -2.
        read_by (`str`, *optional*): the class whose code hands the weight to a function and calls no layer: no packed
            layer can stand in its place, so it stays a dense tensor with zeros.
    """

    name: str
    module_name: str
    parameter: str
    role: str
    dim: int
    read_by: str | None = None

    @property
    def is_expert_stack(self) -> bool:
        """Whether this is a 3-D stack of experts rather than the weight of a linear layer."""
        return self.read_by is None and self.name.endswith(f".{self.parameter}")

    @property
    def packs(self) -> bool:
        """Whether a packed layer can stand in its place."""
        return not self.is_expert_stack and self.read_by is None


class Skipped(NamedTuple):
    """A matrix that stays dense, with the reason in a few words."""

    name: str
    module_name: str
    parameter: str
    reason: str


class Selection(NamedTuple):
    """Every matrix of a model, in the order of `named_modules()`, with what is to become of it."""

    matrices: tuple[Target | Skipped, ...]

    @property
    def targets(self) -> list[Target]:
        """Those that become 2:4."""
        return [matrix for matrix in self.matrices if isinstance(matrix, Target)]

    @property
    def skipped(self) -> list[Skipped]:
        """Those that stay dense, with the reason."""
        return [matrix for matrix in self.matrices if isinstance(matrix, Skipped)]

    @property
    def roles(self) -> list[str]:
        """The roles of the targets, each once."""
        return sorted({target.role for target in self.targets})


def select(
    model: nn.Module,
    target_modules: Sequence[str] | frozenset[str] | str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    strict: bool = True,
) -> Selection:
    """Choose the projections of a model. Works on the meta device; looks at names, types and shapes only.

    Args:
        model (`nn.Module`): any transformers model.
        target_modules (`Sequence[str]` or `str`, *optional*): as in peft: names that a module's path equals or ends
            with (whole dotted parts), or a regular expression that matches the whole path. Default: every attention
            and feed-forward projection in a numbered layer. (A frozenset: exactly these paths.)
        modules_to_not_convert (`Sequence[str]`, *optional*): names, of one or more whole dotted parts, to keep dense
            wherever they occur in a module's path.
        roles (`Sequence[str]`, *optional*): take only these roles.
        strict (`bool`): raise on a name that matches nothing. A checkpoint that is read back says False.

    Raises:
        `ValueError`: a given name matches no projection; the message lists the nearest ones.
    """
    if strict:
        _check_names(model, target_modules, modules_to_not_convert)
    is_target = _target_matcher(target_modules)
    excluded = list(modules_to_not_convert or ())
    matrices: list[Target | Skipped] = []
    for name, module_name, module, key, weight in _matrices(model):
        reason = _intrinsic_reason(model, name, module, weight)
        role = role_of(name.removesuffix(".weight"))
        if reason is None and any(_contains_parts(name, part) for part in excluded):
            reason = "modules_to_not_convert"
        if reason is None:
            reason = _reason_not_chosen(model, name, role, is_target, roles)
        dim = _input_dim(module)
        if reason is None and weight.shape[dim] % GROUP_SIZE:
            reason = f"in_features {weight.shape[dim]} is not a multiple of {GROUP_SIZE}"
        if reason is None:
            matrices.append(Target(name, module_name, key, role or "other", dim, _read_by(model, name)))
        else:
            matrices.append(Skipped(name, module_name, key, reason))
    return Selection(tuple(matrices))


def _matrices(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, str, Tensor]]:
    """Yield every parameter of two or more dimensions once, tied ones under their first name."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or "bias" in key or key in _BESIDE_VALUES or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            linear = key == "weight" and not _is_expert_stack(module, module_name, parameter)
            name = module_name.removesuffix(".base_layer") if linear else f"{module_name}.{key}".lstrip(".")
            yield name, module_name, module, key, parameter


def _is_expert_stack(module: nn.Module, name: str, weight: Tensor) -> bool:
    return weight.ndim == 3 and "experts" in name.split(".") and not hasattr(module, "weight_indices")


def _read_by(model: nn.Module, name: str) -> str | None:
    parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
    return parent if parent in _READS_WEIGHTS else None


def _computes_as_linear(module: nn.Linear) -> bool:
    """Whether a packed layer could stand in for it: subclasses may group or add what they please."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ in _SAME_AS_LINEAR


def _input_dim(module: nn.Module) -> int:
    """Conv1D stores (in, out); so do a few expert stacks, some of which say so."""
    named = isinstance(module, Conv1D) or type(module).__name__ in _TRANSPOSED
    return -2 if named or getattr(module, "is_transposed", False) else -1


def _intrinsic_reason(model: nn.Module, name: str, module: nn.Module, weight: Tensor) -> str | None:
    """Why this matrix can never become 2:4, whatever the user asks."""
    if isinstance(module, nn.Embedding) or ".lora_" in name:
        return "embedding" if isinstance(module, nn.Embedding) else "adapter"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if is_router(name, module):
        return "router"
    if hasattr(module, "weight_indices"):
        return "already packed"
    # nn.MultiheadAttention has the weights of its q, k and v in one matrix of its own.
    is_linear = isinstance(module, nn.Linear | Conv1D | nn.MultiheadAttention)
    if not is_linear and not _is_expert_stack(module, name, weight):
        return "not a linear projection"
    if isinstance(module, nn.Linear) and not _computes_as_linear(module):
        return "a linear layer with a forward of its own"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"already quantized ({dtype_name(weight.dtype)})"
    if path_inside_layer(name) is None and _is_head(model, name, module):
        return "head"
    if "pooler" in name.split("."):
        return "pooler"
    return None


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """A head is the output embedding, or what stands beside the base model rather than in it."""
    get_output_embeddings: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    if module is get_output_embeddings():
        return True
    base, prefix = getattr(model, "base_model", model), getattr(model, "base_model_prefix", "")
    return base is not model and not name.startswith(f"{prefix}.")


def _reason_not_chosen(
    model: nn.Module, name: str, role: str | None, is_target: Callable[[str], bool] | None, roles: Sequence[str] | None
) -> str | None:
    if is_target is not None:
        return None if is_target(name) else "not in target_modules"
    if path_inside_layer(name) is None:
        return "outside the numbered layers"
    if role is None:
        return "not an attention or feed-forward projection"
    if roles is not None and role not in roles:
        return "role not selected"
    return None


def _target_matcher(
    target_modules: Sequence[str] | frozenset[str] | str | None,
) -> Callable[[str], bool] | None:
    if target_modules is None:
        return None
    if isinstance(target_modules, frozenset):
        return target_modules.__contains__
    if isinstance(target_modules, str):
        fullmatch = re.compile(target_modules).fullmatch
        return lambda name: fullmatch(name) is not None
    suffixes = tuple(target_modules)
    return lambda name: any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)


def _contains_parts(name: str, parts: str) -> bool:
    return f".{parts}." in f".{name}."


def _check_names(
    model: nn.Module,
    target_modules: Sequence[str] | frozenset[str] | str | None,
    modules_to_not_convert: Sequence[str] | None,
) -> None:
    """Raise when something the user wrote names nothing, or only what stays dense in any case."""
    reasons = {name: _intrinsic_reason(model, name, module, w) for name, _, module, _, w in _matrices(model)}
    prunable = [name for name, reason in reasons.items() if reason is None]
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    for item in wanted:
        matches = _target_matcher(item if isinstance(target_modules, str) else [item])
        if matches is None or any(matches(name) for name in prunable):
            continue
        never = sorted({f"{name} ({reason})" for name, reason in reasons.items() if reason and matches(name)})
        if never:
            raise ValueError(f"target_modules {item!r} matches only modules that stay dense: {', '.join(never[:3])}.")
        raise ValueError(
            f"target_modules {item!r} matches no projection of this model. {_nearest(item, prunable, True)}"
        )
    for item in modules_to_not_convert or ():
        if not any(_contains_parts(name, item) for name in reasons):
            near = _nearest(item, list(reasons), at_the_end=False)
            raise ValueError(f"modules_to_not_convert {item!r} matches no module of this model. {near}")


def _nearest(wanted: str, names: list[str], at_the_end: bool) -> str:
    """Suggest as many parts of a path as were written, else one more, else a last part that is like the one written.

    Args:
        wanted (`str`): a name that matches nothing, or a regular expression.
        names (`list[str]`): the paths that there are.
        at_the_end (`bool`): only what a path ends with can match.
    """
    paths = [name.split(".") for name in names]
    leaves = sorted({path[-1] for path in paths})
    count = wanted.count(".") + 1
    near: list[str] = []
    for length in (count, count + 1):
        runs = {
            ".".join(path[start : start + length])
            for path in paths
            for start in range(len(path) - length if at_the_end else 0, len(path) - length + 1)
            if start >= 0
        }
        near = near or difflib.get_close_matches(wanted, sorted(runs), n=5, cutoff=0.7)
    near = near or difflib.get_close_matches(wanted.rpartition(".")[2], leaves, n=5, cutoff=0.5) or leaves[:12]
    return f"Near matches: {', '.join(near)}."
