"""The loss of language models: perplexity of causal ones on a text, loss per target token of encoder-decoder ones."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_sparse24.calibration.documents import held_out_documents, split_text
from hf_sparse24.calibration.tokenizer import check_token_ids
from hf_sparse24.calibration.windows import check_context
from hf_sparse24.evaluation.running import Batch, check_not_nan, evaluating, moved

_LARGEST_EXPONENT = 709.0  # of a float64


def perplexity(model: nn.Module, token_ids: Tensor, window: int = 512, batch_size: int = 2) -> float:
    """Return exp of the mean negative log-likelihood per predicted token, over windows that do not overlap.

    Each window is read on its own, so its first token predicts without context and is not scored itself. Compare
    figures of the same window length only. The loss is computed in float32.

    Args:
        model (`nn.Module`): a causal language model of transformers.
        token_ids (`Tensor`): (tokens,) int64; a rest shorter than `window` is dropped.
        window (`int`): tokens per window.
        batch_size (`int`): windows per forward pass.

    Raises:
        `ValueError`: the model is no causal language model, the window is longer than its context, there is less than
            one window of tokens, or logits are NaN.
    """
    check_causal(model)
    if window < 2 or len(token_ids) < window:
        raise ValueError(
            f"perplexity needs a window of at least 2 tokens and one window of text; got {len(token_ids)}."
        )
    check_context(model, window)
    check_token_ids(token_ids, model)
    windows = token_ids[: len(token_ids) // window * window].view(-1, window)
    total = 0.0
    with evaluating(model):
        batches = logging.tqdm(windows.split(batch_size), desc="Perplexity", unit="batch", leave=False)
        for number, batch in enumerate(batches, 1):
            ids = batch.to(next(model.parameters()).device)
            total += _loss_sum(model(ids).logits[:, :-1], ids[:, 1:], number)
    mean = total / (windows.shape[0] * (window - 1))
    return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


def nll(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean negative log-likelihood per target token of an encoder-decoder model, teacher-forced.

    The mean is over all tokens of all batches, whatever their sizes, and is computed in float32.

    Args:
        model (`nn.Module`): an encoder-decoder model of transformers with a language-model head.
        batches (`Iterable[Mapping[str, Tensor]]`): arguments of its forward, with `labels` (batch, tokens) int64, -100
            where nothing is scored. Without `decoder_input_ids` the model shifts the labels itself.

    Raises:
        `ValueError`: the model is no encoder-decoder model, there is nothing to score, or logits are NaN.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        raise ValueError(f"nll scores encoder-decoder models; {type(model).__name__} is not one. Try perplexity.")
    total, count = 0.0, 0
    with evaluating(model):
        for number, batch in enumerate(logging.tqdm(batches, desc="NLL", unit="batch", leave=False), 1):
            if batch.get("labels") is None:
                raise ValueError(f"nll needs labels; batch {number} has only {sorted(batch)}.")
            inputs = moved(batch, model)
            total += _loss_sum(model(**inputs).logits, inputs["labels"], number)
            count += int((inputs["labels"] != -100).sum())
    if not count:
        raise ValueError("nll needs at least one batch with a label other than -100; there is none.")
    return total / count


def held_out_tokens(tokenizer: PreTrainedTokenizerBase, source: str | Path, window: int, windows: int) -> Tensor:
    """Tokenize the last tenth of a text or of a file's rows, which calibration on the same file never reads.

    Where the tokenizer begins every text with a BOS token, so does each window, as in calibration: some models are
    lost without it. It is the first token of its window, so it is not scored. Between rows stands an EOS token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        source (`str` or `Path`): the whole text, or a file: .csv, .json, .jsonl or .parquet with a column of text or
            of `input_ids`, else a UTF-8 text.
        window (`int`): tokens per window, BOS included.
        windows (`int`): how many to return at most, from the beginning of the held-out part.

    Returns:
        `Tensor`: (tokens,) int64, a multiple of `window`.

    Raises:
        `ValueError`: the held-out part is shorter than one window, or the file cannot be read as text.
        `FileNotFoundError`: there is no such file.
    """
    if isinstance(source, Path):
        documents, tokenized = held_out_documents(source)
    else:
        documents, tokenized = [split_text(source)[1]], False
    start = [tokenizer.bos_token_id]
    start = start if not tokenized and tokenizer("")["input_ids"][:1] == start else []
    inside = window - len(start)
    token_ids = _joined(tokenizer, documents, tokenized, inside * windows)
    count = len(token_ids) // inside
    if count < 1:
        raise ValueError(
            f"The last tenth of the text, which is held out, has {len(token_ids)} tokens: less than one window of "
            f"{window}. Give a longer text or a shorter window."
        )
    rows = torch.tensor(token_ids[: count * inside]).view(count, inside)
    return torch.cat([torch.tensor([start] * count).long(), rows], dim=1).flatten()


def _joined(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Any], tokenized: bool, most: int) -> list[int]:
    """Return the first tokens of documents, `most` at most, with an EOS token between two texts."""
    token_ids: list[int] = []
    for document in documents:
        ids = document if tokenized else tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        between = token_ids and ids and not tokenized and tokenizer.eos_token_id is not None
        token_ids += [tokenizer.eos_token_id] * bool(between) + ids
        if len(token_ids) >= most:
            break
    return token_ids[:most]


def check_causal(model: nn.Module) -> None:
    """Refuse a transformers model without a causal language-model head, and name what measures it instead."""
    config = getattr(model, "config", None)
    if config is None:
        return
    if config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"Perplexity needs a causal language model and {type(model).__name__} is not one. hf-sparse24 evaluate "
            "measures encoder-decoder models and sentence encoders with --pairs and vision models with --images; in "
            "Python hf_sparse24.evaluation has nll, retrieval_recall and feature_cosine."
        )


def _loss_sum(logits: Tensor, targets: Tensor, number: int) -> float:
    """Sum the loss of a batch in float32; targets of -100 do not count."""
    targets = targets.to(logits.device).flatten()
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return check_not_nan(loss, number, "logits").item()
