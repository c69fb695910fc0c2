"""Selection by name on tiny models of every family that the package names, built from their configs."""

import re

import pytest
import torch
from torch import nn

from hf_sparse24.roles import role_of
from hf_sparse24.selection import select
from tests.families import FAMILIES, build

LLAMA = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"}
GATED = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
BERT = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
}
BART_ATTENTION = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "o",
    "fc1": "fc1",
    "fc2": "fc2",
}
VIT = {
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attention.o_proj": "o",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
BLOOM = {
    "self_attention.query_key_value": "qkv",
    "self_attention.dense": "o",
    "mlp.dense_h_to_4h": "fc1",
    "mlp.dense_4h_to_h": "fc2",
}
EXPERTS = {"mlp.experts.gate_up_proj": "gate_up", "mlp.experts.down_proj": "down"}
T5 = {f"{kind}Attention.{role}": role for kind in ("Self", "EncDec") for role in "qkvo"}

# family -> (the path inside a layer -> role), number of targets, and what must be left out with which reason
EXPECTED = {
    "llama": (LLAMA | GATED, 14, {"model.embed_tokens": "embedding", "lm_head": "head"}),
    "mistral": (LLAMA | GATED, 14, {"lm_head": "head"}),
    "qwen2": (LLAMA | GATED, 14, {"lm_head": "head"}),
    "qwen3": (LLAMA | GATED, 14, {"lm_head": "head"}),
    "gemma2": (LLAMA | GATED, 14, {"model.embed_tokens": "embedding"}),
    "gemma3_text": (LLAMA | GATED, 14, {"model.embed_tokens": "embedding"}),
    "phi3": (
        {"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
        8,
        {"lm_head": "head"},
    ),
    "gpt2": (
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"},
        8,
        {"transformer.wte": "embedding", "transformer.wpe": "embedding"},
    ),
    "opt": (BART_ATTENTION, 12, {"model.decoder.embed_tokens": "embedding"}),
    "bloom": (BLOOM, 8, {"transformer.word_embeddings": "embedding"}),
    "falcon": (BLOOM, 8, {"transformer.word_embeddings": "embedding"}),
    "bert": (BERT, 12, {"bert.pooler.dense": "pooler", "classifier": "head"}),
    "bert_mlm": (BERT, 12, {"cls.predictions.transform.dense": "head"}),
    "roberta": (BERT, 12, {"classifier.dense": "head", "classifier.out_proj": "head"}),
    "distilbert": (
        {
            "attention.q_lin": "q",
            "attention.k_lin": "k",
            "attention.v_lin": "v",
            "attention.out_lin": "o",
            "ffn.lin1": "fc1",
            "ffn.lin2": "fc2",
        },
        12,
        {"pre_classifier": "head", "classifier": "head"},
    ),
    "deberta-v2": (
        {re.sub(r"(query|key|value)$", r"\1_proj", name): role for name, role in BERT.items()},
        12,
        {"pooler.dense": "head", "classifier": "head", "deberta.encoder.rel_embeddings": "embedding"},
    ),
    "t5": (
        T5 | {"DenseReluDense.wi": "fc1", "DenseReluDense.wo": "down"},
        32,
        {
            "shared": "embedding",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "embedding",
        },
    ),
    "bart": (
        BART_ATTENTION | {name.replace("self", "encoder"): role for name, role in BART_ATTENTION.items()},
        32,
        {"model.shared": "embedding"},
    ),
    "whisper": (
        BART_ATTENTION | {name.replace("self", "encoder"): role for name, role in BART_ATTENTION.items()},
        32,
        {"model.encoder.conv1": "convolution", "model.decoder.embed_tokens": "embedding"},
    ),
    "vit": (VIT, 12, {"classifier": "head", "vit.embeddings.patch_embeddings.projection": "convolution"}),
    "clip": (
        {f"mlp.{name}" if name.startswith("fc") else name: role for name, role in BART_ATTENTION.items()},
        24,
        {"visual_projection": "outside the numbered layers", "text_projection": "outside the numbered layers"},
    ),
    "dinov2": (VIT, 12, {"embeddings.patch_embeddings.projection": "convolution"}),
    "mixtral": (LLAMA | EXPERTS, 12, {"model.layers.0.mlp.gate": "router", "lm_head": "head"}),
    "qwen3_moe": (LLAMA | EXPERTS, 12, {"model.layers.1.mlp.gate": "router", "lm_head": "head"}),
}


def inside_layer(name):
    return re.split(r"\.\d+\.", name)[-1]


@pytest.mark.parametrize("family", EXPECTED)
def test_exactly_the_projections_of_a_family(family):
    roles, count, left_out = EXPECTED[family]
    selection = select(build(family))
    found = {inside_layer(target.name): target.role for target in selection.targets}
    if family == "dinov2":  # transformers renamed its modules after 5.17; roles are what must stay
        assert sorted(found.values()) == sorted(roles.values())
    else:
        assert found == roles
    assert len(selection.targets) == count
    reasons = {matrix.name: matrix.reason for matrix in selection.skipped}
    assert left_out.items() <= reasons.items()
    kinds = {"embedding", "head", "pooler", "router", "convolution"}
    other = {name for name, reason in reasons.items() if reason not in kinds}
    # What is left for another reason is no attention or feed-forward projection.
    assert not any(re.search(r"(q|k|v|o|up|down|gate)_proj$|fc\d$", name) for name in other)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_an_embedding_head_pooler_or_router(family):
    model = build(family)
    for target in select(model).targets:
        assert re.search(r"\.\d+\.", target.name)
        assert not re.search(r"embed|head|classifier|pooler|router|\.gate$", target.name)
        assert not isinstance(model.get_submodule(target.module_name), nn.Embedding)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_selection_works_on_the_meta_device(family):
    with torch.device("meta"):
        on_meta = select(build(family))
    assert on_meta == select(build(family))


@pytest.mark.parametrize(("family", "dim"), [("gpt2", -2), ("gpt_oss", -2), ("mixtral", -1), ("llama", -1)])
def test_the_input_dimension_follows_the_storage(family, dim):
    targets = select(build(family)).targets
    stacked = [target for target in targets if target.is_expert_stack]
    assert {target.dim for target in stacked or targets} == {dim}


def test_target_modules_as_names():
    names = [target.name for target in select(build("llama"), ["q_proj", "mlp.down_proj"]).targets]
    assert names == [
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]


def test_names_match_whole_parts_only():
    with pytest.raises(ValueError, match="'proj' matches no projection"):
        select(build("llama"), ["proj"])


def test_target_modules_as_a_regular_expression_for_the_whole_path():
    names = [target.name for target in select(build("llama"), r".*\.1\.mlp\.(up|gate)_proj").targets]
    assert names == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


def test_target_modules_reach_projections_outside_the_table():
    targets = select(build("clip"), ["visual_projection"]).targets
    assert [(target.name, target.role) for target in targets] == [("visual_projection", "other")]


@pytest.mark.parametrize(
    ("names", "count"), [(["down_proj"], 12), (["layers.0"], 7), (["model.layers.1.mlp", "k_proj"], 9), (["mlp"], 8)]
)
def test_modules_to_not_convert_are_kept_with_the_reason(names, count):
    selection = select(build("llama"), modules_to_not_convert=names)
    assert len(selection.targets) == count
    kept = [matrix for matrix in selection.skipped if matrix.reason == "modules_to_not_convert"]
    assert len(kept) == 14 - count


def test_a_name_that_matches_nothing_lists_near_matches():
    with pytest.raises(ValueError, match=r"'up_porj' matches no projection .* Near matches: up_proj"):
        select(build("llama"), ["up_porj"])
    with pytest.raises(ValueError, match=r"'donw_proj' matches no module .* Near matches: down_proj"):
        select(build("llama"), modules_to_not_convert=["donw_proj"])
    with pytest.raises(ValueError, match="matches no projection"):
        select(build("llama"), r"model\.layers\.9\..*")


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("layer.0", "layers.0, layers.1."),
        ("model.layer.1", "model.layers.1, model.layers.0."),
        ("self_atn", "self_attn."),
    ],
)
def test_near_matches_have_as_many_parts_as_were_written(wanted, near):
    with pytest.raises(ValueError, match=rf"'{wanted}' matches no module .* Near matches: {near}"):
        select(build("llama"), modules_to_not_convert=[wanted])


def test_near_matches_of_targets_are_what_paths_end_with():
    with pytest.raises(ValueError, match=r"Near matches: self_attn\.q_proj, self_attn\."):
        select(build("llama"), ["self_atn.q_proj"])
    with pytest.raises(ValueError, match=r"Near matches: layers\.0\.mlp\.up_proj, "):
        select(build("llama"), ["layers.0.up_proj"])
    with pytest.raises(ValueError, match=r"'mlp' matches no projection .* Near matches: down_proj"):
        select(build("llama"), ["mlp"])


def test_a_target_that_must_stay_dense_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"stay dense: lm_head \(head\)"):
        select(build("llama"), ["lm_head"])


def test_a_checkpoint_that_is_read_back_does_not_check_names():
    assert len(select(build("llama"), modules_to_not_convert=["renamed"], strict=False).targets) == 14


def test_roles_restrict():
    assert {t.role for t in select(build("llama"), roles=["q", "down"]).targets} == {"q", "down"}


def test_a_width_that_is_no_multiple_of_four_is_left_with_the_reason():
    reasons = {matrix.name: matrix.reason for matrix in select(build("llama", intermediate_size=62)).skipped}
    assert reasons["model.layers.0.mlp.down_proj"] == "in_features 62 is not a multiple of 4"
    assert "model.layers.0.mlp.up_proj" not in reasons


def test_multihead_attention_reads_its_projections_itself():
    model = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})])
    targets = {target.name: (target.role, target.read_by, target.packs) for target in select(model).targets}
    assert targets == {
        "0.attn.in_proj_weight": ("qkv", "MultiheadAttention", False),
        "0.attn.out_proj": ("o", "MultiheadAttention", False),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_packed_are_linear_layers_that_are_called(family):
    assert all(target.packs != target.is_expert_stack for target in select(build(family)).targets)


def test_shared_layers_are_named_once():
    names = [target.name for target in select(build("albert")).targets]
    assert len(names) == len(set(names)) == 6


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "kv"),
        ("model.layers.0.block_sparse_moe.experts.3.w2", "down"),
        ("model.layers.3.mamba.in_proj", None),
        ("model.layers.3.mamba.out_proj", None),
        ("deberta.encoder.layer.0.attention.self.in_proj", "qkv"),
        ("model.layers.0.feed_forward.wo", "down"),
        ("model.layers.0.attn.Wo", "o"),
        ("lm_heads.0", None),
        ("classifier", None),
    ],
)
def test_roles_of_ambiguous_names(name, role):
    assert role_of(name) == role


@pytest.mark.parametrize(
    ("name", "role"),
    {
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv": "qkv",  # DBRX
        "transformer.blocks.0.norm_attn_norm.attn.out_proj": "o",
        "model.layers.0.ada_rms_norm.linear1": None,
        "model.layers.0.input_layernorm.mlp.up_proj": None,
        "model.visual.deepstack_merger_list.0.linear_fc1": None,
        "model.visual.blocks.0.mlp.linear_fc1": "fc1",
        "roberta.encoder.layer.0.output.adapter_modules.en_XX.dense1": None,
        "model.layers.0.self_attn.q_proj.linear": "q",
    }.items(),
)
def test_roles_of_names_from_the_survey(name, role):
    assert role_of(name) == role
