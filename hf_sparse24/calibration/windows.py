"""Packed windows: text of any length joined, and cut into rows of tokens that a model can read.

Decides how documents follow each other, which special tokens stand where, and whether lengths fit the model.
Where the text comes from is decided in `text`.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_DEFAULT_LENGTH = 1024  # tokens per window, where the model reads as many
_CHARACTERS_PER_PIECE = 8  # per token of a window: about two windows of English, more of other scripts


def pack_text(documents: Iterable[str], tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Tokenize as many documents as (count, length) int64 windows take, each framed in its special tokens.

    A document much longer than a window is read in pieces, one of each document before a second of any.
    """
    before, between, after = _special_tokens(tokenizer)
    pieces = _pieces(documents, _CHARACTERS_PER_PIECE * length, random.Random(seed))
    encoded = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces)
    return pack((ids + between for ids in encoded if ids), count, length, before, after)


def pack(
    documents: Iterable[list[int]], count: int, length: int, before: Sequence[int] = (), after: Sequence[int] = ()
) -> Tensor:
    """Join token ids, only as many as needed, and cut them into windows with something before and after each."""
    inside = length - len(before) - len(after)
    if inside < 1:
        raise ValueError(f"sequence_length={length} leaves no room for text between special tokens; raise it.")
    ids: list[int] = []
    for document in documents:
        ids += document
        if len(ids) >= count * inside:
            break
    if len(ids) < count * inside:
        raise ValueError(
            f"{count} windows of {length} tokens need {count * inside} tokens; the dataset gave {len(ids)}, enough "
            f"for {len(ids) // inside} windows. Lower num_samples or sequence_length, or give more text."
        )
    text = torch.tensor(ids[: count * inside]).view(count, inside)
    return torch.cat([torch.tensor([[*before]] * count).long(), text, torch.tensor([[*after]] * count).long()], dim=1)


def context_length(model: Any) -> int | None:
    """Return the most tokens that the model reads at once, or None if its config sets no limit."""
    if not hasattr(model, "config"):
        return None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:  # RoBERTa counts positions from behind it
            return context - padding - 1
    return context


def window_length(model: Any, asked: int | None) -> int:
    """Return how many tokens a window has: what was asked, or else 1024, or the model's context if that is less."""
    return asked or min(_DEFAULT_LENGTH, context_length(model) or _DEFAULT_LENGTH)


def check_context(model: Any, length: int) -> None:
    """Raise `ValueError` when sequences are longer than what the model reads at once: some would run, badly."""
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"Sequences of {length} tokens were asked for; {type(model).__name__} has a context of {context}. "
            f"Use {context} or less (sequence_length, or window where perplexity is measured)."
        )


def end_of_line_or_word(text: str, position: int, reach: int) -> int:
    """Return where a line, or else a word, ends at most `reach` characters before `position`, or else `position`."""
    for separator in ("\n", " "):
        found = text.rfind(separator, max(position - reach, 0), position)
        if found >= 0:
            return found + 1
    return position


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Return what stands before a window, between two documents, and after a window."""
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    between = end if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    between = [] if between is None else [between]
    if start is not None and end is not None:
        return [start], between, [end]
    start = tokenizer.bos_token_id
    return ([start] if start is not None and tokenizer("")["input_ids"][:1] == [start] else []), between, []


def _pieces(documents: Iterable[str], size: int, rng: random.Random) -> Iterator[str]:
    """Yield a random piece of each document in turn, then all other pieces in random order."""
    rest: list[str] = []
    for document in documents:
        first, *others = rng.sample(pieces := list(_cut(document, size)), len(pieces)) or [""]
        rest += others
        yield first
    rng.shuffle(rest)
    yield from rest


def _cut(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters, at the ends of lines or words."""
    start = 0
    while start < len(text):
        last = start + size >= len(text)
        end = len(text) if last else end_of_line_or_word(text, start + size, size // 4)
        yield text[start:end]
        start = end
