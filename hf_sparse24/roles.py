"""The role of a projection by its path: q, k, v, o, gate, up, down ...

Names change between architectures and versions; their last parts, inside or outside attention, mean the same thing.
"""

import re

from torch import nn

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
    "qkv": "in_proj in_proj_weight att_proj queries_keys_values",
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
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: role for role, names in table.items() for name in names.split()}


_ANYWHERE = _by_name(_ROLES)
_INSIDE = _by_name(_ROLES_IN_ATTENTION)
_OUTSIDE = _by_name(_ROLES_OUTSIDE_ATTENTION)


def role_of(name: str) -> str | None:
    """Return the role of a module by its path, or None when it is no attention or feed-forward projection.

    ```python
    >>> role_of("bert.encoder.layer.0.attention.output.dense"), role_of("bert.encoder.layer.0.output.dense")
    ('o', 'fc2')
    >>> role_of("bert.pooler.dense") is None
    True

    ```
    """
    inner = path_inside_layer(name)
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
    inner = path_inside_layer(name) or name
    by_name = _ROUTER.search(name.rpartition(".")[2]) or _INSIDE_ROUTER.search(inner)
    return bool(by_name) or "Router" in type(module).__name__


def path_inside_layer(name: str) -> str | None:
    """Return what follows the first number of a path, or None outside the numbered layers."""
    match = re.search(r"(?:^|\.)\d+\.(.+)$", name)
    return match.group(1) if match else None
