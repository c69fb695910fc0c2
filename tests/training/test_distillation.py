"""Distillation through the trainer: what is learned, how it is averaged, and which models it takes."""

import copy

import pytest
import torch
import transformers
from torch.nn.functional import kl_div, log_softmax

from hf_sparse24 import Sparse24Config, Sparse24Trainer, prune_
from tests.families import build, inputs
from tests.training.conftest import Rows


class Uneven(Rows):
    """Rows of which a different number of tokens have labels."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: index % 6] = -100
        return {"input_ids": row["input_ids"], "labels": labels}


@pytest.fixture
def teacher(tiny_llama):
    return copy.deepcopy(tiny_llama)


def divergence(student, teacher, tokens):
    with torch.no_grad():
        own, other = (log_softmax(model.eval()(tokens).logits, -1) for model in (student, teacher))
    return float(kl_div(own, other, log_target=True, reduction="sum") / tokens.numel())


def test_the_student_comes_nearer_to_its_teacher(pruned, teacher, train, rows):
    for model in (pruned, teacher):  # far enough apart
        for parameter in model.parameters():
            parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    before = divergence(pruned, teacher, rows.tokens)
    weights = copy.deepcopy(teacher.state_dict())
    trainer = train(pruned, teacher=teacher, label_weight=0, max_steps=40)
    assert divergence(pruned, teacher, rows.tokens) < 0.5 * before
    logged = [entry["distill_logit_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())
    assert all(not parameter.requires_grad for parameter in teacher.parameters())


def test_what_is_logged_is_the_divergence_by_token_and_the_loss_is_weighed(pruned, teacher, arguments):
    rows = Rows(rows=4)
    with torch.no_grad():
        own, other = (log_softmax(model.eval()(rows.tokens).logits[:, :-1] / 2, -1) for model in (pruned, teacher))
        loss = float(pruned(rows.tokens, labels=rows.tokens).loss)
    expected = 4 * float(kl_div(own, other, log_target=True, reduction="sum")) / own[..., 0].numel()
    args = arguments(max_steps=1, logging_steps=1, learning_rate=0.0)
    trainer = Sparse24Trainer(pruned, args, train_dataset=rows, teacher_model=teacher)
    trainer.train()
    seen = trainer.state.log_history[0]
    assert seen["distill_logit_loss"] == pytest.approx(expected, rel=1e-4)
    assert seen["distill_label_loss"] == pytest.approx(loss, rel=1e-4)
    assert seen["loss"] == pytest.approx(loss / 3 + 2 * expected / 3, rel=1e-4)


@pytest.mark.parametrize(
    "weights",
    [
        {"label_weight": 0.0},
        {},
        {"logit_weight": 0.0, "label_weight": 0.0, "hidden_weight": 1.0},
    ],
    ids=["logits", "both", "hidden"],
)
def test_a_step_is_the_same_however_its_batch_is_cut(weights, teacher, pruned, arguments):
    found = []
    data = Rows(8) if "hidden_weight" in weights else Uneven(8)  # SquareHead is a mean of means
    for size in (8, 4, 2):
        model = copy.deepcopy(pruned)
        args = arguments(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            **weights,
        )
        Sparse24Trainer(model, args, train_dataset=data, teacher_model=teacher).train()
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        for other in found[1:]:
            # Means of means of SquareHead differ where the teacher's norms do; sums over tokens only by rounding.
            tolerance = 0.1 if "hidden_weight" in weights else 1e-5
            moved = (tensor - pruned.state_dict()[name]).abs().max()
            assert (tensor - other[name]).abs().max() <= tolerance * moved.clamp_min(1e-3), name


def test_without_labels_no_loss_on_them_is_computed(pruned, teacher, train):
    seen = []
    for model in (pruned, teacher):
        model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    train(pruned, teacher=teacher, label_weight=0, max_steps=1)
    assert seen == [["input_ids"], ["input_ids", "num_items_in_batch"]]  # teacher, student


def test_evaluation_is_the_models_own_loss(pruned, teacher, train):
    trainer = train(pruned, teacher=teacher, max_steps=1, eval_dataset=Rows(4))
    with torch.no_grad():
        expected = float(pruned(Rows(4).tokens, labels=Rows(4).tokens).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_by_name(pruned, tiny_llama_folder, train):
    trainer = train(pruned, teacher_model=str(tiny_llama_folder), max_steps=1, logging_steps=1, hidden_weight=0.1)
    assert "distill_hidden_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("family", ["bert", "dinov2", "vit", "t5", "whisper", "mixtral"])
def test_models_of_other_kinds_learn_from_a_teacher(family, arguments):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    teacher, model = build(family, **still), build(family, **still)
    prune_(model, Sparse24Config(method="magnitude"))
    batch = {key: value[0] for key, value in inputs(family).items()}
    if family == "mixtral":
        batch["labels"] = batch["input_ids"]
    args = arguments(label_weight=0, hidden_weight=0.2, max_steps=12, logging_steps=1, remove_unused_columns=False)
    args.learning_rate = 3e-4
    trainer = Sparse24Trainer(model, args, train_dataset=[batch] * 8, teacher_model=teacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_nothing_to_learn_is_refused(pruned, teacher, train):
    with pytest.raises(ValueError, match="are all 0"):
        train(pruned, teacher=teacher, logit_weight=0, label_weight=0)
    with pytest.raises(ValueError, match="must not be negative"):
        train(pruned, logit_weight=-1)
    with pytest.raises(ValueError, match="distill_temperature must be positive"):
        train(pruned, distill_temperature=0)


def test_a_training_without_recovery_is_warned_about(pruned, teacher, train, caplog):
    transformers.utils.logging.enable_propagation()
    train(pruned, learning_rate=0.0, max_steps=12, patience_steps=8, logging_steps=2, per_device_train_batch_size=24)
    assert "No recovery in" in caplog.text
    caplog.clear()
    train(pruned, teacher=teacher, max_steps=12, patience_steps=8, logging_steps=2)
    transformers.utils.logging.disable_propagation()
    assert "No recovery" not in caplog.text
