"""`Sparse24TrainingArguments`: what is asked of a retraining, beside what transformers' arguments ask."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_sparse24.training.policies import make_policy


@dataclass
class Sparse24Arguments:
    """The arguments alone, to be joined to those of another trainer: `class Mine(Sparse24Arguments, SFTConfig)`."""

    mask_policy: str = field(
        default="frozen",
        metadata={"help": "How masks change: frozen, srste, masked_decay, admm, transposable or learned."},
    )
    mask_policy_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the policy, as a dict or as JSON, such as '{\"penalty\": 0.02}'."},
    )
    mask_prior: str | None = field(
        default=None,
        metadata={"help": "Folder of a pruned model of the same class: the first masks of one that is dense."},
    )
    patience_steps: int = field(
        default=200,
        metadata={"help": "Warn after so many steps without a lower loss: a wrong learning rate."},
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Folder or name of the dense model to distil from; none: no distillation."}
    )
    teacher_adapters_off: bool = field(
        default=False,
        metadata={
            "help": "The teacher is the model itself, adapters off. On a pruned base that is the pruned model, "
            "which keeps adapters from forgetting but has nothing to recover; teacher_model recovers."
        },
    )
    distill_temperature: float = field(
        default=2.0, metadata={"help": "Of both softmaxes; 2 as in AST (arXiv:2407.20584), 1 as in CAST."}
    )
    logit_weight: float = field(
        default=2 / 3, metadata={"help": "Of the divergence from the teacher's output; AST's two thirds."}
    )
    label_weight: float = field(
        default=1 / 3, metadata={"help": "Of the model's own loss on the labels; AST's third. 0: labels are not used."}
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Of SquareHead (arXiv:2310.06927), the error of every layer's hidden states."}
    )
    distill_top_k: int | None = field(
        default=None, metadata={"help": "Compare only so many of the teacher's likeliest classes, the rest as one."}
    )
    distill_chunk_tokens: int = field(
        default=1024, metadata={"help": "How many tokens' logits are compared at a time; less takes less memory."}
    )
    compact_optimizer: bool = field(
        default=False,
        metadata={"help": "AdamW with float32 weights and moments of unpruned weights only (frozen masks)."},
    )
    sparse_matmul: bool = field(
        default=False,
        metadata={"help": "Forward passes and gradients of inputs on sparse tensor cores; needs a transposable mask."},
    )
    sparse_matmul_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the projections whose products are sparse; default: all."}
    )

    def __post_init__(self) -> None:
        """Check what was asked.

        Raises:
            `ValueError`: a value is out of range or contradicts another, or there is no such mask policy.
        """
        if isinstance(self.mask_policy_args, str):
            self.mask_policy_args = json.loads(self.mask_policy_args)
        make_policy(self.mask_policy, **(self.mask_policy_args or {}))
        for key in ("logit_weight", "label_weight", "hidden_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative; got {getattr(self, key)!r}.")
        if self.teacher_adapters_off and self.teacher_model is not None:
            raise ValueError("There can be one teacher: give teacher_model, or teacher_adapters_off.")
        if not self.distill_temperature > 0:
            raise ValueError(f"distill_temperature must be positive; got {self.distill_temperature!r}.")
        if self.distill_chunk_tokens < 1:
            raise ValueError(f"distill_chunk_tokens must be at least 1; got {self.distill_chunk_tokens!r}.")
        if self.compact_optimizer and self.mask_policy not in ("frozen", "transposable"):
            raise ValueError(
                f"compact_optimizer keeps nothing of pruned weights, which mask_policy {self.mask_policy!r} trains. "
                "Use mask_policy='frozen'."
            )
        if self.sparse_matmul and self.mask_policy not in ("frozen", "transposable"):
            raise ValueError(
                f"sparse_matmul needs a mask that stays, and mask_policy {self.mask_policy!r} moves it. Use "
                "mask_policy='transposable'."
            )
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


@dataclass
class Sparse24TrainingArguments(Sparse24Arguments, TrainingArguments):
    """transformers' `TrainingArguments` and those of a retraining at 2:4.

    Distillation is off until there is a teacher; then the loss is `logit_weight * KL + label_weight * own loss +
    hidden_weight * SquareHead`. The defaults are those of AST for small models (arXiv:2407.20584). On a few million
    tokens of narrow text `label_weight=0` overfits least.
    """
