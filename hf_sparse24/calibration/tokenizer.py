"""The tokenizer of a model: found by its name, and refused where it is of another model or knows no words.

transformers makes a tokenizer of special tokens alone for a folder without tokenizer files (BERT's has five): every
text is then a row of unknown tokens, and nothing fails.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

_SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")  # padding is the user's


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer in a folder or of a Hub id.

    Raises:
        `ValueError`: there is none, or one that knows no words.
    """
    remedy = f"save it there: AutoTokenizer.from_pretrained(DENSE_MODEL).save_pretrained({str(name)!r})"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a class without its files fails in its own way, some with a TypeError
        raise ValueError(
            f"The tokenizer of the model is needed, and {name} has none that transformers reads; {remedy}"
        ) from error
    if not _knows_words(tokenizer):
        raise ValueError(
            f"The tokenizer of the model is needed, and {name} lacks its files: what transformers makes without them, "
            f"a {type(tokenizer).__name__} of {len(tokenizer)} special tokens, reads no text; {remedy}"
        )
    return tokenizer


def resolve_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Return the tokenizer, found by its name or by the model's where need be.

    Raises:
        `ValueError`: there is none of this name, or it does not fit the model (`check_tokenizer`).
    """
    if tokenizer is None or isinstance(tokenizer, str | Path):
        name = tokenizer or getattr(model, "name_or_path", None)
        if not name:
            raise ValueError(
                "Calibration text needs a tokenizer, and the model has no name to find it by; pass tokenizer."
            )
        try:
            tokenizer = load_tokenizer(name)
        except ValueError as error:
            raise ValueError(f"{error}, or pass another as tokenizer (--tokenizer).") from error
    check_tokenizer(tokenizer, model)
    return tokenizer


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer with more tokens than the model, and warn where special tokens are not those of its config.

    Tokens that were added to a tokenizer do not count: a model without them works as long as no text has any.

    Raises:
        `ValueError`: the tokenizer has more tokens than the model has embeddings, or none but special ones.
    """
    if not _knows_words(tokenizer):
        raise ValueError(
            f"The tokenizer, a {type(tokenizer).__name__}, has no tokens but special ones, as transformers makes it "
            "where its files are missing. Use the tokenizer of this model, from a folder with its files."
        )
    count, known = _embeddings(model), getattr(tokenizer, "vocab_size", None)
    if count is not None and isinstance(known, int) and known > count:
        raise ValueError(
            f"The tokenizer does not match the model: it has {known} tokens, and {type(model).__name__} has {count} "
            "token embeddings. Use the tokenizer of this model."
        )
    for name in _SPECIAL:
        found, expected = getattr(tokenizer, name, None), _expected_ids(model, name)
        if found is not None and expected and found not in expected:
            logger.warning(
                f"The tokenizer may be of another model: its {name} is {found}, the config of {type(model).__name__} "
                f"has {' or '.join(map(str, expected))}."
            )


def check_token_ids(ids: Tensor, model: Any) -> None:
    """Raise `ValueError` when an id has no row among the model's token embeddings, if it has any.

    It would be an index error, on a GPU one that ends the process.
    """
    count = _embeddings(model)
    if count is None or not ids.numel() or (ids.min() >= 0 and ids.max() < count):
        return
    wrong = int(ids.min() if ids.min() < 0 else ids.max())
    raise ValueError(
        f"The tokenizer does not match the model: a token id is {wrong}, and {type(model).__name__} has "
        f"{count} token embeddings. Use the tokenizer of this model."
    )


def _knows_words(tokenizer: Any) -> bool:
    """Tell a tokenizer from one that was made without files, which has special tokens and at most one mark of them."""
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    special = getattr(tokenizer, "all_special_tokens", ())
    return not vocabulary or len(vocabulary.keys() - set(special)) > 1


def _embeddings(model: Any) -> int | None:
    """Return how many tokens a model has embeddings of, or None if it has none of text."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):  # not a transformers model, or one of several towers
        return None
    return None if weight is None else len(weight)


def _expected_ids(model: Any, name: str) -> list[int]:
    """Return what a config allows as a special token; chat models may end a text in several ways."""
    if not hasattr(model, "config"):
        return []
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    values = [getattr(config, name, None) for config in configs]
    ids = [id_ for value in values for id_ in (value if isinstance(value, list) else [value])]
    return sorted({id_ for id_ in ids if isinstance(id_, int)})
