"""Masks never leak: every optimizer, precision and way to accumulate that a Trainer has."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.optim import Optimizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sparse24 import Sparse24Callback, Sparse24Config, Sparse24Trainer, pack_, prune_, sparsity_report
from hf_sparse24.pattern import find_violations, mask_2to4
from hf_sparse24.training.masks import Mask, Masks, pack_bits
from tests.families import build
from tests.training.conftest import Rows, zeros_of


class Orthogonalising(Optimizer):
    """Moves every weight whatever its gradient, as Muon and other optimizers of whole matrices do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(torch.ones_like(parameter), alpha=-group["lr"])


def assert_held(model, before):
    after = zeros_of(model)
    assert all(torch.equal(after[name] & before[name], before[name]) for name in before)
    assert sparsity_report(model).totals["violating_groups"] == 0


@pytest.mark.parametrize("adapters", [False, True])
def test_a_packed_model_is_told_to_be_unpacked(pruned, arguments, rows, adapters):
    pack_(pruned)
    if adapters:
        peft = pytest.importorskip("peft")
        pruned = peft.get_peft_model(pruned, peft.LoraConfig(target_modules=["q_proj"]))
    message = (
        r"needs the dense weights of a model, and 14 layers of \w+ are packed\. Prune with pack=False or call unpack_"
    )
    for kwargs in ({}, {"model": pruned}):
        with pytest.raises(ValueError, match=message):
            Sparse24Trainer(*([] if kwargs else [pruned]), args=arguments(), train_dataset=rows, **kwargs)
    if adapters:  # which Trainer trains, without any mask
        trainer = Trainer(pruned, arguments(), train_dataset=rows, callbacks=[Sparse24Callback()])
        with pytest.raises(ValueError, match=message):
            trainer.train()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"optim": "adamw_torch_fused"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_grad_norm": 0.0},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "adamw",
)
def test_pruned_weights_stay_zero_and_the_others_move(pruned, train, kwargs):
    before, weights = zeros_of(pruned), copy.deepcopy(pruned.state_dict())
    trainer = train(pruned, **kwargs)
    assert_held(pruned, before)
    moved = [not torch.equal(value, weights[name]) for name, value in pruned.state_dict().items()]
    assert all(moved)
    assert trainer.state.log_history[-2]["sparse24_violations"] == 0


def test_an_optimizer_that_moves_every_weight_is_masked_after_its_step(pruned, arguments, rows):
    before = zeros_of(pruned)
    optimizer = Orthogonalising(list(pruned.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    Trainer(
        pruned, arguments(), train_dataset=rows, optimizers=(optimizer, scheduler), callbacks=[Sparse24Callback()]
    ).train()
    assert_held(pruned, before)


@pytest.fixture
def wider():
    """A pruned model whose matrices have 4096 weights and more: optimizers keep smaller ones in 32 bits."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    )
    prune_(model, Sparse24Config(method="magnitude"))
    return model


@pytest.mark.parametrize(
    ("package", "optim"),
    [("torchao", "adamw_torch_8bit"), ("bitsandbytes", "adamw_bnb_8bit"), ("bitsandbytes", "paged_adamw_8bit")],
)
def test_an_optimizer_of_eight_bits(package, optim, wider, train):
    pytest.importorskip(package, reason=f"{optim} is {package}'s")
    before, weights = zeros_of(wider), copy.deepcopy(wider.state_dict())
    trainer = train(wider, optim=optim, learning_rate=1e-3)
    assert_held(wider, before)
    assert not torch.equal(wider.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"])
    state = trainer.optimizer.state[wider.model.layers[0].mlp.up_proj.weight]
    moments = [value for value in state.values() if isinstance(value, torch.Tensor) and value.shape == (128, 64)]
    assert len(moments) == 2
    assert all(getattr(moment, "codes", moment).dtype == torch.uint8 for moment in moments)


class Scaled(Sparse24Trainer):
    """On a CPU: float16 with scaled gradients, as accelerate does it on GPUs; the scale begins too high."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        self.scales = []

    def training_step(self, *args, **kwargs):
        self.scales.append(self.accelerator.scaler.get_scale())
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense products", "sparse products"])
def test_masks_hold_through_steps_that_a_gradient_scaler_skips(optim, sparse, pruned, tiny_llama, arguments, rows):
    model = tiny_llama if sparse else pruned
    kwargs = {"mask_policy": "transposable", "sparse_matmul": True} if sparse else {}
    args = arguments(fp16=True, optim=optim, max_steps=12, learning_rate=1e-3, logging_steps=1, **kwargs)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            weight = model.model.layers[0].mlp.up_proj.weight
            seen.append((weight.detach().clone(), sparsity_report(model).totals["violating_groups"]))

    trainer = Scaled(model, args, train_dataset=rows, callbacks=[Look()])
    trainer.train()
    scales = [*trainer.scales, trainer.accelerator.scaler.get_scale()]
    skipped = [after < before for before, after in pairwise(scales)]
    assert 0 < sum(skipped) < 12
    for step in range(1, 12):
        assert torch.equal(seen[step][0], seen[step - 1][0]) == skipped[step], step
    assert {violations for _, violations in seen} == {0}
    assert {entry["sparse24_violations"] for entry in trainer.state.log_history if "loss" in entry} == {0}


def test_gradients_of_pruned_weights_are_out_of_the_clipped_norm(pruned, train):
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            weight = model.model.layers[0].mlp.up_proj.weight
            seen.append((weight.grad[weight == 0].abs().max(), weight.grad[weight != 0].abs().max()))

    train(pruned, callbacks=[Look()])
    assert all(pruned_part == 0 and kept_part > 0 for pruned_part, kept_part in seen)


def test_plain_trainer_and_callback_give_what_the_trainer_gives(pruned, train, tmp_path, rows):
    other = copy.deepcopy(pruned)
    trainer = train(pruned)
    args = TrainingArguments(
        **{
            key: getattr(trainer.args, key)
            for key in ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "weight_decay")
        }
        | {"save_strategy": "no", "use_cpu": True, "report_to": "none"}
    )
    Trainer(other, args, train_dataset=rows, callbacks=[Sparse24Callback()]).train()
    for (name, one), two in zip(pruned.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "bert_mlm"])
def test_conv1d_and_fused_experts(family, train):
    model = build(family)
    prune_(model, Sparse24Config(method="magnitude"))
    train(model, max_steps=2)
    assert sparsity_report(model).totals["violating_groups"] == 0


def test_a_group_that_holds_fewer_than_two_nonzeros_keeps_its_places(pruned, train):
    weight = pruned.model.layers[0].mlp.up_proj.weight
    weight.data[0, :4] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    train(pruned)
    assert weight[0, 0] != 0  # a tie of magnitudes goes to the lower column
    assert (weight[0, 1:3] == 0).all()


def test_a_model_that_is_not_pruned_is_refused(tiny_llama, train):
    with pytest.raises(ValueError, match=r"needs a model that was pruned; .*q_proj.* is not 2:4"):
        train(tiny_llama)


def test_what_cuts_groups_of_four_or_has_no_gradient_is_refused(pruned, tiny_llama, train):
    weight = pruned.model.layers[0].mlp.up_proj.weight
    weight.ds_tensor = weight  # as DeepSpeed marks what it has partitioned
    with pytest.raises(ValueError, match=r"up_proj.weight is partitioned by DeepSpeed ZeRO-3"):
        train(pruned)
    tiny_llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"needs the gradient of .*up_proj.weight, which has none"):
        train(tiny_llama, mask_policy="srste")


def test_frozen_layers_stay_what_they_are(pruned, train):
    weight = pruned.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = weight.clone()
    train(pruned)
    assert torch.equal(weight, before)


def test_what_is_written_behind_the_masks_is_found_before_a_save(pruned, train):
    class Meddle(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.model.layers[1].mlp.down_proj.weight.data.add_(1)

    class Late(Meddle):
        def on_optimizer_step(self, args, state, control, **kwargs):
            Meddle.on_step_end(self, args, state, control, **kwargs)

        on_step_end = TrainerCallback.on_step_end

    class After(Sparse24Callback):  # runs behind it
        pass

    with pytest.raises(RuntimeError, match="pruned weights are not zero"):
        train(pruned, callbacks=[After(), Late()], save_strategy="steps", save_steps=2)


def test_sixteen_bit_weights_are_warned_about(pruned, train, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    train(pruned.to(torch.bfloat16), max_steps=1)
    transformers.utils.logging.disable_propagation()
    assert "trained in 16 bits" in caplog.text


def test_the_saved_model_is_an_ordinary_one_with_a_record(pruned, train, tokens):
    trainer = train(pruned)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert loaded.config.sparse24["method"] == "magnitude"
    assert loaded.config.sparse24["training"] == {"mask_policy": "frozen"}
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(loaded(tokens).logits, pruned.eval()(tokens).logits)


def test_the_best_model_is_loaded_and_verified(pruned, train):
    before = zeros_of(pruned)
    kwargs = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    kwargs |= {"learning_rate": 0.3, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    trainer = train(pruned, eval_dataset=Rows(8), load_best_model_at_end=True, **kwargs)
    assert trainer.state.best_global_step == 2  # the worst, so that it is not the last and has to be loaded
    assert_held(pruned, before)
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_trackers_see_the_metrics(pruned, arguments, rows):
    seen = []

    class Tracker(TrainerCallback):  # called before Sparse24Callback, as those that report_to names are
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    Sparse24Trainer(pruned, arguments(), train_dataset=rows, callbacks=[Tracker()]).train()
    assert {"sparse24_density", "sparse24_flips", "sparse24_violations"} <= seen[0].keys()
    assert seen[0]["sparse24_density"] == pytest.approx(0.5, abs=1e-3)


def test_masks_take_a_bit_a_weight():
    kept = mask_2to4(torch.rand(5, 12))
    mask = Mask(torch.nn.Linear(12, 5), "weight", -1, kept.shape, pack_bits(kept))
    assert mask.bits.nbytes == -(-kept.numel() // 8)
    assert torch.equal(mask.kept(), kept)
    assert torch.equal(mask.pruned(), ~kept)


def test_masks_follow_the_record(tiny_llama):
    prune_(tiny_llama, Sparse24Config(method="magnitude", target_modules=["q_proj"]))
    masks = Masks.of(tiny_llama, lambda _, weight, dim: mask_2to4(weight.abs(), dim))
    assert {name.split(".")[-2] for name in masks} == {"q_proj"}
    assert find_violations(tiny_llama.model.layers[0].mlp.up_proj.weight).count


def test_several_gpus_in_one_process_are_refused(pruned, arguments, rows):
    several = arguments()
    several._n_gpu = 2
    callback, trainer = Sparse24Callback(), Trainer(pruned, arguments(), train_dataset=rows)
    with pytest.raises(ValueError, match="Start it with torchrun or accelerate launch"):
        callback.on_train_begin(several, trainer.state, trainer.control, model=pruned)
