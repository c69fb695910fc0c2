"""A pruned model, data and arguments for trainings of a few steps on a CPU."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, prune_
from hf_sparse24.training.callback import Sparse24Callback


class Rows(torch.utils.data.Dataset):
    """Random tokens, each row its own labels."""

    def __init__(self, rows=24, length=8, vocabulary=96):
        self.tokens = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def pruned(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    prune_(model, Sparse24Config(method="magnitude"))
    return model


@pytest.fixture
def arguments(tmp_path):
    def make(**kwargs):
        defaults = {
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        made = Sparse24TrainingArguments(str(tmp_path / "run"), **{**defaults, **kwargs})
        made._n_gpu = min(made.n_gpu, 1)  # as a launcher would have it
        return made

    return make


@pytest.fixture
def train(arguments, rows):
    """Train a model for a few steps, and return the trainer."""

    def run(model, resume=None, callbacks=(), teacher=None, eval_dataset=None, **kwargs):
        trainer = Sparse24Trainer(
            model,
            arguments(**kwargs),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
            teacher_model=teacher,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Stop a training as a kill would, after a step and what is saved at it."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def zeros_of(model):
    """Return where the pruned weights of a model are zero, by the names of its projections."""
    return {name: weight == 0 for name, weight in model.named_parameters() if "proj" in name}


__all__ = ["KillAt", "Killed", "Rows", "Sparse24Callback", "zeros_of"]
