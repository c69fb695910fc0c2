"""Chains and streams: the blocks of any family, run one by one, write what the model itself writes."""

import pytest
import torch
from transformers import DynamicCache

from hf_sparse24.calibration.blocks import block_names, block_of, borrowed, find_chains, model_inputs, record
from hf_sparse24.selection import select
from tests.families import FAMILIES, build, inputs

TWO_CHAINS = {"t5", "bart", "whisper", "clip"}
WALKED = sorted(set(FAMILIES) - {"albert"})


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def names_of(model):
    return block_names(model, [target.name for target in select(model).targets])


def walk(model, batches, chains):
    """Return the hidden states of the first batch before and after every block, chain by chain."""
    states = []
    for chain, stream in zip(chains, record(model, batches, chains), strict=True):
        states.append([stream.hidden[0]])
        for name in chain:
            stream.hidden = stream.outputs(model.get_submodule(name), name)
            states[-1].append(stream.hidden[0])
    return states


def states_of(output, family):
    """Return what the model itself says of its hidden states, chain by chain."""
    if family == "clip":
        return [output.vision_model_output.hidden_states, output.text_model_output.hidden_states]
    if output.get("encoder_hidden_states") is not None:
        return [output.encoder_hidden_states, output.decoder_hidden_states]
    return [output.hidden_states]


@pytest.mark.parametrize("family", WALKED)
def test_a_chain_is_every_block_of_a_stack_in_order(family):
    model = build(family)
    names = names_of(model)
    chains = find_chains(model, inputs(family), names)
    assert [len(chain) for chain in chains] == [2] * (2 if family in TWO_CHAINS else 1)
    assert sorted(name for chain in chains for name in chain) == sorted(names)
    for chain in chains:
        assert chain == sorted(chain)
        assert len({name.rpartition(".")[0] for name in chain}) == 1


@pytest.mark.parametrize("family", WALKED)
def test_a_stream_reproduces_the_hidden_states_of_the_model(family):
    model, batch = build(family), inputs(family)
    chains = find_chains(model, batch, names_of(model))
    expected = states_of(model(**batch, output_hidden_states=True, return_dict=True), family)
    found = walk(model, [batch], chains)
    for own, theirs in zip(found, expected, strict=True):
        assert len(own) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(own[:-1], theirs[:-1], strict=True))
        # The last hidden state of transformers has passed the final norm, where there is one.
        assert own[-1].shape == theirs[-1].shape


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_last_state_of_a_stream_is_what_the_last_block_wrote(family):
    model, batch = build(family), inputs(family)
    chains = find_chains(model, batch, names_of(model))
    written = []
    model.get_submodule(chains[-1][-1]).register_forward_hook(lambda block, args, output: written.append(output))
    model(**batch)
    last = written[0] if isinstance(written[0], torch.Tensor) else written[0][0]
    assert torch.equal(walk(model, [batch], chains)[-1][-1], last)


def test_a_padded_batch_runs_with_its_mask():
    model, batch = build("llama"), inputs("llama")
    batch["attention_mask"] = torch.ones(2, 7, dtype=torch.int64)
    batch["attention_mask"][1, :3] = 0
    chains = find_chains(model, batch, names_of(model))
    masked = walk(model, [batch], chains)[0]
    expected = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(masked[1], expected[1])
    del batch["attention_mask"]
    assert not torch.equal(masked[1], walk(model, [batch], chains)[0][1])


def test_batches_of_different_shapes_keep_their_own_calls():
    model = build("llama")
    batches = [{"input_ids": torch.randint(3, 96, shape)} for shape in ((2, 7), (1, 4), (3, 9))]
    (chain,) = find_chains(model, batches[0], names_of(model))
    (stream,) = record(model, batches, [chain])
    assert len(stream) == 3
    for name in chain:
        stream.hidden = stream.outputs(model.get_submodule(name), name)
    for batch, hidden in zip(batches, stream.hidden, strict=True):
        expected = model.model(**batch).last_hidden_state
        assert torch.equal(model.model.norm(hidden), expected)


def test_a_copy_of_a_stream_moves_on_its_own():
    model = build("llama")
    (stream,) = record(model, [inputs("llama")], [["model.layers.0", "model.layers.1"]])
    copied, before = stream.copy(), stream.hidden[0]
    copied.hidden = copied.outputs(model.model.layers[0], "model.layers.0")
    assert stream.hidden[0] is before
    copied.hidden[0] = before
    assert copied.hidden is not stream.hidden


def test_kept_tokens_are_those_of_the_mask_of_the_same_shape():
    batch = inputs("bert") | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    batch["attention_mask"][0, 5:] = 0
    chain = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    (stream,) = record(build("bert"), [batch], [chain])
    kept = stream.kept_tokens(0, torch.empty(2, 7, 32))
    assert kept.dtype == torch.bool
    assert kept.tolist() == batch["attention_mask"].bool().tolist()
    assert torch.equal(stream.kept_tokens(0, torch.empty(14, 32)), kept.flatten())
    assert torch.equal(stream.kept_tokens(0, torch.empty(2, 7, 4, 32)), kept.unsqueeze(2).expand(2, 7, 4))
    assert stream.kept_tokens(0, torch.empty(2, 8, 32)) is None
    (unmasked,) = record(build("bert"), [inputs("bert")], [chain])
    assert unmasked.kept_tokens(0, torch.empty(2, 7, 32)) is None


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_has_its_own_padding_even_where_both_texts_are_equally_long(family):
    encoder, decoder = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    encoder[0, 5:], decoder[1, 2:] = 0, 0
    batch = inputs(family) | {"decoder_input_ids": torch.randint(3, 96, (2, 7))}
    batch |= {"attention_mask": encoder, "decoder_attention_mask": decoder}
    model = build(family)
    chains = find_chains(model, batch, names_of(model))
    for stream, mask in zip(record(model, [batch], chains), (encoder, decoder), strict=True):
        assert torch.equal(stream.kept_tokens(0, torch.empty(2, 7, 32)), mask.bool())


def test_shared_layers_are_refused_in_one_sentence():
    model = build("albert")
    with pytest.raises(ValueError, match="called more than once in a forward pass: its weights are shared") as error:
        find_chains(model, inputs("albert"), names_of(model))
    assert "\n" not in str(error.value)
    assert "method='magnitude'" in str(error.value)


class TextTower(torch.nn.Module):
    """CLIP called with text alone, as its text encoder is used."""

    def __init__(self, clip):
        super().__init__()
        self.text_model, self.vision_model = clip.text_model, clip.vision_model

    def forward(self, input_ids):
        return self.text_model(input_ids)


def test_blocks_that_the_inputs_do_not_reach_are_refused():
    model, text = build("clip"), {"input_ids": inputs("clip")["input_ids"]}
    with pytest.raises(ValueError, match=r"do not reach vision_model\.encoder\.layers\.1 \(2 of 4 layers\)"):
        find_chains(TextTower(model), text, sorted(names_of(model), reverse=True))


def test_a_target_outside_the_numbered_layers_is_refused():
    with pytest.raises(ValueError, match="pooler is in none"):
        block_names(build("bert"), ["pooler"])


def test_a_block_is_the_outermost_number_of_a_path():
    assert block_of("model.layers.3.mlp.experts.0.w1") == "model.layers.3"
    assert block_of("3.fc1") == "3"
    assert block_of("lm_head") is None
    assert block_of("model.layers.3") is None  # the block itself, not a part of it


class InPlaceBetween(torch.nn.Module):
    """Adds to the hidden states between two blocks, in the tensor that the first one wrote."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(2)]
        )

    def forward(self, x):
        return self.layers[1](self.layers[0](x).add_(1.0))


def test_a_change_in_place_between_two_blocks_begins_a_new_chain():
    model, batch = InPlaceBetween(), {"x": torch.randn(3, 8)}
    chains = find_chains(model, batch, ["layers.0", "layers.1"])
    assert chains == [["layers.0"], ["layers.1"]]
    assert torch.equal(walk(model, [batch], chains)[1][1], model(**batch))


def test_caches_are_left_out_and_the_cache_setting_stays():
    model, batch = build("llama"), inputs("llama")
    assert model.config.use_cache
    chain = ["model.layers.0", "model.layers.1"]
    (stream,) = record(model, [batch | {"past_key_values": DynamicCache()}], [chain])
    for call in stream._calls[0].values():
        assert not any(isinstance(value, DynamicCache) for value in (*call.args, *call.kwargs.values()))
    first = stream.run(model.model.layers[0], chain[0], 0)
    assert torch.equal(stream.run(model.model.layers[0], chain[0], 0), first)
    assert model_inputs(model, batch)["use_cache"] is False
    assert "use_cache" not in batch
    assert model.config.use_cache
    assert model(**batch).past_key_values is not None


def test_no_hook_stays_behind_not_even_after_an_error():
    model = build("clip")
    with pytest.raises(ValueError, match=r"CLIPModel cannot run the first calibration batch, which has input_ids"):
        find_chains(
            model, {"input_ids": torch.full((1, 3), 96), "pixel_values": torch.randn(1, 3, 32, 32)}, names_of(model)
        )
    find_chains(model, inputs("clip"), names_of(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for name, module in model.named_modules())


def test_inputs_come_in_the_dtype_of_the_model_and_without_labels():
    model = build("vit").bfloat16()
    found = model_inputs(model, inputs("vit") | {"labels": torch.tensor([0, 1])})
    assert found["pixel_values"].dtype == torch.bfloat16
    assert "labels" not in found


def test_labels_of_an_encoder_decoder_become_what_its_decoder_reads():
    model, labels = build("t5"), torch.randint(3, 96, (2, 5))
    model.config.decoder_start_token_id = 0
    found = model_inputs(model, {"input_ids": inputs("t5")["input_ids"], "labels": labels})
    assert torch.equal(
        found["decoder_input_ids"], torch.cat([torch.zeros(2, 1, dtype=torch.int64), labels[:, :-1]], 1)
    )
    assert "labels" not in found


@pytest.mark.gpu
def test_what_is_written_to_a_borrowed_block_is_forgotten():
    block = build("llama").model.layers[0]
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with borrowed(block, torch.device("cuda")):
        assert block.mlp.up_proj.weight.is_cuda
        block.mlp.up_proj.weight.data.zero_()
    assert all(torch.equal(block.state_dict()[key], value) for key, value in before.items())
