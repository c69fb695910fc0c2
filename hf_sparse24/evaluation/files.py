"""Figures of a model on files: pairs in a table, and images in a folder, read by the processors beside the model.

A table is .jsonl, .json, .csv or .parquet. Each row has `target`, a text, and what belongs to it: `input`, a text, or
`audio`, the path of a sound beside the table. Of an encoder the input has to find its target among all; of an
encoder-decoder model the target is what it should write. All rows are used, so calibrate on others.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, AutoImageProcessor
from transformers.audio_utils import load_audio
from transformers.image_utils import load_image
from transformers.utils import logging

from hf_sparse24.calibration.documents import DATA_FORMATS, check_file, load_rows
from hf_sparse24.calibration.tokenizer import load_tokenizer
from hf_sparse24.calibration.windows import context_length
from hf_sparse24.evaluation.encoders import retrieval_recall
from hf_sparse24.evaluation.figures import Evaluation
from hf_sparse24.evaluation.language import nll
from hf_sparse24.evaluation.running import Batch

logger = logging.get_logger(__name__)

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def evaluate_pairs(
    model: nn.Module, processors: str, table: Path, max_length: int | None = None, batch_size: int = 32
) -> Evaluation:
    """Measure what fits the model: recall at 1 of an encoder, loss per target token of an encoder-decoder model.

    Special tokens before the text of a target (a language, a task) are given to the model and not scored. Sounds are
    read one by one, so that nothing depends on padding.

    Args:
        model (`nn.Module`): of transformers.
        processors (`str`): the folder or Hub id with the model's tokenizer and, for sounds, feature extractor.
        table (`Path`): pairs, see above.
        max_length (`int`, *optional*): read only the first so many tokens of a text, special ones included. None: a
            text longer than the model reads is an error.
        batch_size (`int`): pairs of text per forward pass.

    Raises:
        `ValueError`: the model is neither or has no tokenizer, or the table is not as described, or a text or sound is
            too long.
        `FileNotFoundError`: the table or a sound is not there.
        `ImportError`: there are sounds, and what transformers reads them with is not installed.
    """
    inputs, targets = _read_pairs(table)
    kind = _kind(model)
    tokenizer = load_tokenizer(processors)
    if kind == "encoder":
        if isinstance(inputs[0], Path):
            raise ValueError(f"{type(model).__name__} reads text; {table.name} has a column audio. Name it input.")
        texts = [_tokens(tokenizer, part, model, max_length) for part in (inputs, targets)]
        scores = retrieval_recall(model, *texts, batch_size)
        if scores.tied:
            logger.warning(
                f"{scores.tied} of {scores.queries} inputs find another target as near as their own, which counts as "
                "found."
            )
        return Evaluation("recall_at_1", scores.recall_at_1, scores.queries, "pairs", dataset=table.name)
    decoded = [_decoded(ids, tokenizer, model) for ids in _tokens(tokenizer, targets, model, max_length, True)]
    if isinstance(inputs[0], Path):
        batches = _sounds(inputs, decoded, AutoFeatureExtractor.from_pretrained(processors))
    else:
        batches = _texts(_tokens(tokenizer, inputs, model, max_length), decoded, tokenizer, batch_size)
    return Evaluation("nll", nll(model, batches), len(targets), "pairs", dataset=table.name)


def image_batches(processors: str, images: Sequence[Path], batch_size: int = 16) -> Iterator[dict[str, Tensor]]:
    """Yield images, resized and normalised by the model's own image processor.

    Yields:
        `dict`: `{"pixel_values": ...}` as the model's forward takes it.

    Args:
        processors (`str`): the folder or Hub id with the model's image processor.
        images (`Sequence[Path]`): files, see `images_in`.
        batch_size (`int`): images per forward pass.

    Raises:
        `ImportError`: Pillow is not installed.
    """
    processor = AutoImageProcessor.from_pretrained(processors)
    for start in range(0, len(images), batch_size):
        read = [load_image(str(path)) for path in images[start : start + batch_size]]
        yield {"pixel_values": processor(images=read, return_tensors="pt")["pixel_values"]}


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and its folders, in the order of their paths.

    Raises:
        `ValueError`: there are none.
    """
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not images:
        raise ValueError(f"There are no images in {folder}; it takes a folder with {', '.join(_IMAGES)}.")
    return images


def _kind(model: nn.Module) -> str:
    """Return "encoder" or "encoder-decoder", or say that pairs measure neither."""
    if not model.can_generate():  # T5 without a head still has an encoder
        return "encoder"
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"Pairs measure encoders and encoder-decoder models; {type(model).__name__} writes text. Measure its "
            "perplexity on a text."
        )
    return "encoder-decoder"


def _read_pairs(table: Path) -> tuple[list[Any], list[str]]:
    """Return the inputs, texts or paths of sounds, and the targets."""
    check_file(table, "Pairs were")
    if table.suffix.lower() not in DATA_FORMATS:
        raise ValueError(f"Pairs are rows of {', '.join(DATA_FORMATS)}; got {table.name}.")
    rows = load_rows(table)
    columns = rows.column_names
    found = [column for column in ("input", "audio") if column in columns]
    if len(found) != 1 or "target" not in columns:
        raise ValueError(
            f"Pairs need a column 'target' and one of 'input' and 'audio'; {table.name} has {', '.join(columns)}."
        )
    for column in (found[0], "target"):
        wrong = next((number for number, value in enumerate(rows[column], 1) if not isinstance(value, str)), None)
        if wrong:
            raise ValueError(f"Row {wrong} of {table.name} has no text as its {column!r}.")
    inputs = [table.parent / name for name in rows["audio"]] if found[0] == "audio" else list(rows["input"])
    return inputs, list(rows["target"])


def _tokens(
    tokenizer: Any, texts: Sequence[str], model: Any, max_length: int | None, as_target: bool = False
) -> list[list[int]]:
    """Tokenize texts, special tokens included; without `max_length` none may be longer than the context."""
    options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    name = "text_target" if as_target else "text"
    ids = tokenizer(**{name: list(texts)}, **options)["input_ids"]
    longest, context = max(range(len(ids)), key=lambda index: len(ids[index])), context_length(model)
    if context is not None and len(ids[longest]) > context:
        raise ValueError(
            f"{type(model).__name__} reads {context} tokens, and row {longest + 1} has {len(ids[longest])}. Shorten "
            f"it, or read only its beginning with max_length={context} (--max-length)."
        )
    return ids


def _decoded(ids: list[int], tokenizer: Any, model: Any) -> tuple[Tensor, Tensor]:
    """Return what the decoder reads of a target, and its labels: -100 for special tokens before the text."""
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = model.generation_config.decoder_start_token_id
    if start is None:
        raise ValueError(
            f"The config of {type(model).__name__} does not say what its decoder begins with; set its "
            "decoder_start_token_id."
        )
    labels = torch.tensor(ids[1:] if ids[:1] == [start] else ids)
    special = torch.isin(labels, torch.tensor(tokenizer.all_special_ids, dtype=torch.long))
    return torch.cat([torch.tensor([start]), labels[:-1]]), labels.masked_fill(special.cumprod(0).bool(), -100)


def _texts(
    inputs: list[list[int]], targets: list[tuple[Tensor, Tensor]], tokenizer: Any, batch_size: int
) -> Iterator[Batch]:
    for start in range(0, len(inputs), batch_size):
        encoded = tokenizer.pad({"input_ids": inputs[start : start + batch_size]}, return_tensors="pt")
        read, labels = zip(*targets[start : start + batch_size], strict=True)
        yield {
            **encoded,
            "decoder_input_ids": pad_sequence(list(read), batch_first=True, padding_value=tokenizer.pad_token_id),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=-100),
        }


def _sounds(paths: list[Path], targets: list[tuple[Tensor, Tensor]], extractor: Any) -> Iterator[Batch]:
    for path, (read, labels) in zip(paths, targets, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"The table names the sound {str(path)!r}; there is no such file.")
        sound = load_audio(str(path), sampling_rate=extractor.sampling_rate)
        most = getattr(extractor, "n_samples", None)  # Whisper would cut off the rest
        if most is not None and len(sound) > most:
            raise ValueError(
                f"{path.name} takes {len(sound) / extractor.sampling_rate:.1f} s; the model reads "
                f"{most / extractor.sampling_rate:.0f} s. Cut it into shorter ones."
            )
        features = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        yield {**features, "decoder_input_ids": read[None], "labels": labels[None]}
