import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse24.criteria.objective import layer_objective
from hf_sparse24.criteria.refit import refit
from hf_sparse24.pattern import mask_2to4
from tests.criteria.problems import make_problem

EXACT = {"iterations": 200, "tolerance": 1e-13}
# Conjugate gradients to 1e-13 of the right-hand side; a condition of about 1e4 stands between residual and solution.
SOLVED = {"rtol": 1e-8, "atol": 1e-8}


def masks(weight, kind):
    if kind == "2:4":
        return mask_2to4(weight.abs())
    if kind == "few":  # none, one or two of each group
        return mask_2to4(weight.abs()) & (torch.rand(weight.shape) < 0.6)
    return torch.rand(weight.shape) < 0.7


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", ["2:4", "few", "any"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_least_squares_on_the_support_of_each_row(asymmetric, kind, seed):
    problem = make_problem(seed, asymmetric=asymmetric)
    mask = masks(problem.weight, kind)
    torch.testing.assert_close(refit(problem.objective, mask, **EXACT), problem.best_on(mask), **SOLVED)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_where_it_starts_does_not_matter_when_it_may_finish(asymmetric):
    problem = make_problem(4, asymmetric=asymmetric)
    mask = masks(problem.weight, "2:4")
    for start in (torch.zeros_like(problem.weight), 10 * torch.randn_like(problem.weight)):
        refitted = refit(problem.objective, mask, start, **EXACT)
        torch.testing.assert_close(refitted, problem.best_on(mask), **SOLVED)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_float32_and_the_defaults_come_near_the_least_loss(asymmetric, seed):
    problem = make_problem(seed, rows=32, columns=64, tokens=128, asymmetric=asymmetric, dtype=torch.float32)
    mask = masks(problem.weight, "2:4")
    best, loss = (problem.loss(w) for w in (problem.best_on(mask), refit(problem.objective, mask)))
    assert refit(problem.objective, mask).dtype == torch.float32
    # A residual of 1e-4 in the norm of the problem costs 1e-8 of the output's energy, 100 times the least loss here.
    assert (loss <= best * (1 + 1e-4)).all()


def test_a_share_of_the_right_hand_side_decides_when_to_stop():
    problem = make_problem(0, columns=128, tokens=256)
    mask = masks(problem.weight, "2:4")
    hessian, linear = problem.objective.hessian, problem.objective.linear
    for tolerance in (1e-1, 1e-2, 1e-4):
        refitted = refit(problem.objective, mask, iterations=1000, tolerance=tolerance)
        residual, target = (linear - refitted @ hessian) * mask, linear * mask
        root = hessian.diagonal().sqrt()
        shares = (residual / root).norm(dim=1) / (target / root).norm(dim=1)
        assert shares.max() <= tolerance * (1 + 1e-6)  # the residual is carried along, not formed anew
        assert shares.max() > 1e-2 * tolerance  # it did stop: an iteration takes off a third or so
    nothing_to_do = refit(problem.objective, mask, tolerance=1e9)
    assert torch.equal(nothing_to_do, problem.weight * mask)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), asymmetric=st.booleans(), from_zero=st.booleans())
def test_the_loss_never_rises_from_one_iteration_to_the_next(seed, asymmetric, from_zero):
    problem = make_problem(seed, rows=6, asymmetric=asymmetric)
    mask = masks(problem.weight, "2:4")
    start = torch.zeros_like(problem.weight) if from_zero else problem.weight * mask
    steps = [refit(problem.objective, mask, start, iterations, tolerance=0) for iterations in range(12)]
    losses = [problem.loss(weight) for weight in (start, *steps)]
    torch.testing.assert_close(losses[1], losses[0])  # no iteration: where it started
    changes = torch.stack(losses).diff(dim=0)
    assert (changes <= 1e-12 * losses[0]).all()  # float64 rounding of the loss itself
    assert (losses[-1] < losses[0]).any()


def test_inputs_of_any_scale_that_are_not_correlated_take_one_iteration():
    weight, norms = torch.randn(9, 16, dtype=torch.float64), torch.logspace(-3, 3, 16, dtype=torch.float64)
    mask = masks(weight, "2:4")
    refitted = refit(layer_objective(weight, norms.square().diag(), 1e-12), mask, torch.zeros_like(weight), 1, 0.0)
    torch.testing.assert_close(refitted, weight * mask, rtol=1e-12, atol=0)  # a quotient and a few products round


def test_more_iterations_than_float32_can_use_do_no_harm():
    problem = make_problem(0, rows=32, columns=64, tokens=128, dtype=torch.float32)
    mask = masks(problem.weight, "2:4")
    mask[5], mask[6] = False, torch.arange(64) == 3  # solved at once, while other rows go on
    best = problem.loss(problem.best_on(mask))
    for iterations in (100, 1000):
        refitted = refit(problem.objective, mask, iterations=iterations, tolerance=0)
        assert refitted.isfinite().all()
        # The square of a float32 error, times a condition of 1e4, is below 1e-8.
        torch.testing.assert_close(problem.loss(refitted), best, rtol=1e-7, atol=0)


def test_it_is_never_worse_than_its_start_even_with_few_iterations():
    problem = make_problem(3, rows=32, columns=64, tokens=128, dtype=torch.float32)
    mask = masks(problem.weight, "2:4")
    best = problem.best_on(mask)
    # The best there is leaves nothing to gain, and float32 1e-7 of the loss to lose.
    for iterations in (1, 3, 30):
        refitted = refit(problem.objective, mask, best.float(), iterations)
        assert (problem.loss(refitted) <= problem.loss(best.float()) * (1 + 1e-7)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_what_the_mask_drops_is_exactly_zero(asymmetric, dtype):
    problem = make_problem(0, asymmetric=asymmetric, dtype=dtype)
    mask = masks(problem.weight, "2:4")
    refitted = refit(problem.objective, mask, start=torch.randn(mask.shape, dtype=dtype))
    assert refitted[~mask].count_nonzero() == 0
    assert not refitted[~mask].signbit().any()
    assert (refitted[mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_and_rows_without_support_come_out_zero(dtype):
    problem = make_problem(0)
    weight = problem.weight.clone()
    weight[2] = 0
    mask = masks(problem.weight, "2:4")
    mask[7] = False
    objective = layer_objective(weight, (problem.inputs.t() @ problem.inputs).to(dtype))
    refitted = refit(objective, mask)
    assert refitted.isfinite().all()
    assert refitted[[2, 7]].count_nonzero() == 0
    alone = refit(layer_objective(torch.zeros(2, 16), objective.hessian), mask[:2])
    assert alone.tolist() == [[0] * 16] * 2


def test_arguments_are_not_written_to():
    problem = make_problem(0)
    mask, start = masks(problem.weight, "2:4"), torch.randn_like(problem.weight)
    before = [*(part.clone() for part in problem.objective[:4]), mask.clone(), start.clone()]
    refit(problem.objective, mask, start)
    after = [*problem.objective[:4], mask, start]
    assert all(torch.equal(now, was) for now, was in zip(after, before, strict=True))
