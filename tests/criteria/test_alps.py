import itertools

import pytest
import torch

from hf_sparse24.criteria import alps as module
from hf_sparse24.criteria.alps import alps
from hf_sparse24.criteria.objective import layer_objective
from hf_sparse24.criteria.refit import refit
from hf_sparse24.criteria.sparsegpt import sparsegpt
from hf_sparse24.pattern import find_violations, mask_2to4, prune_2to4
from tests.criteria.problems import make_problem


def refitted(problem, pruned):
    return refit(problem.objective, mask_2to4(pruned.abs()), pruned, iterations=200, tolerance=1e-12)


@pytest.fixture
def supports(monkeypatch):
    """The support after the start and after each iteration."""
    seen = []

    def watched(weight):
        kept = prune_2to4(weight)
        seen.append(kept != 0)
        return kept

    monkeypatch.setattr(module, "prune_2to4", watched)
    return seen


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [0, 1, 7, 60])
def test_the_result_is_2to4_and_has_no_negative_zero(asymmetric, dtype, iterations):
    problem = make_problem(0, columns=64, asymmetric=asymmetric, dtype=dtype)
    pruned = alps(problem.objective, iterations)
    assert pruned.dtype == dtype
    assert pruned.isfinite().all()
    assert find_violations(pruned).count == 0
    assert not pruned[pruned == 0].signbit().any()


@pytest.mark.parametrize(("columns", "factor"), [(4, 1.4), (8, 1.15)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_refitted_against_the_best_of_all_masks(columns, factor, asymmetric, seed):
    # Nothing beats the best of all masks, each with its least squares values. How near ALPS comes was measured over
    # single seeds 0 to 7: at worst 1.53 (K=4) and 1.23 (K=8) times the best, mostly 1.00 to 1.05; four are pooled.
    problems = [make_problem(10 * seed + i, rows=16, columns=columns, asymmetric=asymmetric) for i in range(4)]
    losses = torch.cat([problem.loss(refitted(problem, alps(problem.objective))) for problem in problems])
    best = torch.cat([problem.brute_force() for problem in problems])
    assert (losses >= best * (1 - 1e-9)).all()  # rounding of a float64 sum of squares
    assert losses.mean() <= factor * best.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_below_that_of_sparsegpt(dtype):
    problems = [make_problem(seed, rows=32, columns=64, tokens=128, dtype=dtype) for seed in range(6)]
    ours = torch.stack([problem.loss(alps(problem.objective)).mean() for problem in problems])
    theirs = torch.stack([problem.loss(sparsegpt(problem.objective)).mean() for problem in problems])
    # Measured: about half on every one of them.
    assert ours.mean() < 0.75 * theirs.mean()


def test_the_asymmetric_problem_is_solved_for_its_own_target():
    problems = [make_problem(seed, rows=32, columns=32, tokens=128, asymmetric=True) for seed in range(4)]
    ours, theirs = [], []
    for problem in problems:
        symmetric = problem.objective._replace(linear=problem.weight @ problem.objective.hessian)
        ours.append(problem.loss(alps(problem.objective)).mean())
        theirs.append(problem.loss(alps(symmetric)).mean())
    assert sum(ours) < sum(theirs)


def test_float32_comes_as_near_as_float64():
    narrow, wide = (make_problem(0, rows=32, columns=64, tokens=128, dtype=d) for d in (torch.float32, torch.float64))
    # Another rounding may send a few weights another way, with no systematic loss.
    loss, expected = (wide.loss(alps(problem.objective)).mean() for problem in (narrow, wide))
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_stops_when_the_support_is_stable(seed, asymmetric, supports):
    problem = make_problem(seed, asymmetric=asymmetric)
    pruned = alps(problem.objective, iterations=2000)
    iterations = len(supports) - 1
    assert iterations < 600
    assert iterations % 3 == 0
    checked = supports[::3]
    assert torch.equal(checked[-1], checked[-2])
    assert not any(torch.equal(after, before) for after, before in zip(checked[1:-1], checked[:-2], strict=True))
    assert torch.equal(pruned, alps(problem.objective, iterations))


def test_it_stops_early_when_hardly_anything_moves(supports):
    problem = make_problem(0, rows=512, columns=32)
    alps(problem.objective, iterations=2000)
    pairs = itertools.pairwise(supports[::3])
    shares = [int((after & ~before).sum()) / int(after.sum()) for before, after in pairs]
    assert len(shares) >= 10
    assert shares[-1] < 3e-4
    assert all(share > 0 for share in shares[:-1])
    assert all(share >= 3e-4 for share in shares[9:-1])  # from the thirtieth iteration on


@pytest.mark.parametrize("seed", range(3))
def test_inputs_that_are_not_correlated_cost_next_to_nothing_over_the_exact_answer(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    norms = torch.rand(32, generator=generator, dtype=torch.float64) + 0.1
    objective = layer_objective(weight, norms.square().diag())

    def loss(pruned):
        return (objective.loss(pruned) - objective.loss(weight)).mean()

    # The exact answer keeps what weighs most by the damped Hessian. While rho is small a dropped weight's dual grows
    # to 1 / rho times its weight and takes turns with those that stay; at most 1.6 % of the loss was left of that
    # in 40 problems like these, 0.2 % in the mean.
    exact = prune_2to4(weight, weight.abs() * objective.hessian.diagonal().sqrt())
    assert 1 - 1e-12 <= loss(alps(objective)) / loss(exact) <= 1.03


def test_the_scale_of_an_input_makes_no_difference():
    # Halving an input and doubling its weights is the same layer; exactly so, with powers of two and without a ridge.
    problem, scale = make_problem(0), 2.0 ** torch.randint(-3, 4, (16,))
    hessian = problem.inputs.t() @ problem.inputs
    plain = alps(layer_objective(problem.weight, hessian, dampening=1e-9))
    scaled = alps(layer_objective(problem.weight / scale, hessian * scale * scale[:, None], dampening=1e-9))
    # But for the ridge of 1e-9 times the mean, which weighs scaled inputs otherwise.
    assert torch.equal(plain != 0, scaled != 0)
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-4, atol=1e-4)


def test_the_problem_is_not_written_to():
    objective = make_problem(0).objective
    before = [part.clone() for part in objective[:4]]
    alps(objective)
    assert all(torch.equal(part, was) for part, was in zip(objective[:4], before, strict=True))


def test_rows_of_zeros_stay_zeros():
    problem = make_problem(0)
    weight = problem.weight.clone()
    weight[3] = 0
    hessian = problem.inputs.t() @ problem.inputs
    assert alps(layer_objective(weight, hessian))[3].tolist() == [0] * 16
    assert alps(layer_objective(torch.zeros(2, 16), hessian)).tolist() == [[0] * 16] * 2


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [("1100", "1100", 0), ("1100", "1010", 0.5), ("1100", "0011", 1), ("0000", "0000", 0)],
)
def test_the_share_that_moved_counts_what_is_new(before, after, share):
    supports = (torch.tensor([[digit == "1" for digit in digits]]) for digits in (before, after))
    assert module._moved(*supports) == share
