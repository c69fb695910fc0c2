"""cuSPARSELt on a GPU against float64; kept plans; choices that the library refuses for other numbers of tokens."""

import threading

import pytest
import torch

from hf_sparse24.capability import has_nvmath
from hf_sparse24.kernels import cusparselt, cusparselt_plans
from hf_sparse24.kernels.autotune import Choices
from hf_sparse24.kernels.cusparselt import compress, cusparselt_capability, matmul
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

needs_nvmath = pytest.mark.skipif(not has_nvmath(), reason="nvmath-python is not installed")
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def its_own_choices(tmp_path, monkeypatch):
    monkeypatch.setattr(cusparselt_plans, "choices", Choices(tmp_path / "algorithms.json"))
    cusparselt._open.cache_clear()


def operands(tokens, outputs, features, dtype, integer):
    weight = prune_2to4(torch.randn(outputs, features, device="cuda").to(dtype))
    packed = pack_weight(weight, "int8" if integer else None)
    x = torch.randn(tokens, features, device="cuda")
    x = (x * 30).round().clamp(-127, 127).to(torch.int8) if integer else x.to(dtype)
    return x, packed, *compress(packed)


def check(result, x, packed, dtype):
    exact = x.double() @ unpack_weight(packed).double().t()
    bound = EPSILON[dtype] * exact.abs() + x.shape[1] * 2**-24 * exact.abs().max()
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= bound).all()


def test_what_the_library_takes():
    assert cusparselt_capability(torch.bfloat16, 128, 144).ok
    assert cusparselt_capability(torch.int8, 160, 128).ok
    for arguments, reason in {
        (torch.float32, 128, 128): "not float32",
        (torch.int8, 144, 128): "divisible by 32",
        (torch.bfloat16, 128, 136): "divisible by 16",
        (torch.float16, 64, 128): "from 128 features",
    }.items():
        capability = cusparselt_capability(*arguments)
        assert not capability.ok
        assert reason in capability.reason


class Refusing:
    """A library that refuses one algorithm for one number of tokens, and counts what is made."""

    class cuSPARSELtError(Exception):
        pass


@pytest.mark.parametrize("tokens", [24, 32])
def test_what_is_refused_for_a_number_of_tokens_is_not_asked_for_again(tokens, monkeypatch):
    library = object.__new__(cusparselt_plans.Library)
    library.lt, library._machine = Refusing, "a machine"
    problem = cusparselt_plans.Problem(256, 256, tokens, torch.bfloat16, torch.bfloat16, False)

    def plan(_, problem, algorithm, split_k):
        if algorithm == 7:
            raise Refusing.cuSPARSELtError
        return algorithm

    monkeypatch.setattr(cusparselt_plans, "Plan", plan)
    monkeypatch.setattr(cusparselt_plans.Library, "_candidates", lambda *_: [(7, 1), (3, 1)])
    monkeypatch.setattr(
        cusparselt_plans.Library,
        "_microseconds",
        lambda self, problem, operands, algorithm, split_k: float("inf") if algorithm == 7 else 2.0,
    )
    cusparselt_plans.choices.find(library._key(problem, "about 32 tokens"), lambda: [(7, 1)], lambda *_: 1.0)
    assert library._best_plan(problem, None) == 3
    assert library.choice(problem).algorithm == 3


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("integer", [False, True])
    @pytest.mark.parametrize("dtype", list(EPSILON))
    @pytest.mark.parametrize(
        ("tokens", "outputs", "features"), [(1, 128, 128), (7, 160, 192), (17, 4096, 576), (4097, 256, 512)]
    )
    def test_equals_the_product_in_float64(self, tokens, outputs, features, dtype, integer):
        x, packed, values, metadata = operands(tokens, outputs, features, dtype, integer)
        assert torch.equal(values, packed.weight)
        assert metadata.data_ptr() == values.data_ptr() + values.nbytes
        for _ in range(2):  # as tuned, and from the plan that was kept
            check(matmul(x, values, metadata, packed.weight_scale, None, dtype), x, packed, dtype)

    def test_what_stands_behind_the_last_token_has_no_part(self):
        x, packed, values, metadata = operands(17, 128, 128, torch.bfloat16, False)
        room = torch.full((24, 128), torch.nan, dtype=x.dtype, device="cuda")
        room[:17] = x
        check(matmul(room[:17], values, metadata, None, None, torch.bfloat16), x, packed, torch.bfloat16)

    @pytest.mark.parametrize("integer", [False, True])
    def test_without_nvmath_torch_runs_it(self, integer, monkeypatch):
        monkeypatch.setattr(cusparselt, "has_nvmath", lambda: False)
        x, packed, values, metadata = operands(17, 128, 256, torch.bfloat16, integer)
        check(matmul(x, values, metadata, packed.weight_scale, None, torch.bfloat16), x, packed, torch.bfloat16)

    @pytest.mark.parametrize("integer", [False, True])
    def test_copies_that_do_not_follow_each_other(self, integer):
        x, packed, values, metadata = operands(17, 128, 256, torch.bfloat16, integer)
        copies = values.clone(), metadata.clone()
        check(matmul(x, *copies, packed.weight_scale, None, torch.bfloat16), x, packed, torch.bfloat16)

    def test_each_call_has_its_own_bias(self):
        x, packed, values, metadata = operands(64, 256, 256, torch.bfloat16, False)
        exact = x.double() @ unpack_weight(packed).double().t()
        biases = [torch.randn(256, device="cuda").bfloat16() for _ in range(3)]
        results = [matmul(x, values, metadata, None, bias, torch.bfloat16) for bias in biases]
        for result, bias in zip(results, biases, strict=True):
            expected = exact + bias.double()
            assert ((result.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()

    @needs_nvmath
    def test_threads_share_plans(self):
        x, packed, values, metadata = operands(64, 256, 256, torch.bfloat16, False)
        results = []

        def run():
            results.extend(matmul(x, values, metadata, None, None, torch.bfloat16) for _ in range(20))
            torch.cuda.synchronize()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 80
        for result in results:
            check(result, x, packed, torch.bfloat16)
        assert len(cusparselt._open(0)._plans) == 1

    @needs_nvmath
    def test_plans_are_bounded(self, monkeypatch):
        monkeypatch.setattr(cusparselt_plans, "_KEPT", 2)
        for tokens in (8, 16, 24, 32):
            x, packed, values, metadata = operands(tokens, 128, 128, torch.bfloat16, False)
            check(matmul(x, values, metadata, None, None, torch.bfloat16), x, packed, torch.bfloat16)
        assert [problem.tokens for problem in cusparselt._open(0)._plans] == [24, 32]

    @needs_nvmath
    @pytest.mark.parametrize("tokens", [24, 32])
    def test_a_choice_that_the_library_refuses_is_searched_anew(self, tokens):
        x, packed, values, metadata = operands(tokens, 256, 256, torch.bfloat16, False)
        library = cusparselt._open(0)
        problem = cusparselt_plans.Problem(256, 256, tokens, torch.bfloat16, torch.bfloat16, False)
        cusparselt_plans.choices.find(library._key(problem, "about 32 tokens"), lambda: [(10**6, 1)], lambda *_: 1.0)
        check(matmul(x, values, metadata, None, None, torch.bfloat16), x, packed, torch.bfloat16)
        assert library.choice(problem).algorithm != 10**6
