"""A training that was killed in the middle of an epoch goes on bit-equal."""

import copy
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_sparse24 import Sparse24Callback, Sparse24Config, Sparse24Trainer, prune_, sparsity_report
from hf_sparse24.training.state import FILE
from tests.families import build
from tests.training.conftest import KillAt, Killed, Rows, zeros_of

POLICIES = {
    "frozen": {},
    "srste": {"refresh_steps": 2, "decay": 0.1},
    "masked_decay": {"refresh_steps": 1, "decay": 0.1, "until": 0.7},
    "admm": {"refresh_steps": 2, "penalty": 0.5},
    "transposable": {},
    "learned": {},
}


def llama():
    model = build("llama", attention_dropout=0.2)
    prune_(model, Sparse24Config(method="magnitude"))
    return model


def assert_equal(one, other):
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


def interrupted(make, train, tmp_path, **kwargs):
    """Train once through, and once with a kill after a checkpoint; return both models and the second trainer."""
    kwargs = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, **kwargs}
    whole = make()
    train(whole, **kwargs)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(Killed):
        train(make(), callbacks=[KillAt(4)], **kwargs)
    resumed = make()
    trainer = train(resumed, resume=True, **kwargs)
    assert trainer.state.global_step == 8
    return whole, resumed, trainer


@pytest.mark.parametrize("policy", POLICIES)
def test_a_killed_training_goes_on_bit_equal(policy, train, tmp_path):
    make = llama if policy == "frozen" else lambda: build("llama", attention_dropout=0.2)
    kwargs = {"mask_policy": policy, "mask_policy_args": POLICIES[policy], "gradient_accumulation_steps": 2}
    whole, resumed, _ = interrupted(make, train, tmp_path, **kwargs)
    assert_equal(whole, resumed)
    assert sparsity_report(resumed).totals["violating_groups"] == 0
    start = make().state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in whole.state_dict().items())


def test_with_compact_optimizer_too(train, tmp_path):
    whole, resumed, _ = interrupted(llama, train, tmp_path, compact_optimizer=True)
    assert_equal(whole, resumed)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_renamed_and_split_weights_are_restored(family, train, tmp_path):
    def make():
        model = build(family)
        prune_(model, Sparse24Config(method="magnitude"))
        return model

    whole, resumed, _ = interrupted(make, train, tmp_path)
    assert_equal(whole, resumed)


def test_a_trainer_that_does_not_restore_them_is_found_out(arguments, rows, tmp_path):
    def train(resume=None):
        model = build("mixtral")
        prune_(model, Sparse24Config(method="magnitude"))
        args = arguments(save_strategy="steps", save_steps=3)
        Trainer(model, args, train_dataset=rows, callbacks=[Sparse24Callback()]).train(resume_from_checkpoint=resume)

    train()
    with pytest.raises(RuntimeError, match=r"experts.* was not restored .* Use Sparse24Trainer"):
        train(str(tmp_path / "run" / "checkpoint-3"))


def test_a_trainer_that_does_not_load_the_best_is_found_out(arguments, rows):
    model = build("mixtral")
    prune_(model, Sparse24Config(method="magnitude"))
    kwargs = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    kwargs |= {"learning_rate": 0.3, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    args = arguments(load_best_model_at_end=True, **kwargs)
    with pytest.raises(RuntimeError, match=r"was not restored .* Use Sparse24Trainer"):
        Trainer(model, args, train_dataset=rows, eval_dataset=Rows(8), callbacks=[Sparse24Callback()]).train()


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 2}


def test_a_vision_transformer_is_restored(arguments, tmp_path):
    def train(model, resume=None, callbacks=(), **kwargs):
        trainer = Sparse24Trainer(model, arguments(**kwargs), train_dataset=Images(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def make():
        model = build("vit")
        prune_(model, Sparse24Config(method="magnitude"))
        return model

    whole, resumed, _ = interrupted(make, train, tmp_path)
    assert_equal(whole, resumed)


def test_the_best_of_a_mixture_of_experts_is_loaded(train):
    model = build("mixtral")
    prune_(model, Sparse24Config(method="magnitude"))
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen[state.global_step] = copy.deepcopy(model.state_dict())

    kwargs = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    kwargs |= {"learning_rate": 0.3, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    trainer = train(model, eval_dataset=Rows(8), load_best_model_at_end=True, callbacks=[Keep()], **kwargs)
    assert trainer.state.best_global_step < 6
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[trainer.state.best_global_step][name]), name


def test_the_best_model_of_a_moving_mask_has_its_own_mask(tiny_llama, train):
    kwargs = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    kwargs |= {"learning_rate": 0.3, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    kwargs |= {"mask_policy": "srste", "mask_policy_args": {"refresh_steps": 1}}
    trainer = train(tiny_llama, eval_dataset=Rows(8), load_best_model_at_end=True, **kwargs)
    assert trainer.state.best_global_step == 2
    assert sparsity_report(tiny_llama).totals["violating_groups"] == 0
    trainer.save_model()


def test_every_checkpoint_is_2to4_whatever_the_policy(tiny_llama, train, tmp_path):
    kwargs = {"mask_policy": "admm", "mask_policy_args": {"refresh_steps": 2}}
    train(tiny_llama, save_strategy="steps", save_steps=3, **kwargs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert sparsity_report(loaded).totals["violating_groups"] == 0
    assert sparsity_report(loaded).totals["matrices_2to4"] == 14
    assert loaded.config.sparse24["training"] == {"mask_policy": "admm"}


def test_without_the_file_frozen_masks_come_from_zeros_and_others_are_refused(train, tmp_path, pruned):
    before = zeros_of(pruned)
    train(pruned, save_strategy="steps", save_steps=3)
    (tmp_path / "run" / "checkpoint-3" / FILE).unlink()
    train(pruned, resume=str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(zeros_of(pruned)[name] & before[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="'srste' cannot resume"):
        train(pruned, resume=str(tmp_path / "run" / "checkpoint-3"), mask_policy="srste")


def test_another_length_is_refused_where_the_schedule_depends_on_it(train, tmp_path, tiny_llama, pruned):
    train(tiny_llama, save_strategy="steps", save_steps=3, mask_policy="admm")
    with pytest.raises(ValueError, match="of a training of 6 steps; this one has 9"):
        train(tiny_llama, resume=str(tmp_path / "run" / "checkpoint-3"), mask_policy="admm", max_steps=9)
    shutil.rmtree(tmp_path / "run")
    train(pruned, save_strategy="steps", save_steps=3)
    assert train(pruned, resume=str(tmp_path / "run" / "checkpoint-3"), max_steps=9).state.global_step == 9


def test_another_policy_is_refused(train, tmp_path, pruned):
    train(pruned, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="saved with mask_policy 'frozen'; this run has 'admm'"):
        train(pruned, resume=str(tmp_path / "run" / "checkpoint-3"), mask_policy="admm")
