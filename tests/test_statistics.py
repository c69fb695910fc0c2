import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse24 import statistics as statistics_module
from hf_sparse24.statistics import InputStatistics, gram

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def assert_gram(actual, left, right):
    """Compare with left^T right in float64 of the very same (rounded) inputs.

    The tolerance is what float32 sums may lose: the product and each of the additions round once, and a tensor core
    cuts off instead of rounding, so 2^-23 of the sum of absolute values for each addend. With 512 tokens that is
    6e-5; a sum kept in bfloat16 or float16 is off by 2^-9 or 2^-12 with its very last addition.
    """
    left, right = left.double().flatten(0, -2).cpu(), right.double().flatten(0, -2).cpu()
    bound = (len(left) + 2) * 2**-23 * (left.abs().t() @ right.abs())
    assert actual.dtype == torch.float32
    error = (actual.double().cpu() - left.t() @ right).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [1, 64])
def test_hessian_equals_the_float64_product(dtype, batches, device):
    x = torch.randn(512, 24, device=device).add_(1).to(dtype)
    statistics = InputStatistics(24, device)
    for batch in x.chunk(batches):
        statistics.add(batch)
    assert_gram(statistics.hessian, x, x)
    assert statistics.tokens == 512
    assert statistics.cross is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_not_summed_in_their_own_dtype(dtype, device):
    # Every product is 1, and 512 + 1 is no bfloat16, 4096 + 1 no float16; in float32 all of it is exact.
    statistics = InputStatistics(4, device)
    ones = torch.ones(5001, 4, dtype=dtype, device=device)
    statistics.add(ones[:4999])
    statistics.add(ones[4999:])
    assert statistics.hessian.tolist() == [[5001.0] * 4] * 4


def test_squares_beyond_the_range_of_float16_do_not_overflow(device):
    x = torch.full((8, 4), 30_000.0, dtype=torch.float16, device=device)
    statistics = InputStatistics(4, device)
    statistics.add(x)
    statistics.check("w")
    assert_gram(statistics.hessian, x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_is_the_dense_inputs_transposed_times_the_inputs(dtype, device):
    x, dense = torch.randn(2, 4, 64, 12, device=device).to(dtype)
    statistics = InputStatistics(12, device, asymmetric=True)
    statistics.add(x, dense)
    assert_gram(statistics.cross, dense, x)
    assert_gram(statistics.hessian, x, x)


def test_asymmetric_statistics_need_the_dense_inputs():
    with pytest.raises(ValueError, match="need the dense model's inputs"):
        InputStatistics(4, asymmetric=True).add(torch.randn(2, 4))


def test_symmetric_statistics_pass_over_dense_inputs():
    statistics = InputStatistics(4)
    statistics.add(torch.ones(2, 4), torch.full((2, 4), float("nan")))
    statistics.check("w")


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 9), share=st.floats(0, 1))
def test_padding_does_not_count(seed, length, share):
    generator = torch.Generator().manual_seed(seed)
    x, dense = torch.randn(2, 3, length, 8, generator=generator)
    kept = torch.rand(3, length, generator=generator) < share
    x[~kept], dense[~kept] = float("nan"), float("inf")
    statistics = InputStatistics(8, asymmetric=True)
    statistics.add(x, dense, kept)
    assert statistics.tokens == int(kept.sum())
    assert_gram(statistics.hessian, x[kept], x[kept])
    assert_gram(statistics.cross, dense[kept], x[kept])


def test_column_norms_are_those_of_the_inputs():
    x = torch.randn(2, 50, 12)
    statistics = InputStatistics(12)
    statistics.add(x)
    # The square root halves the relative error of a float32 sum of 100 squares.
    expected = x.double().flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(statistics.column_norms.double(), expected, rtol=100 * 2**-24, atol=0)


def test_column_norms_of_a_diagonal_that_rounding_made_negative_are_zero():
    statistics = InputStatistics(2)
    statistics.hessian.copy_(torch.tensor([[-1e-9, 0.0], [0.0, 4.0]]))
    assert statistics.column_norms.tolist() == [0, 2]


def test_check_names_what_no_token_reached_and_how_to_keep_it_dense():
    with pytest.raises(ValueError, match=r"No calibration token reached layers\.0\.q_proj.*=\['layers\.0\.q_proj'\]"):
        InputStatistics(4).check("layers.0.q_proj")
    all_padding = InputStatistics(4)
    all_padding.add(torch.randn(1, 3, 4), kept=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="No calibration token reached q_proj"):
        all_padding.check("q_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of_dense", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_check_refuses_one_value_that_is_not_finite(bad, of_dense, asymmetric):
    x, dense = torch.randn(2, 6, 8)
    (dense if of_dense else x)[3, 5] = bad
    statistics = InputStatistics(8, asymmetric=asymmetric)
    statistics.add(x, dense)
    if of_dense and not asymmetric:
        statistics.check("layers.1.down_proj")
        return
    with pytest.raises(ValueError, match=r"inputs of layers\.1\.down_proj hold NaN or Inf"):
        statistics.check("layers.1.down_proj")


def test_check_is_content_with_finite_inputs():
    statistics = InputStatistics(4, asymmetric=True)
    statistics.add(torch.randn(3, 4), torch.randn(3, 4))
    statistics.check("w")


def test_adding_does_not_write_to_the_inputs():
    x, dense = torch.randn(2, 6, 4)
    before = x.clone(), dense.clone()
    InputStatistics(4, asymmetric=True).add(x, dense)
    assert torch.equal(x, before[0])
    assert torch.equal(dense, before[1])


def test_processes_sum_what_each_has_seen(monkeypatch):
    statistics = InputStatistics(4, asymmetric=True)
    statistics.add(torch.randn(3, 4), torch.randn(3, 4))
    hessian, cross = statistics.hessian.clone(), statistics.cross.clone()
    statistics.all_reduce_()  # no process group: nothing to do
    assert torch.equal(statistics.hessian, hessian)
    # Two processes that have seen the same: a sum over them doubles.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    statistics.all_reduce_()
    assert torch.equal(statistics.hessian, 2 * hessian)
    assert torch.equal(statistics.cross, 2 * cross)
    assert statistics.tokens == 6
    assert type(statistics.tokens) is int


@pytest.mark.parametrize("left", DTYPES)
@pytest.mark.parametrize("right", DTYPES)
def test_gram_of_any_two_dtypes_is_in_float32(left, right, device):
    a, b = torch.randn(2, 100, 16, device=device)
    a, b = a.to(left), b.to(right)
    # float64 inputs are rounded to float32 first.
    assert_gram(gram(a, b), *(x.float() if x.dtype == torch.float64 else x for x in (a, b)))


def test_gram_of_inputs_that_are_not_contiguous(device):
    wide = torch.randn(16, 100, device=device, dtype=torch.bfloat16)
    assert_gram(gram(wide.t(), wide.t()), wide.t(), wide.t())
    sliced = wide.t()[::3, 4:12]
    assert_gram(gram(sliced, sliced), sliced, sliced)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_multiply_half_precision_without_a_float32_copy(dtype, monkeypatch):
    calls, mm = [], torch.mm
    monkeypatch.setattr(
        statistics_module.torch, "mm", lambda *args, **kwargs: calls.append(kwargs) or mm(*args, **kwargs)
    )
    x = torch.randn(4096, 128, device="cuda", dtype=dtype)
    result = gram(x, x)
    assert calls == [{"out_dtype": torch.float32}]
    assert_gram(result, x, x)
