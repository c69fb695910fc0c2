import io
import json

import pytest
import torch
from rich.console import Console

from hf_sparse24 import pack_, print_sparsity_report, prune_, sparsity_report, unpack_
from tests.families import build


def rendered(model):
    text = io.StringIO()
    print_sparsity_report(model, Console(file=text))
    return text.getvalue()


def test_a_dense_model_says_that_nothing_is_2to4(tiny_llama):
    report = sparsity_report(tiny_llama)
    assert {row.state for row in report.rows} == {"dense"}
    row = next(row for row in report.rows if row.name == "model.layers.0.mlp.up_proj")
    assert (row.role, row.shape, row.dtype) == ("up", (64, 32), "float32")
    assert row.violating_groups == row.shape[0] * row.shape[1] // 4  # random weights: every group
    assert row.reason == "not 2:4 in 512 of 512 groups"
    assert report.totals["matrices_2to4"] == 0


def test_every_matrix_has_a_row_in_the_order_of_the_model(tiny_llama):
    rows = [row.name for row in sparsity_report(tiny_llama).rows]
    matrices = [name.removesuffix(".weight") for name, p in tiny_llama.named_parameters() if p.ndim > 1]
    assert rows == matrices


def test_what_is_dense_says_why(magnitude):
    model = build("llama")
    report = prune_(model, magnitude(modules_to_not_convert=["k_proj"]))
    reasons = {row.name: row.reason for row in report.rows if row.state == "dense"}
    assert reasons["lm_head"] == "head"
    assert reasons["model.embed_tokens"] == "embedding"
    assert reasons["model.layers.0.self_attn.k_proj"] == "modules_to_not_convert"
    assert sparsity_report(model) == report  # the record in the config has the request


@pytest.mark.parametrize(("quantization", "ratio"), [(None, 0.5625), ("int8", 0.3125), ("fp8", 0.3125)])
def test_bytes_of_a_packed_bfloat16_model(tiny_llama, magnitude, quantization, ratio):
    model = tiny_llama.to(torch.bfloat16)
    prune_(model, magnitude())
    report = pack_(model, quantization)
    packed = report.sparse_rows
    assert {row.state for row in packed} == {"packed"}
    assert all(row.shape in {(32, 32), (16, 32), (64, 32), (32, 64)} for row in packed)
    scales = sum(4 * row.shape[0] for row in packed) if quantization else 0
    totals = report.totals
    assert totals["bytes_dense_2to4"] == sum(2 * row.shape[0] * row.shape[1] for row in packed)
    assert totals["bytes_stored_2to4"] == ratio * totals["bytes_dense_2to4"] + scales
    stored = sum(p.nbytes for n, p in model.named_parameters() if "_proj" in n)
    assert totals["bytes_stored_2to4"] == stored


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_density_and_state_through_the_life_of_a_model(tiny_llama, magnitude, quantization):
    pruned = prune_(tiny_llama, magnitude())
    packed = pack_(tiny_llama, quantization)
    unpacked = unpack_(tiny_llama)
    assert {row.state for row in unpacked.sparse_rows} == {"pruned"}
    assert [row.density for row in pruned.sparse_rows] == [0.5] * 14
    # INT8 rounds a few kept weights to zero.
    assert all(0.4 < row.density <= 0.5 for row in packed.sparse_rows)
    assert [row.density for row in unpacked.sparse_rows] == [row.density for row in packed.sparse_rows]


@pytest.mark.parametrize("family", ["llama", "deberta-v2", "mixtral", "clip", "gpt2"])
def test_the_table_fits_100_columns(family, magnitude):
    model = build(family)
    prune_(model, magnitude())
    text = rendered(model)
    assert max(map(len, text.splitlines())) <= 100
    assert "2:4: " in text


def test_layers_of_one_kind_share_a_line(tiny_llama, magnitude):
    prune_(tiny_llama, magnitude())
    lines = [line for line in rendered(tiny_llama).splitlines() if "mlp.up_proj" in line]
    assert len(lines) == 1
    assert lines[0].split()[:3] == ["model.layers.*.mlp.up_proj", "2", "64x32"]


def test_json_has_rows_and_totals(tiny_llama):
    report = sparsity_report(tiny_llama)
    data = json.loads(report.to_json())
    assert data["totals"] == report.totals
    assert data["rows"][0]["name"] == "model.embed_tokens"
    assert len(data["rows"]) == len(report.rows)
