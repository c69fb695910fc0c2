import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse24.criteria.saliency import SALIENCY, SALIENCY_OF_INPUTS, magnitude, ria, wanda

# float32 against float64: a handful of roundings of 2^-24 each, and a sum of at most 12 addends.
FLOAT32 = {"rtol": 20 * 2**-24, "atol": 0}

matrices = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10_000))


def made(shape):
    rows, columns, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator).add_(0.1)


def loop(weight, one):
    rows, columns = weight.shape
    return torch.tensor([[one(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)


def naive_wanda(weight, norms):
    w, x = weight.tolist(), norms.tolist()
    return loop(weight, lambda i, j: abs(w[i][j]) * x[j])


def naive_ria(weight, norms, power):
    w, x = weight.tolist(), norms.tolist()
    rows, columns = weight.shape

    def one(i, j):
        if w[i][j] == 0:
            return 0.0
        of_column = abs(w[i][j]) / sum(abs(w[n][j]) for n in range(rows))
        of_row = abs(w[i][j]) / sum(abs(w[i][k]) for k in range(columns))
        return (of_column + of_row) * x[j] ** power

    return loop(weight, one)


def test_magnitude_is_the_absolute_value():
    assert magnitude(torch.tensor([[-2.0, 0.0, 1.0]])).tolist() == [[2, 0, 1]]


@settings(deadline=None, max_examples=30)
@given(matrices)
def test_wanda_equals_its_formula(shape):
    weight, norms = made(shape)
    torch.testing.assert_close(wanda(weight, norms).double(), naive_wanda(weight, norms), **FLOAT32)


@settings(deadline=None, max_examples=30)
@given(matrices, st.sampled_from([0.0, 0.5, 1.0]))
def test_ria_equals_its_formula(shape, power):
    weight, norms = made(shape)
    torch.testing.assert_close(ria(weight, norms, power).double(), naive_ria(weight, norms, power), **FLOAT32)


def test_ria_takes_the_square_root_of_the_norm_unless_told():
    weight, norms = made((5, 8, 0))
    assert torch.equal(ria(weight, norms), ria(weight, norms, 0.5))
    assert not torch.allclose(ria(weight, norms), ria(weight, norms, 1.0))


@pytest.mark.parametrize("zeroed", [(slice(None), 2), (1, slice(None)), (slice(None), slice(None))])
def test_zero_rows_and_columns_score_zero_and_no_nan(zeroed):
    weight, norms = made((5, 8, 0))
    weight[zeroed] = 0
    torch.testing.assert_close(ria(weight, norms).double(), naive_ria(weight, norms, 0.5), **FLOAT32)


@pytest.mark.parametrize("method", SALIENCY_OF_INPUTS)
def test_an_input_that_no_token_used_scores_zero(method):
    weight, norms = made((5, 8, 0))
    norms[3] = 0
    scores = SALIENCY_OF_INPUTS[method](weight, norms)
    assert scores[:, 3].tolist() == [0] * 5
    assert (scores[:, [0, 1, 2, 4, 5, 6, 7]] > 0).all()


def test_ria_keeps_what_an_input_cannot_do_without():
    # The last input loses under Wanda in both rows; of its column the second row holds the better part.
    weight, norms = torch.tensor([[1.0, 1.0, 1.0, 0.01], [1.0, 1.0, 1.0, 0.09]]), torch.ones(4)
    assert wanda(weight, norms).argmin(1).tolist() == [3, 3]
    assert ria(weight, norms)[1].argmax() == 3


def test_every_method_is_found_by_its_name():
    assert SALIENCY["magnitude"] is magnitude
    assert SALIENCY_OF_INPUTS["wanda"] is wanda
    assert SALIENCY_OF_INPUTS["ria"] is ria
