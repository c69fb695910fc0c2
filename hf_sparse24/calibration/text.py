"""What a one-shot method sees of the world: calibration batches from whatever the user has.

Text of every kind (a file, a dataset, strings, the model's own, a mixture) ends up as packed windows: documents are
taken in random order, tokenized whole, joined with an end-of-text token between them, and cut into windows of equal
length, so nothing is padded and nothing needs an attention mask. Only as many documents are tokenized as the windows
need. A document much longer than a window is read in pieces, one of each document before a second of any.

Batches that the user made (images, audio, encoder-decoder inputs, anything) pass as they are.

`documents` opens files and datasets, and leaves the last tenth of a file for evaluation. What is wrong with the data
is found here, before a weight has changed, as far as the data alone show it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse24.calibration.documents import check_source, documents_of, is_dataset
from hf_sparse24.calibration.self_generated import check_writes_text, sample_windows
from hf_sparse24.calibration.tokenizer import check_token_ids, resolve_tokenizer
from hf_sparse24.calibration.windows import check_context, pack, pack_text, window_length

SELF = "self"

_KINDS = "'self', a text file, the name of a dataset, a datasets.Dataset, strings, a mixture of these, or batches"


def calibration_batches(
    source: Any,
    model: nn.Module,
    tokenizer: Any = None,
    num_samples: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return what a calibrated method feeds to the model, on the CPU.

    Windows of encoders with [CLS] and [SEP] begin and end with these; windows of models whose tokenizer begins every
    text with BOS begin with it. The same seed gives the same batches, another seed other text.

    Args:
        source: one of

            - `"self"`: text that the model writes itself; decoder-only models, no tokenizer needed
            - a file, as `pathlib.Path` or `str`; its last tenth is left for evaluation. Of .csv, .json, .jsonl and
              .parquet that is a tenth of the rows, which are read as those of a dataset; all else is UTF-8 text
            - the name or folder of a dataset, or `"name:config"`: its train split, column "text" or the only column
              of strings
            - a `datasets.Dataset` or `IterableDataset`, with text or with `input_ids`, which are taken as they are
            - a list of strings, each a document
            - a list of `(source, weight)` with sources of the kinds above: windows are shared out by weight, at
              least one each, and spread evenly over the batches
            - an iterable of batches: (B, L) tensors of token ids, or dicts of tensors, passed on unchanged. It is
              read until `num_samples` sequences are there; fewer are taken as they are.
        model (`nn.Module`): the model to calibrate, whose context and vocabulary the text has to fit.
        tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): or its name; default is the model's own name.
        num_samples (`int`): windows in all.
        sequence_length (`int`, *optional*): tokens per window, special tokens included. None: 1024, or the model's
            context if that is less.
        batch_size (`int`): most windows per batch; the windows are dealt out evenly.
        seed (`int`): of all that is random; the global random state is neither read nor changed.

    Returns:
        `list[dict[str, Any]]`: for text `{"input_ids": (batch_size, sequence_length) int64}` each.

    Raises:
        `ValueError`: there is too little text, or it does not fit the model; the message says what to change.
        `FileNotFoundError`: there is no such file.
        `ModuleNotFoundError`: a dataset was named and `datasets` is not installed.
    """
    _check_counts(num_samples=num_samples, sequence_length=sequence_length, batch_size=batch_size)
    if not is_text(source):
        return _model_inputs(source, model, num_samples)
    check_paths(source)
    parts, sequence_length = _parts(source), window_length(model, sequence_length)
    _check_parts(parts, model, sequence_length)
    shares = share_out(num_samples, [weight for _, weight in parts])
    made = []
    for (part, _), share in zip(parts, shares, strict=True):
        if isinstance(part, str) and part == SELF:
            made.append(sample_windows(model, share, sequence_length, batch_size, seed))
        else:
            made.append(_text_windows(part, tokenizer, model, share, sequence_length, seed))
    check_token_ids(windows := torch.cat(made), model)
    batches = math.ceil(num_samples / batch_size)
    return [{"input_ids": windows[first::batches].contiguous()} for first in range(batches)]


def is_text(source: Any) -> bool:
    """Return whether a source is cut into windows, rather than read as batches of model inputs."""
    return _is_one_text(source) or _is_mixture(source)


def check_paths(source: Any) -> None:
    """Raise `FileNotFoundError` when a source, or a part of a mixture, is a file that is not there."""
    for part, _ in _parts(source) if is_text(source) else ():
        check_source(part)


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Share `total` out by weight: largest remainders first, at least one each.

    Raises:
        `ValueError`: a weight is not a positive number, or there is not one for each.

    ```python
    >>> share_out(10, [2, 1, 1])
    [5, 3, 2]

    ```
    """
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"The weight of a source in a mixture must be a positive number; got {weight!r}.")
    if total < len(weights):
        raise ValueError(f"A mixture of {len(weights)} sources needs num_samples of at least as many; got {total}.")
    whole = sum(Fraction(weight) for weight in weights)
    exact = [total * Fraction(weight) / whole for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    while 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] = 1
    return shares


def _text_windows(source: Any, tokenizer: Any, model: Any, count: int, length: int, seed: int) -> Tensor:
    """Return (count, length) int64 windows of one source of text."""
    documents, tokenized = documents_of(source, seed)
    if tokenized:
        return pack(documents, count, length)
    return pack_text(documents, resolve_tokenizer(tokenizer, model), count, length, seed)


def _parts(source: Any) -> Sequence[tuple[Any, Any]]:
    """Return the sources of a mixture with their weights; one source is a mixture of one."""
    return source if _is_mixture(source) else [(source, 1)]


def _is_one_text(source: Any) -> bool:
    strings = isinstance(source, list | tuple) and source and all(isinstance(item, str) for item in source)
    return bool(strings) or isinstance(source, str | Path) or is_dataset(source)


def _is_mixture(source: Any) -> bool:
    pairs = isinstance(source, list | tuple) and all(isinstance(item, tuple) and len(item) == 2 for item in source)
    return pairs and len(source) > 0


def _check_counts(**counts: Any) -> None:
    for key, value in counts.items():
        unset = key == "sequence_length" and value is None
        if not unset and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{key} must be an integer of at least 1; got {value!r}.")


def _check_parts(parts: Sequence[tuple[Any, Any]], model: Any, sequence_length: int) -> None:
    """Check what can be known of sources and model before any text is read."""
    for part, _ in parts:
        if not _is_one_text(part):
            raise ValueError(f"A mixture is made of sources of text; got {_describe(part)}.")
        if isinstance(part, str) and part == SELF:
            check_writes_text(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} reads one text and writes another; give batches with input_ids and labels as "
            "calibration data instead of text."
        )
    check_context(model, sequence_length)


def _model_inputs(source: Any, model: Any, num_samples: int) -> list[dict[str, Any]]:
    """Take batches that are model inputs already, until they hold `num_samples` sequences."""
    if isinstance(source, Mapping | Tensor) or not isinstance(source, Iterable):
        raise ValueError(
            f"Calibration data must be {_KINDS}; got {_describe(source)}. Put a single batch into a list; of a "
            "DatasetDict take one split."
        )
    batches: list[dict[str, Any]] = []
    found = 0
    for item in source:
        batch = _as_model_input(item, len(batches))
        _check_values(batch, len(batches), model)
        for key in ("input_ids", "decoder_input_ids"):
            if isinstance(batch.get(key), Tensor) and batch[key].ndim == 2:
                check_context(model, batch[key].shape[1])
        batches.append(batch)
        found += next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        if found >= num_samples:
            break
    if not batches:
        raise ValueError(f"Calibration data is empty; give {_KINDS}.")
    return batches


def _as_model_input(item: Any, index: int) -> dict[str, Any]:
    """Turn a tensor or mapping into a dict of tensors on the CPU."""
    if isinstance(item, Tensor):
        if item.ndim != 2 or item.is_floating_point():
            raise ValueError(
                f"A tensor among calibration batches is read as token ids (B, L); batch {index} is {item.dtype} of "
                f"shape {tuple(item.shape)}. Name other inputs in a dict."
            )
        item = {"input_ids": item.long()}
    if not isinstance(item, Mapping):
        raise ValueError(f"Calibration data must be {_KINDS}; item {index} is {_describe(item)}.")
    batch = {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in item.items()}
    sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    if not sizes or 0 in sizes:
        raise ValueError(f"Calibration batch {index} holds no sequence; each needs tensors with a batch dimension.")
    return batch


def _check_values(batch: dict[str, Any], index: int, model: Any) -> None:
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"Calibration batch {index} has NaN or Inf in {key!r}; clean the data first.")
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        check_token_ids(ids, model)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    for key in ("decoder_input_ids", "labels"):  # the decoder reads labels where it is given nothing else
        ids = batch.get(key)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            check_token_ids(ids[ids != -100] if key == "labels" else ids, model.get_decoder())


def _describe(value: Any) -> str:
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
