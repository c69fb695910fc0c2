"""Layers that share their weights: pruned once, packed once, saved once, and one layer again when they are read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse24 import Sparse24Config, Sparse24Linear, pack_, prune_, roles, sparsity_report, unpack_
from hf_sparse24.calibration import sequential
from hf_sparse24.pattern import prune_2to4
from hf_sparse24.selection import select
from tests.families import build
from tests.test_from_pretrained import QUANTIZATIONS, assert_same_model, digests

# ALBERT calls one module several times; Zamba has modules of their own that share parameters. Layers, and places.
TIED = {"albert": (6, 6), "zamba": (7, 14), "zamba2": (12, 24)}


def packed_layers(model):
    """Return the packed layers, and their places."""
    places = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Sparse24Linear)]
    return {model.get_submodule(name) for name in places}, places


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", TIED)
def test_pruned_packed_and_saved_once(family, quantization, tmp_path, magnitude, tokens):
    dense, (layers, places) = build(family), TIED[family]
    masked = build(family)
    assert prune_(masked, magnitude()).totals["matrices_2to4"] == layers
    dense.save_pretrained(tmp_path / "dense")
    made = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization=quantization))
    made.save_pretrained(tmp_path / "packed")
    saved = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(key.endswith(".weight_indices") for key in saved) == layers
    read = type(dense).from_pretrained(tmp_path / "packed")
    for model in (made, read):
        found, where = packed_layers(model)
        assert (len(found), len(where)) == (layers, places)
        assert sparsity_report(model).totals["matrices_2to4"] == layers
    assert torch.equal(made(tokens).logits, read(tokens).logits)
    if quantization is None:
        assert torch.equal(masked(tokens).logits, read(tokens).logits)
    read.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")
    for model in (made, read):
        unpack_(model)
        model.save_pretrained(tmp_path / "unpacked")
        assert_same_model(type(dense).from_pretrained(tmp_path / "unpacked"), model)
    if quantization is None:
        assert torch.equal(masked(tokens).logits, read(tokens).logits)


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_the_file_says_which_layers_are_packed(family, tmp_path, magnitude, monkeypatch):
    dense = build(family)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude())
    model.save_pretrained(tmp_path / "packed")
    monkeypatch.delitem(roles._ANYWHERE, "down_proj")
    assert_same_model(model, type(dense).from_pretrained(tmp_path / "packed"))


def test_a_file_without_a_tied_layer_is_refused(tmp_path, magnitude):
    dense = build("zamba2")
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude())
    model.save_pretrained(tmp_path / "packed", max_shard_size="5KB")
    layer = next(target.name for target in select(dense).targets)
    index = tmp_path / "packed" / "model.safetensors.index.json"
    text = index.read_text().replace(f"{layer}.weight_indices", f"{layer}.weight_else")
    for file in (tmp_path / "packed").glob("*.safetensors"):
        if f"{layer}.weight_indices" in load_file(file):
            missing = load_file(file)
            missing[f"{layer}.weight_else"] = missing.pop(f"{layer}.weight_indices")
            save_file(missing, file, metadata={"format": "pt"})
    index.write_text(text)
    with pytest.raises(ValueError, match="holds 11 packed layers and this model has 12"):
        type(dense).from_pretrained(tmp_path / "packed")


def test_ties_that_no_model_declares_pack_in_memory(tiny_llama, magnitude, tokens):
    first, second = (layer.mlp for layer in tiny_llama.model.layers)
    second.up_proj.weight = first.up_proj.weight
    prune_(tiny_llama, magnitude())
    expected = tiny_llama(tokens).logits
    pack_(tiny_llama)
    assert first.up_proj is second.up_proj
    assert torch.equal(tiny_llama(tokens).logits, expected)


def test_one_weight_with_two_biases_is_refused_before_anything_is_changed(tiny_llama, magnitude):
    first, second = (layer.mlp for layer in tiny_llama.model.layers)
    second.up_proj.weight = first.up_proj.weight
    second.up_proj.bias = torch.nn.Parameter(torch.zeros(64))
    prune_(tiny_llama, magnitude())
    with pytest.raises(ValueError, match=r"0\.mlp\.up_proj and .*1\.mlp\.up_proj share one weight and are not the"):
        pack_(tiny_llama)
    assert not packed_layers(tiny_llama)[0]


def test_a_layer_that_stands_in_two_places_is_replaced_in_both():
    shared = torch.nn.Linear(8, 8)
    shared.weight.data = prune_2to4(shared.weight.data)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"fc1": shared, "fc2": shared})])})
    pack_(model)
    assert model["layers"][0]["fc1"] is model["layers"][0]["fc2"]
    assert isinstance(model["layers"][0]["fc1"], Sparse24Linear)


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_calibrated_methods_say_that_they_see_the_first_use_alone(family, tokens, caplog):
    sequential.logger.warning_once.cache_clear()
    model = build(family)
    report = prune_(model, Sparse24Config(method="wanda"), [{"input_ids": tokens}])
    assert report.totals["matrices_2to4"] == TIED[family][0]
    assert report.totals["violating_groups"] == 0
    assert f"{TIED[family][0]} weights, that of {next(t.name for t in select(model).targets)} for one" in caplog.text
    pack_(model)
    assert len(packed_layers(model)[0]) == TIED[family][0]
