"""Each mask policy by the property that defines it, on a problem whose answer is known."""

import copy
from itertools import combinations

import pytest
import torch
import transformers
from transformers import TrainerCallback

from hf_sparse24 import Sparse24Config, Sparse24Trainer, prune_, sparsity_report
from hf_sparse24.pattern import find_violations, mask_2to4
from hf_sparse24.training.policies import POLICIES, Weight, make_policy
from hf_sparse24.training.policies.transposable import transposable_mask, transposable_patterns

PATTERNS = torch.tensor([[float(column in pair) for column in range(4)] for pair in combinations(range(4), 2)])


def train(policy, start, loss, steps, optimizer=torch.optim.SGD, lr=0.1, mask=None):
    """Run a policy as the callback does, on one matrix; return it, and how many weights flipped in each step."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = optimizer([parameter], lr=lr)
    policy.total_steps = steps
    weight = Weight("w", parameter.detach(), None, ~(mask_2to4(start.abs()) if mask is None else mask), -1)
    policy.start(weight)
    flips = []
    for step in range(1, steps + 1):
        fixed = policy.is_fixed(step)
        if not fixed:
            policy.before_forward_(weight, step)
        optimizer.zero_grad()
        loss(parameter).backward()
        weight.gradient = parameter.grad
        before = weight.pruned
        if fixed:
            parameter.grad.masked_fill_(weight.pruned, 0)
            optimizer.step()
            weight.values.masked_fill_(weight.pruned, 0)
        else:
            policy.before_step_(weight, step, lr)
            if policy.trains_weights:
                optimizer.step()
            policy.after_step_(weight, step)
        flips.append(int((before != weight.pruned).sum()))
        assert find_violations(parameter.detach()).count == 0
    return parameter.detach(), flips


def correlated_problem(rows=64):
    """Return quadratic losses with their minima, one a row of four weights, and each row's best 2:4 loss."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(rows, 4, 6, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.mT / 6 + 0.05 * torch.eye(4)
    minimum = torch.randn(rows, 4, generator=generator, dtype=torch.float64)

    def losses(w):
        return 0.5 * torch.einsum("ri,rij,rj->r", w - minimum, hessian, w - minimum)

    def restricted(pattern):
        kept = pattern.bool()
        solution = torch.zeros_like(minimum)
        right = (hessian @ minimum[..., None])[:, kept]
        solution[:, kept] = torch.linalg.solve(hessian[:, kept][:, :, kept], right)[..., 0]
        return losses(solution)

    return losses, minimum, torch.stack([restricted(pattern) for pattern in PATTERNS])


def test_frozen_ends_in_the_best_weights_of_its_mask():
    losses, minimum, by_pattern = correlated_problem()
    mask = mask_2to4(minimum.abs())
    chosen = (mask.double() @ PATTERNS.T.double()).argmax(-1)
    found, flips = train(make_policy("frozen"), minimum, lambda w: losses(w).sum(), 3000, mask=mask)
    assert sum(flips) == 0
    torch.testing.assert_close(losses(found), by_pattern[chosen, torch.arange(64)], atol=1e-6, rtol=1e-6)


def test_srste_finds_the_right_mask_from_a_wrong_one():
    start, target = torch.tensor([[1.0, 0.9, 0.1, 0.05]]), torch.tensor([[0.0, 0.0, 2.0, -3.0]])
    policy = make_policy("srste", decay=0.1, ramp_steps=50, refresh_steps=5)
    found, flips = train(policy, start, lambda w: 0.5 * (w - target).square().sum(), 400)
    torch.testing.assert_close(found, target, atol=1e-5, rtol=0)
    assert sum(flips) == 4
    frozen, _ = train(make_policy("frozen"), start, lambda w: 0.5 * (w - target).square().sum(), 400)
    assert (frozen[0, 2:] == 0).all()
    assert [policy.decay_at(step) for step in (1, 25, 50, 400)] == pytest.approx([0.002, 0.05, 0.1, 0.1])


def test_masked_decay_shrinks_pruned_weights_and_no_others_and_masks_flip_less():
    start = torch.tensor([[1.0, 0.9, 0.4, -0.2]], dtype=torch.float64)
    policy = make_policy("masked_decay", decay=0.5, refresh_steps=1)
    policy.total_steps = 100
    weight = Weight("w", start.clone(), torch.zeros_like(start), ~mask_2to4(start.abs()), -1)
    policy.start(weight)
    for step in range(1, 11):
        weight.gradient.zero_()
        policy.before_step_(weight, step, 0.1)
        weight.values.sub_(weight.gradient, alpha=0.1)
        policy.after_step_(weight, step)
    expected = torch.tensor([[0.0, 0.0, 0.4, -0.2]], dtype=torch.float64) * (1 - 0.1 * 0.5) ** 10
    torch.testing.assert_close(weight.state["pruned_values"], expected)
    assert weight.values.tolist() == [[1.0, 0.9, 0.0, 0.0]]

    def flips(decay):
        noise = torch.Generator().manual_seed(0)
        wanted = torch.tensor([[1.0, 0.5, 0.45, 0.1]]).repeat(256, 1)
        policy = make_policy("masked_decay", decay=decay, refresh_steps=1)

        def noisy(w):
            return (0.5 * (w - wanted).square() + w * torch.randn(w.shape, generator=noise)).sum()

        return sum(train(policy, wanted, noisy, 200, lr=0.05)[1][100:])

    few, many = flips(1.0), flips(0.0)
    assert 0 < few < 0.7 * many


def test_masked_decay_may_end_dense_with_what_is_left_of_pruned_weights():
    start = torch.tensor([[1.0, 0.9, 0.4, -0.2]])
    policy = make_policy("masked_decay", decay=0.5, dense_tail=0.25)
    policy.total_steps = 8
    weight = Weight("w", start.clone(), torch.zeros_like(start), ~mask_2to4(start.abs()), -1)
    policy.start(weight)
    for step in range(1, 7):
        assert weight.values.tolist() == [[1.0, pytest.approx(0.9), 0.0, 0.0]]
        weight.gradient.zero_()
        policy.before_step_(weight, step, 0.1)
        weight.values.sub_(weight.gradient, alpha=0.1)
        kept = policy.after_step_(weight, step)
    assert policy.is_fixed(7)
    assert kept.all()
    assert not weight.state
    torch.testing.assert_close(weight.values, start * torch.tensor([1, 1, 0.95**6, 0.95**6]))


def test_a_dense_tail_ends_in_a_dense_model_through_the_trainer(tiny_llama, train):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(find_violations(model.model.layers[0].mlp.up_proj.weight.detach()).count > 0)

    kwargs = {"mask_policy": "masked_decay", "mask_policy_args": {"dense_tail": 0.5, "refresh_steps": 1}}
    kwargs |= {"save_strategy": "steps", "save_steps": 2}
    again = copy.deepcopy(tiny_llama)
    trainer = train(tiny_llama, callbacks=[Look()], **kwargs)
    assert seen == [False, False, True, True, True, True]  # the third step leaves what the tail begins with
    assert trainer.state.log_history[-2]["sparse24_density"] > 0.99
    assert not hasattr(tiny_llama.config, "sparse24")
    for step in (2, 4):
        resumed = copy.deepcopy(again)
        train(resumed, resume=f"{trainer.args.output_dir}/checkpoint-{step}", **kwargs)
        assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in tiny_llama.state_dict().items())


def test_admm_finds_better_masks_than_magnitude():
    losses, minimum, by_pattern = correlated_problem()
    best, rows = by_pattern.min(0).values, torch.arange(64)
    of_magnitude = by_pattern[(mask_2to4(minimum.abs()).double() @ PATTERNS.T.double()).argmax(-1), rows]
    policy = make_policy("admm", penalty=1.0, refresh_steps=20, until=0.75)
    found, flips = train(policy, minimum, lambda w: losses(w).sum(), 4000)

    def best_share(loss):
        return torch.isclose(loss, best, atol=1e-4).double().mean()

    assert (losses(found) - best).min() > -1e-6
    assert (losses(found) - best).sum() < 0.4 * (of_magnitude - best).sum()
    assert best_share(losses(found)) > best_share(of_magnitude) + 0.05
    assert sum(flips[3000:]) == 0  # projected for good


def test_admm_draws_weights_to_their_projection():
    start = torch.tensor([[1.0, 0.9, 0.8, -0.7]])
    policy = make_policy("admm", penalty=0.5, refresh_steps=10)
    policy.total_steps = 10**9
    weight = Weight("w", start.clone(), torch.zeros_like(start), ~mask_2to4(start.abs()), -1)
    policy.start(weight)
    for step in range(1, 200):  # without a loss
        policy.before_forward_(weight, step)
        weight.gradient.zero_()
        policy.before_step_(weight, step, 0.1)
        weight.values.sub_(weight.gradient, alpha=0.1)
        policy.after_step_(weight, step)
    assert weight.values.count_nonzero() == 2
    assert weight.state["pruned_values"].abs().max() < 1e-2


def test_transposable_is_the_best_of_all_masks_that_are_2to4_both_ways():
    patterns = transposable_patterns()
    assert patterns.shape == (90, 16)
    assert len({tuple(row.tolist()) for row in patterns}) == 90
    tiles = patterns.view(90, 4, 4)
    assert tiles.sum(1).eq(2).all()
    assert tiles.sum(2).eq(2).all()
    scores = torch.rand(8, 12)
    mask = transposable_mask(scores)
    for row in range(0, 8, 4):
        for column in range(0, 12, 4):
            tile = (slice(row, row + 4), slice(column, column + 4))
            best = max(float((scores[tile] * pattern).sum()) for pattern in tiles)  # by brute force
            assert float((scores[tile] * mask[tile]).sum()) == pytest.approx(best)
    with pytest.raises(ValueError, match="both dimensions divisible by 4; this one is 6 x 8"):
        transposable_mask(torch.rand(6, 8))


def test_a_transposable_mask_survives_training(tiny_llama, arguments, rows):
    Sparse24Trainer(tiny_llama, arguments(mask_policy="transposable"), train_dataset=rows).train()
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight.detach()
    assert find_violations(weight).count == 0
    assert find_violations(weight.T.contiguous()).count == 0


def test_learned_masks_find_the_best_pattern_from_a_wrong_prior_and_leave_the_weights():
    generator = torch.Generator().manual_seed(0)
    dense, target = (torch.randn(64, 4, generator=generator) for _ in range(2))
    by_pattern = ((dense[:, None] * PATTERNS - target[:, None]) ** 2).sum(-1)
    best = by_pattern.argmin(-1)
    margin = by_pattern.sort(-1).values
    clear = (margin[:, 1] - margin[:, 0]) > 0.2
    worst = PATTERNS[by_pattern.argmax(-1)].bool()
    loss = lambda w: (w - target).square().sum()  # noqa: E731
    found, _ = train(make_policy("learned"), dense, loss, 600, lr=1e-2, mask=worst)
    chosen = (found != 0).float() @ PATTERNS.T
    assert (chosen.argmax(-1) == best)[clear].float().mean() == 1
    assert torch.equal(found, dense * (found != 0))


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.moves])
def test_moving_masks_end_2to4_through_the_trainer_from_a_dense_model(name, tiny_llama, train):
    trainer = train(tiny_llama, mask_policy=name, max_steps=12, bf16=True, gradient_accumulation_steps=2)
    assert sparsity_report(tiny_llama).totals["matrices_2to4"] == 14
    assert any(entry.get("sparse24_flips") for entry in trainer.state.log_history)
    assert {entry["sparse24_violations"] for entry in trainer.state.log_history if "loss" in entry} == {0}


def test_the_first_masks_come_from_a_prior(tiny_llama, train, tmp_path):
    pruned = copy.deepcopy(tiny_llama)
    for parameter in pruned.parameters():  # other magnitudes, other masks
        parameter.data = torch.randn_like(parameter)
    prune_(pruned, Sparse24Config(method="magnitude"))
    pruned.save_pretrained(tmp_path / "prior")
    kwargs = {"mask_prior": str(tmp_path / "prior"), "max_steps": 2, "learning_rate": 1e-9}
    train(tiny_llama, mask_policy="learned", **kwargs)
    for (name, weight), prior in zip(tiny_llama.named_parameters(), pruned.parameters(), strict=True):
        if "proj" in name:
            assert ((weight != 0) == (prior != 0)).float().mean() > 0.9  # a few logits are ahead by chance


def test_unknown_policies_and_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="mask_policy must be one of 'frozen', 'srste'"):
        make_policy("dynamic")
    with pytest.raises(ValueError, match="mask_policy must be one of 'frozen', 'srste'"):
        arguments(mask_policy="dynamic")
    with pytest.raises(ValueError, match="'admm' takes penalty, refresh_steps, until; got 'decay'"):
        arguments(mask_policy="admm", mask_policy_args='{"decay": 1}')
    with pytest.raises(ValueError, match="'admm' takes penalty, refresh_steps, until; got 'decay'"):
        make_policy("admm", decay=1)
    with pytest.raises(ValueError, match="until must be a share"):
        make_policy("admm", until=2)
    with pytest.raises(ValueError, match="dense_tail must be a share"):
        make_policy("masked_decay", dense_tail=1)
    with pytest.raises(ValueError, match=r"leave out until=0\.5"):
        make_policy("masked_decay", dense_tail=0.2, until=0.5)


@pytest.mark.parametrize(
    ("policy", "kwargs", "said"),
    [
        (
            "admm",
            {"mask_policy_args": {"refresh_steps": 1}, "learning_rate": 1e-6},
            "pruned weights of mean magnitude",
        ),
        ("admm", {"mask_policy_args": {"refresh_steps": 4}}, "lower refresh_steps"),
        ("srste", {"mask_policy_args": {"ramp_steps": 100}}, "the decay grows for 100 steps and the mask moves for 6"),
        ("masked_decay", {"learning_rate": 1e-6}, "train longer"),
    ],
)
def test_a_training_too_short_for_its_policy_is_warned_about(policy, kwargs, said, tiny_llama, train, caplog):
    transformers.utils.logging.enable_propagation()
    train(tiny_llama, mask_policy=policy, **kwargs)
    transformers.utils.logging.disable_propagation()
    assert f"mask_policy '{policy}' cannot finish" in caplog.text
    assert said in caplog.text


def test_a_training_that_is_long_enough_is_not(tiny_llama, train, caplog):
    transformers.utils.logging.enable_propagation()
    train(tiny_llama, mask_policy="admm", mask_policy_args={"refresh_steps": 1}, learning_rate=0.1)
    transformers.utils.logging.disable_propagation()
    assert "cannot finish" not in caplog.text


def test_half_precision_with_scaled_gradients_is_refused_for_moving_masks(tiny_llama, train):
    with pytest.raises(ValueError, match="fp16=True scales"):
        train(tiny_llama, mask_policy="srste", fp16=True)
