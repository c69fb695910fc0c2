"""On a GPU: precisions with scaled gradients, fused optimizers, compiled models, and every policy."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse24 import sparsity_report
from hf_sparse24.training.masks import Mask, pack_bits
from hf_sparse24.training.policies import POLICIES
from hf_sparse24.training.policies.transposable import transposable_mask
from hf_sparse24.training.sparse_matmul import SparseLinear
from tests.training.conftest import zeros_of

pytestmark = pytest.mark.gpu
ON_GPU = {"use_cpu": False, "optim": "adamw_torch_fused", "bf16": True}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_2to4(policy, tiny_llama, pruned, train):
    model = pruned if policy == "frozen" else tiny_llama
    trainer = train(model, mask_policy=policy, max_steps=12, gradient_accumulation_steps=2, **ON_GPU)
    assert next(model.parameters()).is_cuda
    assert sparsity_report(model).totals["matrices_2to4"] == 14
    assert trainer.state.log_history[-2]["sparse24_violations"] == 0


@pytest.mark.parametrize(
    "kwargs",
    [{"bf16": False, "fp16": True}, {"torch_compile": True}, {"gradient_checkpointing": True}],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_frozen_masks_hold(kwargs, pruned, train):
    before, weights = zeros_of(pruned), copy.deepcopy(pruned.state_dict())
    train(pruned, max_steps=12, **{**ON_GPU, **kwargs})
    after = zeros_of(pruned)
    assert all(torch.equal((after[name] & before[name].cuda()).cpu(), before[name].cpu()) for name in before)
    assert any(not torch.equal(tensor.cpu(), weights[name]) for name, tensor in pruned.state_dict().items())


def test_the_compact_optimizer_trains_16_bit_weights(pruned, tiny_llama, train):
    train(pruned.to(torch.bfloat16), teacher=tiny_llama, compact_optimizer=True, max_steps=12, **ON_GPU)
    assert sparsity_report(pruned).totals["violating_groups"] == 0


def test_sparse_products_train_as_dense_ones_do(train):
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    config.vocab_size = 96
    dense = LlamaForCausalLM(config)
    sparse = copy.deepcopy(dense)
    losses = []
    for model, kwargs in ((dense, {}), (sparse, {"sparse_matmul": True})):
        trainer = train(model, mask_policy="transposable", learning_rate=1e-3, max_steps=12, **kwargs, **ON_GPU)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert sparsity_report(model).totals["violating_groups"] == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # products are rounded to bfloat16, in another order
    pairs = zip(dense.parameters(), sparse.parameters(), strict=True)
    step = torch.cat([(one - other).flatten() for one, other in pairs])
    assert step.abs().mean() < 1e-4  # of 12 steps of up to 1e-3; signs of tiny gradients differ


def test_sparse_products_give_the_gradients_of_the_masked_weight():
    linear = torch.nn.Linear(512, 256, device="cuda")
    kept = transposable_mask(linear.weight.detach().abs())
    linear.weight.data.masked_fill_(~kept, 0)
    mask = Mask(linear, "weight", -1, linear.weight.shape, pack_bits(kept))
    sparse = SparseLinear(linear, mask, torch.bfloat16)
    results = []
    for function in (sparse, linear):
        linear.zero_grad()
        x = torch.randn(3, 37, 512, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = function(x)
        out.square().sum().backward()
        results.append((out, x.grad, linear.weight.grad, linear.bias.grad))
    for one, other in zip(*results, strict=True):
        # Sums of 512 products, of 256 and of 111, rounded to bfloat16 on the way: eight bits.
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_masked_adapters_merge_2to4(pruned, train):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    from hf_sparse24.training.lora import add_masked_lora

    adapted = add_masked_lora(pruned, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    train(adapted, **ON_GPU)
    assert sparsity_report(adapted.merge_and_unload()).totals["violating_groups"] == 0
