"""The loss of distillation: the dense teacher runs on every batch, and the student is to write what it writes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_sparse24.divergence import CHUNK_TOKENS, kl_divergence, square_head, squared_error
from hf_sparse24.training.masks import bare

IGNORED_LABEL = -100


@dataclass(slots=True)
class Distillation:
    """What a student is compared in, and how much each comparison weighs.

    Attributes:
        logit_weight, label_weight, hidden_weight (`float`): of the divergence of the output, of the model's own loss,
            and of SquareHead.
        temperature (`float`): of both softmaxes.
        top_k (`int`, *optional*): compare only so many of the teacher's likeliest classes.
        chunk_tokens (`int`): how many tokens are compared at a time.
    """

    logit_weight: float = 2 / 3
    label_weight: float = 1 / 3
    hidden_weight: float = 0.0
    temperature: float = 2.0
    top_k: int | None = None
    chunk_tokens: int = CHUNK_TOKENS

    def inputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the student reads: no labels where they would only cost the memory of a loss."""
        needed = self.label_weight > 0 or _makes_its_inputs_of_labels(model, inputs)
        kept = {key: value for key, value in inputs.items() if needed or key != "labels"}
        return kept | ({"output_hidden_states": True} if self.hidden_weight else {})

    def teach(
        self, teacher: nn.Module, inputs: Mapping[str, Any], autocast: Callable[[], AbstractContextManager]
    ) -> Any:
        """Run the teacher on what the student read."""
        dropped = () if _makes_its_inputs_of_labels(teacher, inputs) else ("labels",)
        read = {key: value for key, value in inputs.items() if key not in (*dropped, "num_items_in_batch")}
        with torch.no_grad(), autocast():
            return teacher(**read, **({"output_hidden_states": True} if self.hidden_weight else {}))

    def divergence(
        self, student: Any, teacher: Any, kept: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """Sum the divergence of the student's output over the tokens that count; return it and their number.

        Where there are logits of several classes it is that of Kullback and Leibler; else the squared error of the
        last hidden states relative to the teacher's, which counts as one.
        """
        logits = student.get("logits")
        if logits is not None and logits.shape[-1] > 1:
            kept = _all(logits) if kept is None or kept.shape != logits.shape[:-1] else kept
            total = kl_divergence(logits, teacher["logits"], kept, self.temperature, self.top_k, self.chunk_tokens)
            return total, kept.sum()
        key = "last_hidden_state" if logits is None else "logits"
        if student.get(key) is None:
            raise ValueError(f"Distillation needs logits or a last_hidden_state; the model returns {list(student)}.")
        own, other = student[key], teacher[key]
        kept = mask if mask is not None and mask.shape == own.shape[:-1] else _all(own)
        error, size = squared_error(own, other, kept, self.chunk_tokens)
        return error / size, 1.0

    def hidden(self, student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
        """Return SquareHead over all layers, of the encoder and of the decoder where there are two."""
        parts = []
        for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            own, other = student.get(key), teacher.get(key)
            if own is not None and other is not None:
                kept = mask if mask is not None and mask.shape == own[0].shape[:-1] else _all(own[0])
                parts.append(square_head(own[1:], other[1:], kept))
        if not parts:
            raise ValueError(
                f"SquareHead needs hidden states; the model returns {list(student)}. Use hidden_weight=0."
            )
        return torch.stack(parts).mean()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model with adapters write what its base writes, without dropout; it is left as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True


def check_adapters(model: nn.Module, teacher: nn.Module | None) -> None:
    """Raise `ValueError` when a model cannot be its own teacher: it has no adapters, or there is another."""
    if teacher is not None:
        raise ValueError("There can be one teacher: give teacher_model, or teacher_adapters_off.")
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"teacher_adapters_off needs a model with adapters; {type(model).__name__} has none. Give teacher_model."
        )


def counted_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of the logits count: those whose label counts, else those that are no padding."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if isinstance(shifted, Tensor):
        return shifted.ne(IGNORED_LABEL)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        counted = labels.ne(IGNORED_LABEL)
        if type_name(model) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # a logit predicts the next label
            counted = torch.cat([counted[..., 1:], torch.zeros_like(counted[..., :1])], -1)
        return counted
    return attention_mask(inputs)


def attention_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens are no padding, where the inputs say so."""
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def type_name(model: nn.Module) -> str:
    """Return the class of a model under all that is wrapped around it."""
    model = bare(model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(model).__name__.removeprefix("FSDP")


def _makes_its_inputs_of_labels(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    config = getattr(bare(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" not in inputs


def _all(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
