"""Searching algorithms ahead: what is searched, and that layers then find it."""

import time

import pytest
import torch

from hf_sparse24.benchmark.shapes import Shape
from hf_sparse24.benchmark.tuning import token_counts, tune
from hf_sparse24.kernels import cusparselt, cusparselt_plans
from hf_sparse24.kernels.autotune import Choices
from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.pattern import prune_2to4


def test_only_numbers_of_tokens_that_reach_the_library():
    assert token_counts(torch.bfloat16, 600) == [128, 256, 512]
    assert token_counts(torch.int8)[-1] == 16384


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_without_a_gpu_it_says_why_not():
    with pytest.raises(ValueError, match="nothing to tune: cuSPARSELt needs an NVIDIA GPU"):
        list(tune([Shape(128, 128)], [None], torch.device("cuda")))


@pytest.mark.gpu
def test_a_layer_finds_what_was_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(cusparselt_plans, "choices", Choices(tmp_path / "algorithms.json"))
    cusparselt._open.cache_clear()
    found = list(tune([Shape(256, 512), Shape(24, 512)], [None, "int8"], torch.device("cuda"), 256))
    assert [(row.shape, row.dtype, row.tokens) for row in found] == [
        *(("256x512", "bf16", tokens) for tokens in token_counts(torch.bfloat16, 256)),
        *(("256x512", "int8", tokens) for tokens in token_counts(torch.int8, 256)),
    ]
    assert all(row.microseconds > 0 for row in found)
    linear = torch.nn.Linear(512, 256, bias=False, device="cuda", dtype=torch.bfloat16)
    linear.weight.data = prune_2to4(linear.weight.data)
    monkeypatch.setattr(cusparselt_plans.Library, "_candidates", lambda *_: pytest.fail("searched again"))
    with torch.no_grad():
        for quantization in (None, "int8"):
            Sparse24Linear.from_linear(linear, quantization, "cusparselt")(
                torch.randn(200, 512, device="cuda").bfloat16()
            )


@pytest.mark.gpu
@pytest.mark.slow
def test_the_shapes_of_an_8b_model_take_less_than_20_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(cusparselt_plans, "choices", Choices(tmp_path / "algorithms.json"))
    cusparselt._open.cache_clear()
    shapes = [Shape(4096, 4096), Shape(1024, 4096), Shape(14336, 4096), Shape(4096, 14336)]
    started = time.perf_counter()
    searched = len(token_counts(torch.bfloat16)) + len(token_counts(torch.int8))
    assert len(list(tune(shapes, [None, "int8"], torch.device("cuda")))) == 4 * searched
    assert time.perf_counter() - started < 20
