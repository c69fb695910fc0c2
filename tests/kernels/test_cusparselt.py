"""cuSPARSELt on a GPU against float64."""

import threading

import pytest
import torch

from hf_sparse24.kernels import cusparselt
from hf_sparse24.kernels.autotune import Choices
from hf_sparse24.kernels.cusparselt import compress, matmul
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def its_own_choices(tmp_path, monkeypatch):
    pytest.importorskip("nvmath.bindings.cusparseLt")
    monkeypatch.setattr(cusparselt, "choices", Choices(tmp_path / "algorithms.json"))


def operands(tokens, outputs, features, dtype, integer):
    weight = prune_2to4(torch.randn(outputs, features, device="cuda").to(dtype))
    packed = pack_weight(weight, "int8" if integer else None)
    buffer = compress(packed)
    values = buffer[: packed.weight.nbytes].view(packed.weight.dtype).view_as(packed.weight)
    x = torch.randn(tokens, features, device="cuda")
    x = (x * 30).round().clamp(-127, 127).to(torch.int8) if integer else x.to(dtype)
    return x, packed._replace(weight=values), packed


def check(result, x, packed, dtype):
    exact = x.double() @ unpack_weight(packed).double().t()
    bound = EPSILON[dtype] * exact.abs() + x.shape[1] * 2**-24 * exact.abs().max()
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "outputs", "features"), [(0, 32, 32), (1, 32, 32), (7, 64, 96), (17, 4096, 576), (4097, 256, 512)]
)
def test_equals_the_product_in_float64(tokens, outputs, features, dtype, integer):
    x, operand, packed = operands(tokens, outputs, features, dtype, integer)
    assert torch.equal(operand.weight, packed.weight)  # the buffer begins with the portable values
    for _ in range(2):  # as tuned, and from the plan that was kept
        check(matmul(x, operand.weight, operand.weight_scale, dtype), x, packed, dtype)


def test_what_stands_behind_the_last_token_has_no_part():
    x, operand, packed = operands(17, 64, 64, torch.bfloat16, False)
    room = torch.full((24, 64), torch.nan, dtype=x.dtype, device="cuda")
    room[:17] = x
    check(matmul(room[:17], operand.weight, None, torch.bfloat16), x, packed, torch.bfloat16)


def test_a_cuda_graph_and_another_stream():
    x, operand, packed = operands(64, 256, 256, torch.bfloat16, False)
    expected = matmul(x, operand.weight, None, torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(matmul(x, operand.weight, None, torch.bfloat16), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = matmul(x, operand.weight, None, torch.bfloat16)
    x.add_(1)
    graph.replay()
    check(result, x, packed, torch.bfloat16)


def test_threads_have_their_own_plans():
    x, operand, packed = operands(64, 256, 256, torch.bfloat16, False)
    results = []

    def run():
        results.extend(matmul(x, operand.weight, None, torch.bfloat16) for _ in range(20))
        torch.cuda.synchronize()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        check(result, x, packed, torch.bfloat16)
