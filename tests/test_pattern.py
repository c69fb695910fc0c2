import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse24.pattern import (
    Violations,
    apply_mask_,
    check_finite,
    density,
    find_violations,
    is_nonzero,
    mask_2to4,
    prune_2to4,
    prune_into,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def brute_force_mask(group):
    """The best of the six patterns by total score; of equals the one with the lowest columns comes first."""
    patterns = itertools.combinations(range(4), 2)
    best = max(patterns, key=lambda kept: (sum(group[i] for i in kept), [-i for i in kept]))
    return [i in best for i in range(4)]


@pytest.mark.parametrize("group", list(itertools.product([0.0, 1.0, 2.0, 3.0], repeat=4)))
def test_mask_of_every_order_and_tie_equals_brute_force(group):
    # Small integers: sums are exact, and every way in which four scores can tie occurs.
    assert mask_2to4(torch.tensor([group])).tolist() == [brute_force_mask(group)]


def test_ties_keep_the_lower_column():
    assert mask_2to4(torch.ones(1, 4)).tolist() == [[True, True, False, False]]
    assert mask_2to4(torch.tensor([[1.0, 2, 2, 2]])).tolist() == [[False, True, True, False]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 10_000),
    dim=st.sampled_from([-1, -2, 0, 1]),
)
def test_pruning_keeps_the_two_largest_of_each_group(rows, groups, dtype, seed, dim):
    weight = torch.randn(rows, groups * 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if dim in (-2, 0):
        weight = weight.t()
    pruned = prune_2to4(weight, dim=dim)
    assert pruned.dtype == dtype
    assert pruned.shape == weight.shape
    assert find_violations(pruned, dim).count == 0
    kept = is_nonzero(pruned)
    assert torch.equal(pruned.float()[kept], weight.float()[kept])
    magnitudes = weight.float().abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    kept_sum = pruned.float().abs().movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1)
    # Exact: two values are summed in the same float32 arithmetic on both sides.
    assert torch.equal(kept_sum, magnitudes.sort(-1).values[..., 2:].sum(-1))


@pytest.mark.parametrize("dim", [-1, -2])
def test_three_dimensions_equal_two_for_each_expert(dim):
    weight = torch.randn(3, 8, 12)
    together = prune_2to4(weight, dim=dim)
    apart = torch.stack([prune_2to4(expert, dim=dim) for expert in weight])
    assert torch.equal(together, apart)


def test_result_does_not_depend_on_how_rows_are_cut_into_blocks(monkeypatch):
    weight = torch.randn(37, 64)
    whole = prune_2to4(weight), find_violations(weight), density(weight)
    monkeypatch.setattr("hf_sparse24.pattern._BLOCK_ELEMENTS", 100)
    assert torch.equal(prune_2to4(weight), whole[0])
    assert (find_violations(weight), density(weight)) == whole[1:]


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_negative_zero_is_made_or_kept(dtype):
    weight = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -0.0, -0.0, 5.0, -0.0]]).to(dtype)
    pruned = prune_2to4(weight)
    assert not torch.signbit(pruned.float()[pruned.float() == 0]).any()
    assert pruned.float().tolist() == [[0, 0, -3, -4, 0, 0, 5, 0]]


def test_the_argument_is_not_written_to():
    weight = torch.randn(4, 8)
    before = weight.clone()
    prune_2to4(weight)
    assert torch.equal(weight, before)


def test_scores_decide_instead_of_the_magnitude():
    weight, scores = torch.tensor([[9.0, 8, 7, 6]]), torch.tensor([[1.0, 2, 3, 4]])
    assert prune_2to4(weight, scores).tolist() == [[0, 0, 7, 6]]


def test_violations_are_counted_and_located():
    weight = torch.zeros(3, 8)
    weight[1, 4:7] = 1
    weight[2, 0:4] = -1
    assert find_violations(weight) == Violations(2, 6, (1, 4))
    assert find_violations(weight.t(), dim=0) == Violations(2, 6, (4, 1))
    stacked = torch.stack([torch.zeros(3, 8), weight])
    assert find_violations(stacked) == Violations(2, 12, (1, 1, 4))
    assert find_violations(stacked.transpose(1, 2), dim=-2) == Violations(2, 12, (1, 4, 1))


def test_negative_zeros_are_no_violation():
    assert find_violations(torch.tensor([[-0.0, 1, -0.0, 2]])).count == 0


def test_density_counts_nonzeros():
    assert density(torch.tensor([[0.0, -0.0, 1, 2]])) == 0.5


def test_width_that_is_no_multiple_of_four_is_refused():
    with pytest.raises(ValueError, match="divisible by 4; the tensor has 6"):
        mask_2to4(torch.ones(2, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(bad, dtype):
    weight = torch.randn(4, 8).to(dtype)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj holds 1 NaN or infinite"):
        check_finite(weight, "layers.0.q_proj")


def test_a_sum_that_overflows_is_not_taken_for_an_infinite_weight():
    check_finite(torch.full((4, 8), 3e38), "w")
    check_finite(torch.full((4, 8), 6e4, dtype=torch.float16), "w")


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("in_place", [True, False])
def test_pruning_into_a_target_equals_pruning(dim, in_place, monkeypatch):
    weight = torch.randn(3, 8, 12)
    expected, before = prune_2to4(weight, dim=dim), weight.clone()
    monkeypatch.setattr("hf_sparse24.pattern._BLOCK_ELEMENTS", 30)
    target = weight if in_place else torch.empty_like(weight)
    prune_into(target, weight, torch.abs, dim)
    assert torch.equal(target, expected)
    assert in_place or torch.equal(weight, before)


def test_mask_can_be_applied_alone():
    weight, mask = torch.tensor([[1.0, -2, 3, 4]]), torch.tensor([[True, False, False, True]])
    assert apply_mask_(weight, mask) is weight
    assert weight.tolist() == [[1, 0, 0, 4]]
