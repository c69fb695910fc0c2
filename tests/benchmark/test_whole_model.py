"""Variants of a whole model: logits, rows, ratios, and the attention that decoding is measured with."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, LlamaConfig

from hf_sparse24.benchmark import models, whole_model
from hf_sparse24.benchmark.attention import attach_caches, detach_caches
from hf_sparse24.benchmark.models import Source, layer_stacks
from hf_sparse24.benchmark.whole_model import Mode, Workload, benchmark_model, modes, with_model_ratios

CPU = torch.device("cpu")
PREFILL, DECODE = Workload("prefill", 2, 8), Workload("decode", 3, 8)


@pytest.fixture
def source(tmp_path):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "Tiny")
    return Source(str(tmp_path / "Tiny"), random_weights=True)


@pytest.fixture
def quick(monkeypatch):
    def time_stream(call, device, repeats=5):
        call()
        return 1000.0

    monkeypatch.setattr(whole_model, "time_stream", time_stream)


def test_decoding_over_the_cache_is_what_transformers_decodes(tiny_llama):
    """The oracle is transformers' own cache, whose keys and values are put into the buffers."""
    tokens = torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        expected = tiny_llama(tokens).logits[:, -1]
        cache = tiny_llama(tokens[:, :-1], use_cache=True).past_key_values
        step = {"input_ids": tokens[:, -1:], "position_ids": torch.full((2, 1), 8), "use_cache": False}
        attach_caches(tiny_llama, lambda: tiny_llama(**step), context=9)
        assert not torch.allclose(tiny_llama(**step).logits[:, -1], expected, atol=1e-4)
        for number, layer in enumerate(tiny_llama.model.layers):
            keys, values = cache.layers[number].keys, cache.layers[number].values
            layer.self_attn.sparse24_keys[:, :, :8] = keys
            layer.self_attn.sparse24_values[:, :, :8] = values
        found = tiny_llama(**step).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums in another order
    detach_caches(tiny_llama)
    assert not any("sparse24" in name for name, _ in tiny_llama.named_buffers())


def test_packed_models_are_measured_beside_dense_ones(source, quick):
    rows = []
    for name in ("dense-bf16", "2:4-int8", "2:4-bf16"):
        rows += benchmark_model(source, name, [PREFILL, DECODE], CPU, compile=False)
    rows = with_model_ratios(rows)
    assert {row.status for row in rows} == {"ok"}
    found = {(row.benchmark, row.candidate): row for row in rows}
    assert len(found) == 6
    dense, int8, bf16 = (found["decode", name] for name in ("dense-bf16", "2:4-int8", "2:4-bf16"))
    assert dense.model == "Tiny, random weights"
    assert (dense.layers, dense.mode, dense.error) == (3, "eager", 0)
    assert dense.tokens_s == pytest.approx(3 / 1e-3)
    assert found["prefill", "dense-bf16"].tokens_s == pytest.approx(16 / 1e-3)
    assert int8.over_dense_bf16 == 1
    assert 0 < int8.error < 0.1  # INT8, three layers: a few times 0.01
    assert int8.weights_over_bf16 < bf16.weights_over_bf16 < 1 == dense.weights_over_bf16


def test_a_compiled_layer_serves_all_layers(source, quick, monkeypatch):
    counter = CompileCounter()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compile(self, backend=counter, **kwargs))
    rows = list(benchmark_model(source, "2:4-int8", [DECODE], CPU, compile=True))
    assert [(row.mode, row.status) for row in rows] == [("eager", "ok"), ("compiled", "ok")]
    assert counter.frame_count == 1


def test_a_wrong_model_has_no_time(source, quick, monkeypatch):
    def garble(model, quantization, backend):
        for parameter in model.model.layers.parameters():
            parameter.normal_()

    monkeypatch.setattr(models, "pack_", garble)
    rows = list(benchmark_model(source, "2:4-int8", [PREFILL], CPU, compile=False))
    assert [row.status.split(":")[0] for row in rows] == ["wrong"]
    assert rows[0].ms is None


def test_a_variant_that_cannot_be_made_says_why(source, quick):
    rows = list(benchmark_model(source, "dense-fp8", [PREFILL, DECODE], CPU, compile=False))
    assert [row.benchmark for row in rows] == ["prefill", "decode"]
    if not torch.cuda.is_available():
        assert all(row.status.startswith("cannot run: ") for row in rows)


def test_an_encoder_has_a_prefill_and_no_decode(tmp_path, quick):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertConfig(vocab_size=96, architectures=["BertForMaskedLM"], **sizes).save_pretrained(tmp_path)
    source = Source(str(tmp_path), random_weights=True)
    rows = list(benchmark_model(source, "2:4-bf16", [PREFILL], CPU, compile=False))
    assert [row.status for row in rows] == ["ok"]
    rows = list(benchmark_model(source, "2:4-bf16", [DECODE], CPU, compile=False))
    assert rows[0].status.startswith("cannot run: ")
    assert rows[0].ms is None


def test_half_of_the_layers_run_and_all_are_back(source):
    model = source.load(CPU)
    assert list(layer_stacks(model)) == ["model.layers"]
    with whole_model._half_the_layers(model) as removed:
        assert (removed, len(model.model.layers)) == (1, 2)
    assert len(model.model.layers) == 3


def test_the_time_of_a_layer_is_the_difference_over_the_layers_left_out(source, monkeypatch):
    times = iter([7000.0, 4000.0])
    monkeypatch.setattr(whole_model, "time_stream", lambda call, device: next(times))
    (row,) = benchmark_model(source, "dense-bf16", [PREFILL], CPU, compile=False)
    assert (row.ms, row.layer_us) == (7, 3000)


def test_graphs_are_for_decoding_on_a_gpu():
    gpu = torch.device("cuda")
    assert list(map(str, modes(DECODE, True, gpu))) == ["eager", "eager+graph", "compiled+graph"]
    assert modes(PREFILL, True, gpu) == [Mode(False, False), Mode(True, False)]
    assert modes(DECODE, False, CPU) == [Mode(False, False)]


def test_sources_are_checked(source, tmp_path, magnitude, tiny_llama_folder):
    assert replace(source, layers=1).load(CPU).config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="only --random-weights"):
        Source(source.name, layers=1).config()
    with pytest.raises(ValueError, match="There is no /nowhere"):
        Source("/nowhere").config()
    assert Source(str(tiny_llama_folder)).load(CPU).dtype == torch.bfloat16


@pytest.mark.gpu
def test_decoding_is_captured_on_a_gpu(source):
    for name in ("dense-bf16", "2:4-int8"):
        rows = list(benchmark_model(source, name, [PREFILL, DECODE], torch.device("cuda")))
        assert {row.status for row in rows} == {"ok"}
        assert all(row.peak_gb > 0 and row.weights_gb > 0 for row in rows)
