"""On a GPU: precisions with scaled gradients, fused optimizers, compiled models, and every policy."""

import copy

import pytest
import torch

from hf_sparse24 import sparsity_report
from hf_sparse24.training.policies import POLICIES
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


def test_masked_adapters_merge_2to4(pruned, train):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    from hf_sparse24.training.lora import add_masked_lora

    adapted = add_masked_lora(pruned, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    train(adapted, **ON_GPU)
    assert sparsity_report(adapted.merge_and_unload()).totals["violating_groups"] == 0
