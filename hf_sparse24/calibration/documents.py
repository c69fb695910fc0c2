"""Where text comes from: files, datasets and strings become documents, and the last tenth of a file is held out.

Calibration reads `documents_of` a source and evaluation the `held_out_documents` of a file; both cut in the same
place, so that no text is in both.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_sparse24.calibration.windows import end_of_line_or_word

HELD_OUT = 0.1
DATA_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
_SHUFFLE_BUFFER = 1000


def documents_of(source: Any, seed: int) -> tuple[Iterable[Any], bool]:
    """Return the documents of a source in random order, without what is held out of a file.

    Args:
        source: a file, the name of a dataset, a `datasets.Dataset` or a list of strings.
        seed (`int`): of the order.

    Returns:
        `tuple[Iterable, bool]`: the documents, and whether they are lists of token ids already; else they are strings.

    Raises:
        `ValueError`: a text is not UTF-8, or a dataset has no rows or no column that can be read.
        `FileNotFoundError`: there is no such file.
        `ModuleNotFoundError`: `datasets` is needed and not installed.
    """
    source = _open(source)
    if is_dataset(source):
        return _column(_shuffled(source, seed))
    return _shuffled(source, seed), False


def held_out_documents(path: Path) -> tuple[Iterable[Any], bool]:
    """Return the last tenth of a file in its order, in the form of `documents_of`, which never reads it.

    Args:
        path (`Path`): .csv, .json, .jsonl or .parquet, of which rows are held out; all else is UTF-8 text.

    Raises:
        As `documents_of`.
    """
    check_file(path, "Text was")
    if path.suffix.lower() in DATA_FORMATS:
        return _column(iter(split_rows(load_rows(path))[1]))
    return [split_text(_read(path))[1]], False


def check_source(source: Any) -> None:
    """Raise `FileNotFoundError` when a source of calibration text is plainly a file and is not there."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None or path.exists():
        return
    if isinstance(source, Path) or path.suffix.lower() in _TEXT_SUFFIXES:
        raise FileNotFoundError(f"Calibration text was asked from {str(source)!r}; there is no such file.")


def check_file(path: Path, asked: str) -> None:
    """Raise `FileNotFoundError` when a file is not there; `asked` says what was to be read, as in "Text was"."""
    if not path.is_file():
        raise FileNotFoundError(f"{asked} asked from {str(path)!r}; there is no such file.")


def split_text(text: str) -> tuple[str, str]:
    """Cut a text in two, at the end of a line or else of a word: what calibration may see, and what it never does.

    Returns:
        `tuple[str, str]`: the calibration part and the held-out part, at least the last tenth; joined, the text.

    ```python
    >>> split_text("All work and no play. " * 10)[1]
    'All work and no play. '

    ```
    """
    cut = end_of_line_or_word(text, int(len(text) * (1 - HELD_OUT)), len(text) // 20)
    return text[:cut], text[cut:]


def split_rows(rows: Any) -> tuple[Any, Any]:
    """Cut a `datasets.Dataset` in two: what calibration may see, and the last tenth of the rows, rounded up.

    Raises:
        `ValueError`: there is one row only.
    """
    if len(rows) == 1:
        raise ValueError(
            "The last tenth of a file's rows is held out for evaluation, and this file has a single row. Give more "
            "rows, or a text file."
        )
    cut = int(len(rows) * (1 - HELD_OUT))
    return rows.select(range(cut)), rows.select(range(cut, len(rows)))


def load_rows(path: Path) -> Any:
    """Return the rows of a file of `DATA_FORMATS` as a `datasets.Dataset`, all of them.

    Raises:
        `ModuleNotFoundError`: `datasets` is not installed.
    """
    datasets = _import_datasets(path)
    return datasets.load_dataset(DATA_FORMATS[path.suffix.lower()], data_files=str(path), split="train")


def is_dataset(source: Any) -> bool:
    """Return whether this is a `datasets.Dataset` or `IterableDataset`."""
    return hasattr(source, "column_names") and hasattr(source, "features")


def _open(source: Any) -> Any:
    """Turn a file into documents, without what is held out, and a name into a dataset; all else is open."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.is_file():
        is_data = path.suffix.lower() in DATA_FORMATS
        return split_rows(load_rows(path))[0] if is_data else [split_text(_read(path))[0]]
    check_source(source)
    return _load_named(str(source))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"A text must be UTF-8; {path} is not ({error.reason}).") from error


def _load_named(name: str) -> Any:
    datasets = _import_datasets(name)
    streaming = not datasets.config.HF_HUB_OFFLINE  # offline, only what is in the cache can be read
    name, _, configuration = (name, "", "") if os.path.isdir(name) else name.partition(":")
    return datasets.load_dataset(name, configuration or None, split="train", streaming=streaming)


def _import_datasets(source: str | Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Reading the dataset {str(source)!r} needs the package datasets: pip install datasets."
        ) from error
    return datasets


def _shuffled(source: Any, seed: int) -> Iterator[Any]:
    """Yield the rows of a dataset, or the strings of a list, in random order."""
    if hasattr(source, "__len__"):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        return (source[int(index)] for index in order)
    return iter(source.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))


def _column(rows: Iterator[dict[str, Any]]) -> tuple[Iterable[Any], bool]:
    """Return what stands in the column to read, and whether that is token ids."""
    first = next(rows, None)
    if first is None:
        raise ValueError("The dataset has no rows; give one that has some.")
    rows = itertools.chain([first], rows)
    strings = [name for name, value in first.items() if isinstance(value, str)]
    for column in ("input_ids", "text", *(strings if len(strings) == 1 else ())):
        if column in first:
            tokenized = column == "input_ids"
            return (map(_row_ids, rows) if tokenized else (row[column] or "" for row in rows)), tokenized
    raise ValueError(
        "A dataset of text needs a column 'text' or 'input_ids', or a single column of strings; this one has "
        f"{', '.join(first)}. Rename the column to read with rename_column(..., 'text')."
    )


def _row_ids(row: dict[str, Any]) -> list[int]:
    """Return the token ids of a row, without those that its attention mask hides."""
    ids = torch.as_tensor(row["input_ids"]).flatten()
    mask = row.get("attention_mask")
    return (ids if mask is None else ids[torch.as_tensor(mask).flatten().bool()]).tolist()
