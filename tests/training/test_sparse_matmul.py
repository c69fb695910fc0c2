"""Sparse products in training: the same numbers as dense products with masked weights, and refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from hf_sparse24 import sparsity_report
from hf_sparse24.training.masks import Mask, pack_bits
from hf_sparse24.training.policies.transposable import transposable_mask
from hf_sparse24.training.sparse_matmul import SparseLinear

TRANSPOSABLE = {"mask_policy": "transposable", "bf16": True}


@pytest.fixture
def layer():
    """A layer whose weight is 2:4 along both dimensions, but for one that is zero where it is kept."""
    linear = torch.nn.Linear(16, 8)
    kept = transposable_mask(linear.weight.detach().abs())
    linear.weight.data.masked_fill_(~kept, 0)
    linear.weight.data[0, kept[0].nonzero()[0]] = 0
    return linear, Mask(linear, "weight", -1, linear.weight.shape, pack_bits(kept))


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (16,)])
def test_outputs_and_gradients_are_those_of_the_masked_weight(layer, shape):
    linear, mask = layer
    sparse = SparseLinear(linear, mask, torch.float32)
    results = []
    for function in (sparse, lambda x: F.linear(x, linear.weight, linear.bias)):
        linear.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = function(x)
        out.square().sum().backward()
        results.append((out, x.grad, linear.weight.grad, linear.bias.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)  # sums of 16 or 8 float32 products in another order


def test_no_gradient_is_made_that_nobody_wants(layer):
    linear, mask = layer
    linear.weight.requires_grad_(False)
    sparse = SparseLinear(linear, mask, torch.float32)
    x = torch.randn(3, 16, requires_grad=True)
    sparse(x).sum().backward()
    assert linear.weight.grad is None
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 16))


def test_a_weight_that_was_written_to_is_packed_anew(layer):
    linear, mask = layer
    sparse = SparseLinear(linear, mask, torch.float32)
    with torch.no_grad():
        linear.weight.mul_(2)
    x = torch.randn(3, 16)
    torch.testing.assert_close(sparse(x), F.linear(x, linear.weight, linear.bias))


def test_a_place_that_was_zero_is_packed_once_it_is_not(layer):
    linear, mask = layer
    sparse = SparseLinear(linear, mask, torch.float32)
    with torch.no_grad():
        linear.weight[mask.kept()] = torch.arange(1.0, 65.0)
    sparse.repack_()
    assert torch.equal(sparse(torch.eye(16)), F.linear(torch.eye(16), linear.weight, linear.bias))


def test_what_is_called_in_another_dtype_runs_dense(layer):
    linear, mask = layer
    sparse = SparseLinear(linear, mask, torch.bfloat16)
    x = torch.randn(3, 16)
    assert torch.equal(sparse(x), F.linear(x, linear.weight, linear.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_a_training_is_the_same_as_with_dense_products(kwargs, tiny_llama, train):
    trained = []
    for sparse in (False, True):
        model = copy.deepcopy(tiny_llama)
        trainer = train(model, sparse_matmul=sparse, **TRANSPOSABLE, **kwargs)
        trained.append((model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
        assert sparsity_report(model).totals["violating_groups"] == 0
        assert not any("forward" in vars(module) for module in model.model.modules())
    (dense, losses), (sparse, others) = trained
    assert losses == others
    for (name, one), other in zip(dense.state_dict().items(), sparse.state_dict().values(), strict=True):
        assert torch.equal(one, other), name  # the reference kernels multiply as dense ones do, in the same order


def test_sparse_weights_are_what_is_multiplied(tiny_llama, train, monkeypatch):
    from hf_sparse24.training import sparse_matmul

    shapes, product = [], sparse_matmul.Packed.product

    def counted(self, input, bias=None):
        shapes.append(tuple(self.values.shape))
        return product(self, input, bias)

    monkeypatch.setattr(sparse_matmul.Packed, "product", counted)
    train(tiny_llama, sparse_matmul=True, max_steps=3, **TRANSPOSABLE)
    # Of 64 x 32 and 32 x 64: gate and up forwards with the transpose of down, and the other way round.
    assert len(shapes) == 3 * 2 * 14  # steps, passes, projections
    assert shapes.count((64, 16)) == shapes.count((32, 32)) == 3 * 2 * 3
    shapes.clear()
    train(tiny_llama, sparse_matmul=True, sparse_matmul_modules=["up_proj"], max_steps=3, **TRANSPOSABLE)
    assert len(shapes) == 3 * 2 * 2


def test_evaluation_between_steps_sees_the_new_weights(tiny_llama, train):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            x = torch.randn(4, 32)
            projection = model.model.layers[0].mlp.up_proj
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                seen.append((projection(x), F.linear(x, projection.weight)))

    train(tiny_llama, sparse_matmul=True, callbacks=[Look()], **TRANSPOSABLE)
    assert len(seen) == 6
    assert all(torch.equal(one, other) for one, other in seen)


def test_a_resumed_run_goes_on_bit_equal(tiny_llama, train):
    whole = copy.deepcopy(tiny_llama)
    trainer = train(whole, sparse_matmul=True, save_strategy="steps", save_steps=3, **TRANSPOSABLE)
    again = copy.deepcopy(tiny_llama)
    train(again, resume=f"{trainer.args.output_dir}/checkpoint-3", sparse_matmul=True, **TRANSPOSABLE)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in whole.state_dict().items())


def test_a_compiled_model_trains_the_same(tiny_llama, train):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", **TRANSPOSABLE}
    dense = copy.deepcopy(tiny_llama)
    train(dense, **compiled)
    train(tiny_llama, sparse_matmul=True, **compiled)
    assert all(torch.equal(one, dense.state_dict()[name]) for name, one in tiny_llama.state_dict().items())


def test_what_cannot_be_sparse_is_refused(tiny_llama, pruned, train):
    with pytest.raises(ValueError, match=r"needs masks that are 2:4 along both dimensions; that of .*q_proj"):
        train(pruned, sparse_matmul=True, bf16=True)
    with pytest.raises(ValueError, match=r"needs products in 16 bits; these are in float32"):
        train(tiny_llama, sparse_matmul=True, mask_policy="transposable")
    with pytest.raises(ValueError, match=r"needs a mask that stays, and mask_policy 'srste' moves it"):
        train(tiny_llama, sparse_matmul=True, mask_policy="srste", bf16=True)
    with pytest.raises(ValueError, match=r"none of 14 is called as sparse_matmul_modules says"):
        train(tiny_llama, sparse_matmul=True, sparse_matmul_modules=["fc1"], **TRANSPOSABLE)


def test_a_frozen_mask_that_is_transposable_serves_as_well(tiny_llama, train):
    train(tiny_llama, mask_policy="transposable", max_steps=1)
    train(tiny_llama, sparse_matmul=True, mask_policy="frozen", bf16=True, max_steps=2)
    assert sparsity_report(tiny_llama).totals["violating_groups"] == 0
