"""The compact optimizer against AdamW, and the bytes that it takes."""

import copy

import pytest
import torch

from hf_sparse24.pattern import mask_2to4
from hf_sparse24.training.compact import CompactAdamW


def test_in_float32_it_does_what_adamw_does(pruned, train):
    other = copy.deepcopy(pruned)
    train(pruned, compact_optimizer=True, max_grad_norm=1.0, optim="adamw_torch")
    train(other, max_grad_norm=1.0, optim="adamw_torch")
    for (name, tensor), twin in zip(pruned.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, twin, msg=name, rtol=1e-5, atol=1e-7)


def test_in_bfloat16_steps_below_the_last_bit_add_up():
    weight = torch.nn.Parameter(torch.ones(1, 4, dtype=torch.bfloat16))
    kept = mask_2to4(torch.tensor([[2.0, 0, 1, 0]]))
    weight.data.mul_(kept)
    optimizer = CompactAdamW([{"params": [weight]}], {weight: kept}, lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.tolist() == [[pytest.approx(0.98, abs=4e-3), 0.0, pytest.approx(0.98, abs=4e-3), 0.0]]
    plain = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    adam = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        plain.grad = torch.ones_like(plain)
        adam.step()
    assert plain.item() == 1.0  # what it is for


def test_it_takes_six_bytes_a_weight_and_a_half_for_the_columns():
    weight = torch.nn.Parameter(torch.randn(64, 128, dtype=torch.bfloat16))
    kept = mask_2to4(weight.detach().abs())
    optimizer = CompactAdamW([{"params": [weight]}], {weight: kept})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.grad is None
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    (_, master, columns), *_ = optimizer._pairs
    assert (moments + master.nbytes) / weight.numel() == 6
    assert columns.nbytes / weight.numel() == 0.5


def test_it_refuses_what_it_cannot_do(pruned, train):
    with pytest.raises(ValueError, match="compact_optimizer is AdamW; got optim="):
        train(pruned, compact_optimizer=True, optim="sgd")
    with pytest.raises(ValueError, match="keeps nothing of pruned weights"):
        train(pruned, compact_optimizer=True, mask_policy="admm")
