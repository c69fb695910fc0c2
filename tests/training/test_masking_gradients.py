"""Gradients of pruned weights are zero when a backward pass is over, whatever else writes them at its end."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_sparse24.training.masks import Masks
from hf_sparse24.training.policies import make_policy


@pytest.fixture
def masks(pruned):
    found = Masks.of(pruned, lambda _, weight, dim: make_policy("frozen").search(weight.abs(), dim))
    found.mask_gradients()
    return found


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def assert_masked(masks):
    for name, mask in masks.items():
        gradient = mask.parameter.grad
        assert gradient[mask.pruned()].eq(0).all(), name
        assert gradient[mask.kept()].ne(0).any(), name


def test_they_are_masked_in_each_pass_that_accumulates(pruned, masks, tokens):
    for _ in range(2):
        loss_of(pruned, tokens).backward()
        assert_masked(masks)


def test_they_are_masked_after_a_pass_that_failed(pruned, masks, tokens):
    def fail(gradient):
        raise FloatingPointError("in the middle of a backward pass")

    handle = pruned.model.layers[0].mlp.down_proj.weight.register_hook(fail)
    with pytest.raises(FloatingPointError):
        loss_of(pruned, tokens).backward()
    handle.remove()
    loss_of(pruned, tokens).backward()
    assert_masked(masks)


def test_a_pass_inside_of_a_pass(pruned, masks):
    hidden = torch.randn(1, 4, pruned.config.hidden_size, requires_grad=True)
    mlp = pruned.model.layers[0].mlp
    (mlp(checkpoint(mlp, hidden, use_reentrant=True))).sum().backward()
    own = {name: mask for name, mask in masks.items() if "layers.0.mlp" in name}
    assert_masked(own)


def test_a_hook_that_is_called_outside_of_a_pass(pruned, masks):
    (hook,) = {*next(iter(masks.values())).parameter._post_accumulate_grad_hooks.values()}
    for mask in masks.values():
        mask.parameter.grad = torch.ones(mask.shape)
    hook(next(iter(masks.values())).parameter)
    assert_masked(masks)


def test_ddp_writes_gradients_back_before_they_are_masked(pruned, masks, tokens, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(pruned, gradient_as_bucket_view=False)
        loss_of(model, tokens).backward()
        assert_masked(masks)
    finally:
        dist.destroy_process_group()
