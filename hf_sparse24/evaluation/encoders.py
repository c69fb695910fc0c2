"""What encoders see: sentence embeddings that find each other, and image features close to the dense model's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from hf_sparse24.calibration.tokenizer import check_token_ids
from hf_sparse24.calibration.windows import check_context
from hf_sparse24.evaluation.running import Batch, check_not_nan, evaluating, moved

Texts = Iterable[Batch] | Sequence[Sequence[int]]

POOLINGS = ("cls", "pooler", "mean")
_BLOCK = 1024  # queries whose scores are in memory at once


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """How well queries find their documents.

    Attributes:
        recall_at_1 (`float`): share of the queries for which no other document scores higher than their own.
        mean_reciprocal_rank (`float`): mean of 1 / (1 + number of documents that score higher).
        queries (`int`): how many there were.
        tied (`int`): queries whose document shares its score with another one. A tie counts as found, so a model whose
            embeddings have collapsed to one point finds everything: distrust the scores when this is large.
    """

    recall_at_1: float
    mean_reciprocal_rank: float
    queries: int
    tied: int


def embed(model: nn.Module, texts: Texts, batch_size: int = 32) -> Tensor:
    """Embed texts with an encoder: the mean of its last hidden state over the attention mask, in float32.

    Of a model with a head the base model is used, of an encoder-decoder model the encoder.

    Args:
        model (`nn.Module`): an encoder of transformers.
        texts (`Iterable[Mapping[str, Tensor]]` or `Sequence[Sequence[int]]`): batches with `input_ids` and, where
            there is padding, `attention_mask` (batch, tokens); or one list of token ids a text, to be padded here.
        batch_size (`int`): texts per forward pass; batches stay as they are.

    Returns:
        `Tensor`: (texts, hidden) float32 on the CPU, not normalised.

    Raises:
        `ValueError`: there is no text, a text has no tokens or more than the context, or embeddings are NaN.
    """
    encoder = _text_encoder(model)
    rows = []
    with evaluating(encoder):
        batches = logging.tqdm(_batched(encoder, texts, batch_size), desc="Embeddings", unit="batch", leave=False)
        for number, batch in enumerate(batches, 1):
            inputs = moved(batch, encoder)
            mask = _mask(inputs, number)
            check_context(encoder, mask.shape[1])
            check_token_ids(inputs["input_ids"], encoder)
            hidden = _last_hidden_state(encoder(**inputs), encoder).float()
            # Not hidden * mask: what stands in the padding may be NaN.
            mean = hidden.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True)
            rows.append(check_not_nan(mean, number, "embeddings").cpu())
    return _joined(rows)


def retrieval_recall(model: nn.Module, queries: Texts, documents: Texts, batch_size: int = 32) -> RetrievalScores:
    """Score a sentence encoder: `queries[i]` must find `documents[i]` among all documents, by cosine similarity.

    A document counts as found when no other has a strictly higher score. Cosines are compared after rounding to six
    decimals, about the resolution of float32, so that equal texts tie however they were padded.

    Args:
        model (`nn.Module`): an encoder of transformers.
        queries, documents: as many texts each, in the forms that `embed` takes.
        batch_size (`int`): texts per forward pass.

    Raises:
        `ValueError`: there are no texts, their numbers differ, or embeddings are NaN.
    """
    query_rows, document_rows = (
        F.normalize(embed(model, texts, batch_size).double(), dim=1) for texts in (queries, documents)
    )
    if len(query_rows) != len(document_rows):
        raise ValueError(
            f"Query i must find document i, so there are as many of both; got {len(query_rows)} queries and "
            f"{len(document_rows)} documents."
        )
    higher, equal = [], []
    for start in range(0, len(query_rows), _BLOCK):
        scores = (query_rows[start : start + _BLOCK] @ document_rows.T).round(decimals=6)
        own = scores.diagonal(start).unsqueeze(1)
        higher.append((scores > own).sum(1))
        equal.append((scores == own).sum(1))
    ranks = torch.cat(higher) + 1
    return RetrievalScores(
        recall_at_1=(ranks == 1).double().mean().item(),
        mean_reciprocal_rank=ranks.double().reciprocal().mean().item(),
        queries=len(ranks),
        tied=int((torch.cat(equal) > 1).sum()),
    )


def features(model: nn.Module, batches: Iterable[Batch], pooling: str = "cls") -> Tensor:
    """Return the features of a vision encoder, one row an image, in float32.

    Of a model with a head the base model is used, of a CLIP-like model the vision model.

    Args:
        model (`nn.Module`): a vision model of transformers.
        batches (`Iterable[Mapping[str, Tensor]]`): arguments of its forward, such as `pixel_values`; `labels` are
            ignored.
        pooling (`str`): `"cls"`: the first token of the last hidden state; `"pooler"`: its `pooler_output`, for models
            without a CLS token; `"mean"`: the mean over all tokens.

    Returns:
        `Tensor`: (images, hidden) float32 on the CPU.

    Raises:
        `ValueError`: there are no batches, the pooling is unknown or not what the model has, or features are NaN.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {list(POOLINGS)}; got {pooling!r}.")
    base = getattr(model, "base_model", model)
    encoder = getattr(base, "vision_model", base)
    rows = []
    with evaluating(encoder):
        for number, batch in enumerate(logging.tqdm(batches, desc="Features", unit="batch", leave=False), 1):
            inputs = moved(batch, encoder)
            inputs.pop("labels", None)
            pooled = _pooled(encoder(**inputs), encoder, pooling).float()
            rows.append(check_not_nan(pooled, number, "features").cpu())
    return _joined(rows)


def feature_cosine(
    model: nn.Module, reference: nn.Module | Tensor, batches: Iterable[Batch], pooling: str = "cls"
) -> float:
    """Return the mean cosine between a pruned vision model's features and those of the dense model.

    Args:
        model (`nn.Module`): the pruned model.
        reference (`nn.Module` or `Tensor`): the dense model, or its `features` (images, hidden) of the same batches.
        batches, pooling: as in `features`; with a model as reference the batches are read twice.

    Raises:
        `ValueError`: there are no batches, the shapes differ, or features are NaN.
    """
    expected = features(reference, batches, pooling) if isinstance(reference, nn.Module) else reference.cpu()
    found = features(model, batches, pooling)
    if expected.shape != found.shape:
        raise ValueError(
            f"The model's features have shape {tuple(found.shape)}, the reference {tuple(expected.shape)}; give both "
            "the same images and models of the same width."
        )
    return F.cosine_similarity(found.double(), expected.double(), dim=1).mean().item()


def _text_encoder(model: nn.Module) -> nn.Module:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()
    base = getattr(model, "base_model", model)
    return getattr(base, "text_model", base)


def _batched(encoder: nn.Module, texts: Texts, batch_size: int) -> Iterable[Batch]:
    """Pad lists of token ids on the right into batches; leave batches as they are."""
    if not isinstance(texts, Sequence) or not texts or isinstance(texts[0], Mapping):
        return texts
    lengths = [len(text) for text in texts]
    if not min(lengths):
        raise ValueError(f"Text {lengths.index(0)} has no tokens.")
    # The padding is masked, but some models (RoBERTa) count positions by this id.
    pad = getattr(getattr(encoder, "config", None), "pad_token_id", None) or 0
    batches = []
    for start in range(0, len(texts), batch_size):
        ids = [torch.as_tensor(text) for text in texts[start : start + batch_size]]
        mask = [torch.ones_like(text) for text in ids]
        batches.append(
            {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence(mask, batch_first=True),
            }
        )
    return batches


def _mask(inputs: Batch, number: int) -> Tensor:
    """Return the attention mask of a batch as bool, (batch, tokens)."""
    if "input_ids" not in inputs:
        raise ValueError(f"embed needs input_ids; batch {number} has only {sorted(inputs)}.")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    if not mask.any(1).all():
        raise ValueError(f"The attention mask of batch {number} leaves a text without tokens.")
    return mask.bool()


def _pooled(output: Any, encoder: nn.Module, pooling: str) -> Tensor:
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{type(encoder).__name__} has no pooler_output; use pooling='cls' or 'mean'.")
        return pooled.flatten(1)  # convolutional models return (images, channels, 1, 1)
    hidden = _last_hidden_state(output, encoder)
    return hidden[:, 0] if pooling == "cls" else hidden.mean(1)


def _last_hidden_state(output: Any, encoder: nn.Module) -> Tensor:
    """Return (batch, tokens, hidden), or say that the model has no such thing."""
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.dim() != 3:
        shape = None if hidden is None else tuple(hidden.shape)
        raise ValueError(
            f"{type(encoder).__name__} gives no last_hidden_state of (batch, tokens, hidden), but {shape}; vision "
            "models without tokens need pooling='pooler'."
        )
    return hidden


def _joined(rows: list[Tensor]) -> Tensor:
    if not rows:
        raise ValueError("There is nothing to measure: no batches were given.")
    return torch.cat(rows)
