"""Groups of projections and the statistics of what they read, against plain hooks and an independent routing."""

import copy

import pytest
import torch

from hf_sparse24.calibration.blocks import block_names, block_of, find_chains, record
from hf_sparse24.calibration.inputs import Group, expert_statistics, find_groups, group_statistics
from hf_sparse24.selection import select
from tests.families import build, inputs

# Sums of products in float32, once in batches and once in one piece.
SUMS = {"rtol": 1e-4, "atol": 1e-5}

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
DECODER = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
LLAMA = [*DECODER, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
FC = [["fc1"], ["fc2"]]
GROUPS = {
    "llama": {"model.layers.1": LLAMA},
    "phi3": {
        "model.layers.0": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]
    },
    "gpt2": {"transformer.h.0": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]},
    "falcon": {
        "transformer.h.0": [
            ["self_attention.query_key_value", "mlp.dense_h_to_4h"],  # parallel: attention and MLP read one tensor
            ["self_attention.dense"],
            ["mlp.dense_4h_to_h"],
        ]
    },
    "bert": {
        "bert.encoder.layer.1": [
            ["attention.self.query", "attention.self.key", "attention.self.value"],
            ["attention.output.dense"],
            ["intermediate.dense"],
            ["output.dense"],
        ]
    },
    "whisper": {
        "model.encoder.layers.0": [DECODER[0], ["self_attn.out_proj"], *FC],
        "model.decoder.layers.0": [
            DECODER[0],
            ["self_attn.out_proj"],
            ["encoder_attn.q_proj"],
            ["encoder_attn.k_proj", "encoder_attn.v_proj"],  # these read the encoder
            ["encoder_attn.out_proj"],
            *FC,
        ],
    },
    "mixtral": {"model.layers.0": [*DECODER, ["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]]},
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def one_by_one(model):
    """Let a mixture run its experts one after another, as the walk does."""
    if model.config.model_type in [*MIXTURES, "qwen2_moe"]:
        model.set_experts_implementation("eager")
    return model


def targets_of(model, name):
    return [target for target in select(model).targets if target.name.startswith(f"{name}.")]


def stream_before(model, batches, name):
    """Return a stream that has come as far as a block."""
    names = block_names(model, [target.name for target in select(model).targets])
    chains = find_chains(model, batches[0], names)
    for chain, stream in zip(chains, record(model, batches, chains), strict=True):
        for passed in chain:
            if passed == name:
                return stream
            stream.hidden = stream.outputs(model.get_submodule(passed), passed)
    raise AssertionError(name)


def read_by(model, batches, name):
    """Return all rows that a module reads when the whole model runs, with a plain hook."""
    rows = []

    def catch(module, args, kwargs):
        inputs = args[0] if args else kwargs["hidden_states"]
        rows.append(inputs.flatten(0, -2))

    handle = model.get_submodule(name).register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat(rows).double()


def some_batches(number=3):
    return [{"input_ids": torch.randint(3, 96, (2, 11))} for _ in range(number)]


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in GROUPS for name in GROUPS[family]])
def test_groups_are_the_projections_that_read_one_tensor_in_the_order_of_the_block(family, name):
    model = one_by_one(build(family))
    stream = stream_before(model, [inputs(family)], name)
    groups = find_groups(model.get_submodule(name), name, targets_of(model, name), stream)
    assert [[target.name[len(name) + 1 :] for target in group.targets] for group in groups] == GROUPS[family][name]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bert", "bart"])
def test_statistics_are_the_second_moments_that_plain_hooks_see(family):
    batches = some_batches() if family != "bart" else [inputs("bart")]
    model = build(family)
    name = {"llama": "model.layers.1", "bart": "model.decoder.layers.1", "bert": "bert.encoder.layer.1"}.get(
        family, "transformer.h.1"
    )
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    for group in find_groups(block, name, targets_of(model, name), stream):
        statistics = group_statistics(block, name, group, stream, None)
        for target in group.targets:
            rows = read_by(model, batches, target.module_name)
            assert statistics.tokens == len(rows)
            torch.testing.assert_close(statistics.hessian.double(), rows.T @ rows, **SUMS)
        assert statistics.cross is None


def test_a_projection_that_is_called_twice_has_the_statistics_of_both_inputs():
    relative = {
        "share_att_key": True,
        "position_buckets": 8,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
    }
    model, batches, name = build("deberta-v2", **relative), some_batches(), "deberta.encoder.layer.1"
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    groups = find_groups(block, name, targets_of(model, name), stream)
    leaves = [[target.name.rpartition(".")[2] for target in group.targets] for group in groups]
    assert leaves[:2] == [["query_proj", "key_proj"], ["value_proj"]]
    assert [group.calls for group in groups[:3]] == [2, 1, 1]
    rows = read_by(model, batches, f"{name}.attention.self.key_proj")
    statistics = group_statistics(block, name, groups[0], stream, (block, stream))
    assert statistics.tokens == len(rows) > 3 * 22
    torch.testing.assert_close(statistics.hessian.double(), rows.T @ rows, **SUMS)
    torch.testing.assert_close(statistics.cross.double(), rows.T @ rows, **SUMS)


def test_cross_statistics_pair_the_dense_inputs_with_the_pruned_ones():
    dense, batches, name = build("llama"), some_batches(), "model.layers.1"
    pruned = copy.deepcopy(dense)
    pruned.model.layers[0].mlp.down_proj.weight.data[:, ::2] = 0
    streams = [stream_before(model, batches, name) for model in (pruned, dense)]
    group = Group(targets_of(dense, name)[:3], False)
    statistics = group_statistics(
        pruned.get_submodule(name), name, group, streams[0], (dense.get_submodule(name), streams[1])
    )
    ours, theirs = (read_by(model, batches, group.targets[0].module_name) for model in (pruned, dense))
    torch.testing.assert_close(statistics.cross.double(), theirs.T @ ours, **SUMS)
    torch.testing.assert_close(statistics.hessian.double(), ours.T @ ours, **SUMS)


def test_a_group_sees_what_earlier_groups_have_changed():
    model, batches, name = build("llama"), some_batches(), "model.layers.0"
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    groups = find_groups(block, name, targets_of(model, name), stream)
    before = [group_statistics(block, name, group, stream, None).hessian for group in groups]
    block.self_attn.o_proj.weight.data.mul_(5)
    after = [group_statistics(block, name, group, stream, None).hessian for group in groups]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False, False]
    rows = read_by(model, batches, "model.layers.0.mlp.down_proj")
    torch.testing.assert_close(after[3].double(), rows.T @ rows, **SUMS)


def test_padding_is_left_out_of_statistics():
    model, name = build("bert"), "bert.encoder.layer.1"
    batch = inputs("bert") | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    batch["attention_mask"][0, 4:] = 0
    group = Group(targets_of(model, name)[:3], False)
    stream = stream_before(model, [batch], name)
    statistics = group_statistics(model.get_submodule(name), name, group, stream, None)
    rows = read_by(model, [batch], group.targets[0].module_name)[batch["attention_mask"].flatten().bool()]
    assert statistics.tokens == len(rows) == 11
    torch.testing.assert_close(statistics.hessian.double(), rows.T @ rows, **SUMS)


def tokens_of(model, batch, module):
    """Return how many tokens the statistics of a module count."""
    (target,) = [target for target in select(model).targets if target.module_name == module]
    name = block_of(module)
    return group_statistics(
        model.get_submodule(name), name, Group([target], False), stream_before(model, [batch], name), None
    ).tokens


def padded(length, *real):
    return (torch.arange(length) < torch.tensor(real).unsqueeze(1)).long()


BART_BLOCK = "model.decoder.layers.0"
SIZES_OF_LABELS = [(7, (2, 5)), (5, (2, 4))]  # as long as the source, and not


def test_a_decoder_reads_the_encoder_with_the_encoders_padding():
    batch = inputs("bart") | {"decoder_input_ids": torch.randint(3, 96, (2, 7))}
    batch |= {"attention_mask": padded(7, 3, 7), "decoder_attention_mask": padded(7, 5, 4)}
    model = build("bart")
    assert tokens_of(model, batch, f"{BART_BLOCK}.encoder_attn.k_proj") == 10
    assert tokens_of(model, batch, f"{BART_BLOCK}.encoder_attn.q_proj") == 9
    assert tokens_of(model, batch, "model.encoder.layers.0.fc1") == 10
    del batch["attention_mask"]  # without one all count, and not those of the decoder's
    assert tokens_of(model, batch, f"{BART_BLOCK}.encoder_attn.k_proj") == 14


@pytest.mark.parametrize(("length", "real"), SIZES_OF_LABELS)
def test_the_padding_of_a_decoder_is_that_of_its_labels(length, real):
    labels = torch.where(padded(length, *real).bool(), torch.randint(3, 96, (2, length)), -100)
    batch = {"input_ids": inputs("bart")["input_ids"], "attention_mask": padded(7, 3, 7), "labels": labels}
    model = build("bart")
    # The decoder reads its start token and then the labels.
    assert tokens_of(model, batch, f"{BART_BLOCK}.self_attn.q_proj") == 2 + sum(real)
    assert tokens_of(model, batch, f"{BART_BLOCK}.encoder_attn.k_proj") == 10


def test_an_image_has_no_part_in_the_padding_of_a_text_of_as_many_tokens():
    batch = inputs("clip") | {"input_ids": torch.randint(3, 96, (2, 17)), "attention_mask": padded(17, 4, 9)}
    model = build("clip")
    assert tokens_of(model, batch, "vision_model.encoder.layers.0.mlp.fc1") == 2 * 17
    assert tokens_of(model, batch, "text_model.encoder.layers.0.mlp.fc1") == 13


def test_a_projection_that_no_token_reaches_is_named():
    model, name = build("bart"), "model.decoder.layers.0"
    stream = stream_before(model, [inputs("bart")], name)
    block = model.get_submodule(name)
    block.encoder_attn.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(
        ValueError, match=r"No calibration token reached model\.decoder\.layers\.0\.encoder_attn\.k_proj"
    ):
        find_groups(block, name, targets_of(model, name), stream)


def test_no_hook_stays_in_a_block():
    model, name = one_by_one(build("mixtral")), "model.layers.0"
    stream, block = stream_before(model, some_batches(), name), model.get_submodule(name)
    groups = find_groups(block, name, targets_of(model, name), stream)
    group_statistics(block, name, groups[0], stream, None)
    expert_statistics(block, name, groups[-1], stream)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def routed(model, batches, layer):
    """Return for each expert of a layer the tokens that it reads and what its second matrix reads, in float64."""
    mlp = model.model.layers[layer].mlp
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    tokens = read_by(model, batches, f"model.layers.{layer}.mlp")
    logits = tokens @ router.weight.double().T + (router.bias.double() if hasattr(router, "bias") else 0)
    chosen = logits.topk(2, dim=-1).indices
    first, second = [], []
    for expert in range(4):
        rows = tokens[(chosen == expert).any(-1)]
        matrix = mlp.experts.gate_up_proj[expert].double()
        if hasattr(mlp, "router"):  # GPT-OSS: transposed, interleaved, clamped
            both = rows @ matrix + mlp.experts.gate_up_proj_bias[expert].double()
            gate, up = both[:, ::2].clamp(max=mlp.experts.limit), both[:, 1::2].clamp(-7, 7)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            gate, up = (rows @ matrix.T).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
        first.append(rows)
        second.append(inner)
    return first, second


def eager(family):
    model = one_by_one(build(family))
    for parameter in model.parameters():  # far from ties, and an input that is not almost zero
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_expert_statistics_are_those_of_the_tokens_that_the_router_sends(family):
    model, batches, name = eager(family), some_batches(12), "model.layers.0"
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    stacks = [target for target in targets_of(model, name) if target.is_expert_stack]
    assert [target.parameter for target in stacks] == ["gate_up_proj", "down_proj"]
    for target, expected in zip(stacks, routed(model, batches, 0), strict=True):
        found = expert_statistics(block, name, Group([target], True), stream)
        for rows, statistics in zip(expected, found, strict=True):
            assert len(rows) >= rows.shape[1]
            assert statistics.tokens == len(rows)
            torch.testing.assert_close(statistics.hessian.double(), rows.T @ rows, rtol=1e-3, atol=1e-4)


def test_an_expert_with_fewer_tokens_than_inputs_is_completed_with_the_average_token():
    model, batches, name = eager("mixtral"), some_batches(1), "model.layers.0"
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    target = next(target for target in targets_of(model, name) if target.is_expert_stack)
    expected, _ = routed(model, batches, 0)
    found = expert_statistics(block, name, Group([target], True), stream)
    everything = torch.cat(expected)
    average = everything.T @ everything / len(everything)
    assert min(map(len, expected)) < 32
    for rows, statistics in zip(expected, found, strict=True):
        lacking = max(0, 32 - len(rows))
        assert statistics.tokens == max(32, len(rows))
        torch.testing.assert_close(
            statistics.hessian.double(), rows.T @ rows + lacking * average, rtol=1e-3, atol=1e-4
        )


def test_an_expert_that_no_token_reaches_is_pruned_for_the_average_token():
    model, batches, name = eager("gpt_oss"), some_batches(2), "model.layers.0"
    model.model.layers[0].mlp.router.bias.data[2] = -1e6
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    target = next(target for target in targets_of(model, name) if target.is_expert_stack)
    expected, _ = routed(model, batches, 0)
    assert len(expected[2]) == 0
    everything = torch.cat(expected)
    found = expert_statistics(block, name, Group([target], True), stream)[2]
    torch.testing.assert_close(
        found.hessian.double(), everything.T @ everything * 32 / len(everything), rtol=1e-3, atol=1e-4
    )


def test_experts_that_are_modules_are_one_mixture_and_completed_alike():
    model, name = build("switch"), "encoder.block.1"
    batches = [{key: torch.randint(3, 96, (1, 3)) for key in ("input_ids", "decoder_input_ids")}]
    stream, block = stream_before(model, batches, name), model.get_submodule(name)
    groups = find_groups(block, name, targets_of(model, name), stream)
    experts = [group for group in groups if group.is_mixture]
    leaves = [
        [target.name.removeprefix(f"{name}.layer.1.mlp.experts.") for target in group.targets] for group in experts
    ]
    assert leaves == [[f"expert_{number}.{leaf}" for number in range(4)] for leaf in ("wi", "wo")]
    read = [torch.empty(0, 32).double()] * 4
    for number, target in enumerate(experts[0].targets):
        model.get_submodule(target.name).register_forward_pre_hook(
            lambda _, args, number=number: read.__setitem__(number, args[0].double())
        )
    model(**batches[0])
    assert min(map(len, read)) == 0  # three tokens, four experts
    average = sum(rows.T @ rows for rows in read) / 3
    for rows, statistics in zip(read, expert_statistics(block, name, experts[0], stream), strict=True):
        assert statistics.tokens == 32
        expected = rows.T @ rows + (32 - len(rows)) * average
        torch.testing.assert_close(statistics.hessian.double(), expected, **SUMS)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "llama4", "switch"])
def test_what_stands_under_a_mask_has_no_part_in_the_statistics_of_a_mixture(family):
    """To the right of the text, where a model with a mask never reads it: other padding changes nothing."""
    found = []
    for filler in (3, 90):
        model = eager(family) if family != "llama4" else build(family)
        mask = padded(12, 5, 9, 12)
        tokens = torch.where(mask.bool(), torch.arange(36).view(3, 12) * 7 % 90 + 3, filler)
        batch = {"input_ids": tokens, "attention_mask": mask}
        if family == "switch":
            batch |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
        targets = select(model).targets
        name = block_of(next(target.name for target in targets if "experts" in target.name))
        stream, block = stream_before(model, [batch], name), model.get_submodule(name)
        found.append([])
        for group in find_groups(block, name, targets_of(model, name), stream):
            if group.is_mixture:
                found[-1] += expert_statistics(block, name, group, stream)
            else:
                found[-1].append(group_statistics(block, name, group, stream, None))
                assert found[-1][-1].tokens == 26
    assert len(found[0]) > 8
    for left, right in zip(*found, strict=True):
        assert left.tokens == right.tokens
        torch.testing.assert_close(left.hessian, right.hessian, **SUMS)
