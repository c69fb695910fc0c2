import pytest
import torch

from hf_sparse24.criteria.objective import layer_objective
from hf_sparse24.criteria.sparsegpt import sparsegpt
from hf_sparse24.pattern import find_violations, mask_2to4, prune_2to4
from tests.criteria.problems import make_problem


def naive_sparsegpt(weight, hessian):
    """Optimal brain surgery column by column: the inverse over the columns still to come, formed anew for each.

    The score of a weight takes the inverse over its own and the later columns, as the paper's does; the two of a
    group that stay are chosen when the group is reached.
    """
    weight, columns = weight.clone(), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(columns)]
    for row in weight:
        for start in range(0, columns, 4):
            costs = [float(row[c] ** 2 / inverses[c][0, 0]) for c in range(start, start + 4)]
            dropped = sorted(range(4), key=costs.__getitem__)[:2]
            for offset in sorted(dropped):
                column = start + offset
                inverse = inverses[column]
                row[column:] -= row[column] / inverse[0, 0] * inverse[0]
                row[column] = 0
    return weight


@pytest.mark.parametrize("columns", [4, 8, 16, 24])
@pytest.mark.parametrize("seed", range(4))
def test_equals_surgery_with_explicit_inverses(columns, seed):
    problem = make_problem(seed, rows=10, columns=columns)
    pruned = sparsegpt(problem.objective)
    expected = naive_sparsegpt(problem.weight, problem.objective.hessian)
    assert torch.equal(pruned != 0, expected != 0)
    # float64 rounding, times the condition of a Hessian damped by a hundredth: about 1e4.
    torch.testing.assert_close(pruned, expected, rtol=1e-10, atol=1e-10)


def test_float32_equals_surgery_but_for_ties():
    problem = make_problem(0, rows=200, columns=24, dtype=torch.float32)
    pruned = sparsegpt(problem.objective)
    expected = naive_sparsegpt(problem.weight, problem.objective.hessian.double())
    same = ((pruned != 0) == (expected != 0)).all(1)
    assert same.double().mean() > 0.98  # scores closer than 1e-5 of each other may fall either way
    # 2^-24 times the condition, about 1e4, of the Hessian.
    torch.testing.assert_close(pruned[same].double(), expected[same], rtol=1e-3, atol=1e-3)
    assert pruned.dtype == torch.float32


@pytest.mark.parametrize("columns", [24, 132, 256])
@pytest.mark.parametrize("block_size", [4, 8, 128])
def test_the_size_of_blocks_does_not_matter(columns, block_size):
    problem = make_problem(1, columns=columns, tokens=2 * columns)
    whole = sparsegpt(problem.objective, block_size=columns)
    blocked = sparsegpt(problem.objective, block_size)
    assert torch.equal(blocked != 0, whole != 0)
    # The same sums in another order: float64 rounding, times the condition of the Hessian.
    torch.testing.assert_close(blocked, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_2to4_and_has_no_negative_zero(dtype, seed):
    problem = make_problem(seed, columns=64, dtype=dtype)
    pruned = sparsegpt(problem.objective)
    assert pruned.dtype == dtype
    assert find_violations(pruned).count == 0
    assert not pruned[pruned == 0].signbit().any()


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_the_problem_is_not_written_to(rows, inputs_first):
    objective = make_problem(0, rows=rows).objective
    if inputs_first:  # as Conv1D keeps its weight; so does a single row, either way
        objective = objective._replace(weight=objective.weight.t().contiguous().t())
    before = [part.clone() for part in objective[:4]]
    sparsegpt(objective)
    assert all(torch.equal(part, was) for part, was in zip(objective[:4], before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_below_that_of_masks_without_repair(seed, dtype):
    problem = make_problem(seed, rows=32, columns=64, tokens=128, dtype=dtype)
    loss = problem.loss(sparsegpt(problem.objective)).mean()
    of_wanda = prune_2to4(problem.weight, problem.weight.abs() * problem.inputs.norm(dim=0))
    assert loss < problem.loss(of_wanda).mean()
    assert loss < problem.loss(prune_2to4(problem.weight)).mean()


def test_inputs_that_are_not_correlated_need_no_repair():
    weight, norms = torch.randn(9, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64) + 0.1
    pruned = sparsegpt(layer_objective(weight, norms.square().diag(), dampening=1e-12))
    # Wanda is the exact answer then, and no value moves but by the rounding of an inverse and back.
    torch.testing.assert_close(pruned, prune_2to4(weight, weight.abs() * norms), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_see_each_other(dtype):
    problem = make_problem(2, rows=12, columns=32, dtype=dtype)
    whole = sparsegpt(problem.objective)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
        objective = problem.objective._replace(
            weight=problem.objective.weight[rows], linear=problem.objective.linear[rows]
        )
        apart = sparsegpt(objective)
        assert torch.equal(apart != 0, whole[rows] != 0)
        # A product of other shape may add in another order: the dtype's rounding times the condition, about 1e4.
        tolerance = 1e4 * torch.finfo(dtype).eps
        torch.testing.assert_close(apart, whole[rows], rtol=tolerance, atol=tolerance)


def test_rows_of_zeros_stay_zeros():
    problem = make_problem(0)
    weight = problem.weight.clone()
    weight[3] = 0
    pruned = sparsegpt(layer_objective(weight, problem.inputs.t() @ problem.inputs))
    assert pruned[3].tolist() == [0] * 16
    assert pruned.isfinite().all()


@pytest.mark.parametrize(("columns", "factor"), [(4, 1.7), (8, 1.8)])
@pytest.mark.parametrize("seed", range(2))
def test_against_the_best_of_all_masks(columns, factor, seed):
    # Nothing beats the best of all masks, each with its least squares values. How near a greedy walk comes was
    # measured over seeds 0 to 7: 1.50 (K=4) and 1.55 (K=8) times the best in the mean; the rest is room.
    problems = [make_problem(10 * seed + i, rows=16, columns=columns) for i in range(4)]
    losses = torch.cat([problem.loss(sparsegpt(problem.objective)) for problem in problems])
    best = torch.cat([problem.brute_force() for problem in problems])
    assert (losses >= best * (1 - 1e-9)).all()  # rounding of a float64 sum of squares
    assert losses.mean() <= factor * best.mean()


def test_the_two_of_a_group_are_chosen_with_the_weights_as_repaired_so_far():
    # Input 4 copies input 0, whose weight is dropped: its own weight, too small as it was, inherits what that did.
    inputs = torch.randn(400, 8, dtype=torch.float64)
    inputs[:, 4] = inputs[:, 0]
    weight = torch.tensor([[0.5, 2.0, 3.0, 0.6, 0.3, 0.7, 0.6, 0.1]], dtype=torch.float64)
    pruned = sparsegpt(layer_objective(weight, inputs.t() @ inputs, dampening=1e-6))
    assert mask_2to4(weight.abs())[0, 4:].tolist() == [False, True, True, False]
    assert pruned.ne(0).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    # 0.3 + 0.5, but for the correlation of 400 random tokens: 1 / sqrt(400) for each weight dropped.
    assert float(pruned[0, 4]) == pytest.approx(0.8, abs=0.15)
