"""Adapters on pruned models: merged they stay 2:4, and what they compute is what they merge to."""

import copy

import pytest
import torch

from hf_sparse24 import Sparse24Config, Sparse24Trainer, pack_, prune_, sparsity_report

peft = pytest.importorskip("peft", reason="adapters are peft's")

from hf_sparse24.training.lora import add_masked_lora, load_masked_lora, merge_and_prune_  # noqa: E402
from tests.training.conftest import KillAt, Killed  # noqa: E402


def config(**kwargs):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **kwargs)


def trained(model, train, **kwargs):
    train(model, max_steps=4, learning_rate=5e-2, **kwargs)
    return model


def test_masked_adapters_merge_without_a_loss_and_stay_2to4(pruned, train, tokens):
    base = copy.deepcopy(pruned.state_dict())
    adapted = trained(add_masked_lora(pruned, config()), train)
    expected = adapted.eval()(tokens).logits
    merged = adapted.merge_and_unload()
    assert sparsity_report(merged).totals["violating_groups"] == 0
    assert sparsity_report(merged).totals["matrices_2to4"] == 14
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    moved = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"}
    for name in moved:
        assert ((merged.state_dict()[name] != 0) <= (base[name] != 0)).all()


def test_layers_that_are_dense_take_plain_adapters(tiny_llama, train, tokens):
    prune_(tiny_llama, Sparse24Config(method="magnitude", modules_to_not_convert=["q_proj"]))
    adapted = trained(add_masked_lora(tiny_llama, config()), train)
    expected = adapted.eval()(tokens).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert sparsity_report(merged).totals["matrices_2to4"] == 12


def test_the_gradient_is_that_of_the_masked_weight(pruned):
    adapted = add_masked_lora(pruned, config())
    layer = adapted.base_model.model.model.layers[0].mlp.down_proj
    for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 64)
    kept = layer.base_layer.weight != 0
    a, b = (module["default"].weight.detach().clone().requires_grad_() for module in (layer.lora_A, layer.lora_B))
    expected = torch.nn.functional.linear(x, layer.base_layer.weight + 2 * kept * (b @ a))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, a.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_plain_adapters_fill_zeros_and_pruning_them_again_says_what_it_lost(pruned, train):
    before = pruned.model.layers[0].mlp.down_proj.weight.detach().clone()
    adapted = trained(peft.get_peft_model(pruned, config()), train)
    delta = adapted.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default").detach()
    filled = copy.deepcopy(adapted).merge_and_unload()
    assert sparsity_report(filled).totals["violating_groups"] > 0
    merged, losses = merge_and_prune_(adapted)
    assert sparsity_report(merged).totals["violating_groups"] == 0
    by_name = {loss.name: loss.relative_error for loss in losses}
    assert len(by_name) == 4
    after = merged.model.layers[0].mlp.down_proj.weight
    expected = (before + delta - after).norm() / delta.norm()
    assert by_name["model.layers.0.mlp.down_proj"] == pytest.approx(float(expected), rel=1e-4)
    assert 0.3 < by_name["model.layers.0.mlp.down_proj"] < 1


def test_of_masked_adapters_pruning_again_loses_nothing(pruned, train):
    _, losses = merge_and_prune_(trained(add_masked_lora(pruned, config()), train))
    assert {loss.relative_error for loss in losses} == {0.0}


def test_saved_masked_adapters_are_read_with_their_masks(pruned, train, tokens, tmp_path):
    base = copy.deepcopy(pruned)
    adapted = trained(add_masked_lora(pruned, config()), train)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_masked_lora(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(tokens).logits, adapted.eval()(tokens).logits)


def test_a_killed_training_of_adapters_goes_on_bit_equal(pruned, train):
    models = [add_masked_lora(copy.deepcopy(pruned), config()) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    train(models[0], **kwargs)
    with pytest.raises(Killed):
        train(models[1], callbacks=[KillAt(3)], **kwargs)
    train(models[2], resume=True, **kwargs)
    for (name, tensor), twin in zip(models[0].state_dict().items(), models[2].state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


def test_adapters_learn_from_a_dense_teacher(pruned, tiny_llama, arguments, rows):
    adapted = add_masked_lora(pruned, config())
    args = arguments(label_weight=0, hidden_weight=0.1)
    trainer = Sparse24Trainer(adapted, args, train_dataset=rows, teacher_model=tiny_llama)
    trainer.train()
    assert "distill_logit_loss" in trainer.state.log_history[0]
    assert sparsity_report(adapted.merge_and_unload()).totals["violating_groups"] == 0


def test_the_base_with_adapters_off_teaches_what_a_copy_of_it_teaches(pruned, arguments, rows):
    copied = copy.deepcopy(pruned)
    dropout = config(lora_dropout=0.1)
    models, losses = [], []
    for teacher, off in ((copied, False), (None, True)):
        torch.manual_seed(0)
        adapted = add_masked_lora(copy.deepcopy(pruned), dropout)
        args = arguments(teacher_adapters_off=off, logging_steps=1, learning_rate=5e-2, gradient_checkpointing=True)
        trainer = Sparse24Trainer(adapted, args, train_dataset=rows, teacher_model=teacher)
        trainer.train()
        models.append(adapted)
        losses.append([entry["distill_logit_loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(0, abs=1e-6)  # adapters begin with no effect
    assert losses[0][-1] > 1e-5  # what was learned from labels
    for (name, tensor), twin in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


def test_a_model_without_adapters_cannot_be_its_own_teacher(pruned, tiny_llama, train):
    with pytest.raises(ValueError, match="needs a model with adapters; LlamaForCausalLM has none"):
        train(pruned, teacher_adapters_off=True)
    with pytest.raises(ValueError, match="There can be one teacher"):
        train(add_masked_lora(pruned, config()), teacher=tiny_llama, teacher_adapters_off=True)


def test_what_has_no_mask_is_refused(tiny_llama, pruned):
    with pytest.raises(ValueError, match="no adapted module is 2:4"):
        add_masked_lora(tiny_llama, config())
    with pytest.raises(ValueError, match="leave out use_dora"):
        add_masked_lora(pruned, config(use_dora=True))


def test_packed_bases_take_adapters_for_inference(pruned, tokens):
    expected = pruned(tokens).logits
    pack_(pruned)
    adapted = peft.get_peft_model(pruned, config(init_lora_weights=True))
    torch.testing.assert_close(adapted(tokens).logits, expected)
