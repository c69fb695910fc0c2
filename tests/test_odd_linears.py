"""Linears that are not plain ones: attention of torch, which reads weights itself, and wrappers around a linear."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import T5ForConditionalGeneration

from hf_sparse24 import Sparse24Config, Sparse24Linear, pack_, prune_, sparsity_report, unpack_
from hf_sparse24.criteria.saliency import SALIENCY
from hf_sparse24.pattern import mask_2to4, prune_2to4
from hf_sparse24.selection import select
from tests import families, tiny
from tests.test_from_pretrained import assert_same_model, digests

# Types whose attention is torch's, in numbered layers, and where it is. Elsewhere it stands in poolers alone.
READ = {
    "bridgetower": "vision_model.visual.transformer.resblocks.",
    "mask2former": "transformer_module.decoder.layers.",
}


def first_output(model, family):
    with torch.no_grad():
        return next(value for value in model(**families.inputs(family)).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("family", READ)
def test_attention_of_torch_is_pruned_and_stays_dense(family, tmp_path, magnitude):
    dense = families.build(family)
    read = [target for target in select(dense).targets if target.read_by]
    assert {target.role for target in read} == {"qkv", "o"}
    assert all(target.name.startswith(READ[family]) for target in read)
    by_hand = copy.deepcopy(dense)
    for target in select(by_hand).targets:
        parameter = getattr(by_hand.get_submodule(target.module_name), target.parameter)
        parameter.data = prune_2to4(parameter.data)
    expected = first_output(by_hand, family)

    dense.save_pretrained(tmp_path / "dense")
    packed = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude())
    assert torch.equal(first_output(packed, family), expected)
    assert not torch.equal(first_output(dense, family), expected)
    rows = {row.name: row for row in sparsity_report(packed).rows}
    for target in read:
        row = rows[target.name]
        assert (row.state, row.violating_groups) == ("pruned", 0)
        assert row.reason == "read directly by MultiheadAttention"
        owner = packed.get_submodule(target.module_name)
        assert isinstance(owner, nn.MultiheadAttention | nn.modules.linear.NonDynamicallyQuantizableLinear)
    assert any(isinstance(module, Sparse24Linear) for module in packed.modules())
    packed.save_pretrained(tmp_path / "packed")
    again = type(dense).from_pretrained(tmp_path / "packed")
    assert_same_model(packed, again)
    again.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")
    unpack_(again)
    assert torch.equal(first_output(again, family), expected)


def test_in_proj_weight_alone_is_nothing_to_pack(magnitude):
    model = families.build("bridgetower")
    prune_(model, magnitude(target_modules=["attn.in_proj_weight"]))
    weight = model.vision_model.visual.transformer.resblocks[0].attn.in_proj_weight
    assert torch.equal(weight, prune_2to4(weight))
    with pytest.raises(ValueError, match="Nothing to pack in BridgeTowerModel"):
        pack_(model)


def attention_inputs(model, batches):
    """Return what one attention of BridgeTower and its last projection read, computed without torch's attention."""
    block, caught = model.vision_model.visual.transformer.resblocks[0], []
    handle = block.ln_1.register_forward_hook(lambda module, args, output: caught.append(output.detach()))
    for batch in batches:
        model(**batch)
    handle.remove()
    read = torch.cat([states.reshape(-1, 64) for states in caught])
    return read, caught


def test_calibration_sees_what_attention_of_torch_reads():
    model = families.build("bridgetower")
    batches = [families.inputs("bridgetower") | {"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(2)]
    attention = model.vision_model.visual.transformer.resblocks[0].attn
    weight, out = attention.in_proj_weight.detach().clone(), attention.out_proj.weight.detach().clone()
    read, states = attention_inputs(model, batches)
    prune_(model, Sparse24Config(method="wanda", refit=False), batches)
    kept = mask_2to4(SALIENCY["magnitude"](weight) * read.norm(dim=0))
    assert torch.equal(attention.in_proj_weight != 0, kept)
    attended = []
    for hidden in states:  # (tokens, batch, 64), one head; with the pruned weights of q, k and v
        q, k, v = F.linear(hidden, weight * kept, attention.in_proj_bias).transpose(0, 1).chunk(3, -1)
        attended.append(F.scaled_dot_product_attention(q, k, v).reshape(-1, 64))
    kept = mask_2to4(out.abs() * torch.cat(attended).norm(dim=0))
    # Two sums in another order: a near tie may fall otherwise. Of inputs that are wrong, a third of the mask.
    assert ((attention.out_proj.weight != 0) == kept).float().mean() > 0.999


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_whole_recipe_on_attention_that_reads_its_weights(quantization):
    model = tiny.build("wavlm")
    batches = [{"input_values": torch.randn(2, 3000)} for _ in range(3)]
    config = Sparse24Config(method="alps", quantization=quantization)
    assert prune_(model, config, batches).totals["violating_groups"] == 0
    states = {row.name: (row.state, row.reason) for row in sparsity_report(model).rows}
    assert states["wavlm.encoder.layers.0.attention.q_proj"] == ("pruned", "read directly by WavLMAttention")
    with torch.no_grad():
        expected = model(**tiny.inputs(model)).logits
        pack_(model)
        assert torch.equal(model(**tiny.inputs(model)).logits, expected)


def test_calibrated_cross_attention_of_torch_is_refused():
    model = families.build("mask2former")
    with pytest.raises(ValueError, match=r"reads two inputs .* modules_to_not_convert=\['cross_attn'\]"):
        prune_(model, Sparse24Config(method="wanda"), [families.inputs("mask2former")])


@pytest.mark.skipif(not hasattr(transformers, "Gemma4AudioModel"), reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_wrappers_that_clip_keep_their_bounds(quantization, tmp_path, magnitude):
    dense = tiny.build("gemma4_audio")
    for name, buffer in dense.named_buffers():
        if name.endswith(("input_min", "output_min", "input_max", "output_max")):
            buffer.fill_(-0.3 if name.endswith("min") else 0.2)  # so narrow that they clip
    dense.save_pretrained(tmp_path / "dense")
    masked = copy.deepcopy(dense)
    prune_(masked, magnitude())
    packed = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization=quantization))
    packed.save_pretrained(tmp_path / "packed")
    read = type(dense).from_pretrained(tmp_path / "packed")
    wrapper = read.layers[0].self_attn.q_proj
    assert isinstance(wrapper.linear, Sparse24Linear)
    assert (wrapper.input_min, wrapper.output_max) == (-0.3, 0.2)
    assert any(".q_proj.linear.weight_indices" in key for key in load_file(tmp_path / "packed" / "model.safetensors"))
    with torch.no_grad():
        found, expected = (model(**tiny.inputs(dense)).last_hidden_state for model in (read, masked))
    # 8 bits: relative error of a packed layer's product is .01 with INT8 and .04 with FP8, here over two layers.
    tolerance = {None: 0, "int8": 0.05, "fp8": 0.15}[quantization]
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_t5_keeps_wo_in_float32_and_casts_to_its_dtype(quantization, tmp_path, magnitude):
    families.build("t5").save_pretrained(tmp_path / "dense")
    how = {"dtype": torch.float16}
    masked = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "dense", **how, quantization_config=magnitude(pack=False)
    )
    packed = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "dense", **how, quantization_config=magnitude(quantization=quantization)
    )
    packed.save_pretrained(tmp_path / "packed")
    read = T5ForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert_same_model(packed, read)
    feed_forward = read.encoder.block[0].layer[1].DenseReluDense
    if quantization is None:
        assert (feed_forward.wi.weight.dtype, feed_forward.wo.weight.dtype) == (torch.float16, torch.float32)
    with torch.no_grad():
        expected, found = (model(**families.inputs("t5")).logits.float() for model in (masked, read))
    assert (found - expected).norm() <= (0 if quantization is None else 0.05) * expected.norm()
