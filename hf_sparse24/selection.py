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

# The role of a projection by the last part of its name, wherever in a layer it stands ...
_ROLES = {
    "q": "q_proj q_lin query_proj q_a_proj q_b_proj q_attn wq",
    "k": "k_proj k_lin key_proj wk",
    "v": "v_proj v_lin value_proj wv",
    "qkv": "qkv_proj qkv query_key_value Wqkv c_attn in_proj_qkv in_proj_qkvz",
    "kv": "kv_proj kv_a_proj_with_mqa kv_b_proj",
    "o": "o_proj out_lin o_b_proj",
    "gate": "gate_proj w1 wi_0 in_proj_z",
    "up": "up_proj w3 wi_1",
    "gate_up": "gate_up_proj Wi weights_in",
    "down": "down_proj w2 weights_out",
    "fc1": "fc1 c_fc fc_in dense_h_to_4h lin1 linear1 linear_fc1 dense1 pwconv1 intermediate_dense wi ffn ffw_layer_1",
    "fc2": "fc2 fc_out dense_4h_to_h lin2 linear2 linear_fc2 dense2 pwconv2 output_dense ffn_output ffw_layer_2",
}
# ... and by names that mean one thing inside attention and another outside.
_ROLES_IN_ATTENTION = {
    "q": (
        "query q linear_q project_q projection_query query_global to_q to_query Wq q_head layout_query query_key "
        "w2e_query e2w_query e2e_query receptance vision_proj"
    ),
    "k": (
        "key k linear_k project_k projection_key key_global to_k to_key Wk k_head layout_key relative_k_proj "
        "linear_pos text_proj"
    ),
    "v": (
        "value v linear_v project_v projection_value value_global to_v to_value Wv v_head layout_value "
        "values_vision_proj values_text_proj"
    ),
    "qkv": "in_proj att_proj queries_keys_values",
    "kv": "to_kv keys_values",
    "o": (
        "out_proj o dense proj c_proj Wo wo linear_out output output_proj projection projection_layer attention_out "
        "post_proj post final out_vision_proj out_text_proj"
    ),
}
_ROLES_OUTSIDE_ATTENTION = {
    "fc1": (
        "intermediate.dense intermediate_query.dense lang_inter.dense visn_inter.dense layout_intermediate.dense "
        "feed_forward.intermediate mlp.proj_in mlp.in_proj ffn.linear_1 ff.layer_1 ffn.0 ff.0 mlp.0 fc1.proj "
        "dense.dense"
    ),
    "fc2": (
        "output.dense output_query.dense lang_output.dense visn_output.dense layout_output.dense feed_forward.output "
        "mlp.proj_out mlp.out_proj ffn.linear_2 ff.layer_2 ffn.2 ff.3 mlp.2 c_proj"
    ),
    "gate": "feed_forward.receptance w_in.w_0",
    "up": "w_in.w_1 feed_forward.key ffn.proj_up mlp.input_linear shared_mlp.input_linear",
    "down": "wo Wo feed_forward.value ffn.proj_down ffn.w_out mlp.output_linear shared_mlp.output_linear",
}

ROLES = tuple(_ROLES)

# What chooses experts, tokens, or places to look at (deformable attention).
_ROUTER = re.compile(r"(^|_)(router|gate)$|^(sampling_offsets|attention_weights)$")
_INSIDE_ROUTER = re.compile(r"(^|\.)([^.]*router[^.]*|gate|indexer)\.")
_INSIDE_NORM = re.compile(r"(^|\.)([^.]*_)?(layer|rms|batch|group)?_?norm\d*\.(?!attn\.|ffn\.)", re.IGNORECASE)
# Numbered, but beside the layers: what merges patches, or adapts to one language.
_BETWEEN = re.compile(r"(^|\.)([^.]*merger[^.]*|adapter_modules)\.")
_SAME_AS_LINEAR = ("FalconLinear",)  # has a forward of its own, which computes what nn.Linear's does
_TRANSPOSED = ("Llama4TextExperts", "AriaGroupedExpertsGemm")
_READS_WEIGHTS = ("MultiheadAttention", "WavLMAttention")  # hand the weights of their projections to a function
_BESIDE_VALUES = ("weight_indices", "weight_scale")  # in a packed layer
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: role for role, names in table.items() for name in names.split()}


_ANYWHERE = _by_name(_ROLES)
_INSIDE = _by_name(_ROLES_IN_ATTENTION)
_OUTSIDE = _by_name(_ROLES_OUTSIDE_ATTENTION)


class Target(NamedTuple):
    """A matrix that is to become 2:4.

    Attributes:
        name (`str`): path of the module, or of the parameter for fused experts.
        module_name (`str`): path of the module.
        parameter (`str`): name of the parameter in it.
        role (`str`): one of `ROLES`, or `"other"` for a module that the user named and the table does not know.
        dim (`int`): its input dimension, -1 or -2.
    """

    name: str
    module_name: str
    parameter: str
    role: str
    dim: int

    @property
    def is_expert_stack(self) -> bool:
        """Whether this is a 3-D stack of experts rather than the weight of a linear layer."""
        return self.name.endswith(f".{self.parameter}")


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
            matrices.append(Target(name, module_name, key, role or "other", dim))
        else:
            matrices.append(Skipped(name, module_name, key, reason))
    return Selection(tuple(matrices))


def role_of(name: str) -> str | None:
    """Return the role of a module by its path, or None when it is no attention or feed-forward projection.

    ```python
    >>> role_of("bert.encoder.layer.0.attention.output.dense"), role_of("bert.encoder.layer.0.output.dense")
    ('o', 'fc2')
    >>> role_of("bert.pooler.dense") is None
    True

    ```
    """
    inner = _path_inside_layer(name)
    if inner is None or _INSIDE_NORM.search(inner) or _BETWEEN.search(name):
        return None
    if inner.endswith(".linear"):  # a wrapper, called by the name of the projection
        inner = inner.removesuffix(".linear")
    *parents, leaf = inner.split(".")
    if leaf in _ANYWHERE:
        return _ANYWHERE[leaf]
    if any(_ATTENTION.search(parent) for parent in parents):
        return _INSIDE.get(leaf)
    return _OUTSIDE.get(leaf) or _OUTSIDE.get(".".join(inner.split(".")[-2:]))


def is_router(name: str, module: nn.Module) -> bool:
    """Tell from its path and type whether a module chooses between experts."""
    by_name = _ROUTER.search(name.rpartition(".")[2]) or _INSIDE_ROUTER.search(_path_inside_layer(name) or name)
    return bool(by_name) or "Router" in type(module).__name__


def _path_inside_layer(name: str) -> str | None:
    """Return what follows the first number of a path, or None outside the numbered layers."""
    match = re.search(r"(?:^|\.)\d+\.(.+)$", name)
    return match.group(1) if match else None


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
    if (parent := type(model.get_submodule(name.rpartition(".")[0])).__name__) in _READS_WEIGHTS:
        return f"read directly by {parent}"
    if not isinstance(module, nn.Linear | Conv1D) and not _is_expert_stack(module, name, weight):
        return "not a linear projection"
    if isinstance(module, nn.Linear) and not _computes_as_linear(module):
        return "a linear layer with a forward of its own"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"already quantized ({dtype_name(weight.dtype)})"
    if _path_inside_layer(name) is None and _is_head(model, name, module):
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
    if _path_inside_layer(name) is None:
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
        raise ValueError(f"target_modules {item!r} matches no projection of this model. {_nearest(item, prunable)}")
    for item in modules_to_not_convert or ():
        if not any(_contains_parts(name, item) for name in reasons):
            raise ValueError(
                f"modules_to_not_convert {item!r} matches no module of this model. {_nearest(item, list(reasons))}"
            )


def _nearest(wanted: str, names: list[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(wanted.rpartition(".")[2], leaves, n=5, cutoff=0.5) or leaves[:12]
    return f"Near matches: {', '.join(near)}."
