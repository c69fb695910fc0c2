"""What was found fastest on a machine: measured once, remembered in a file of the user's cache, never in a checkpoint.

The best algorithm of a library differs by GPU, library version, shape, number of tokens and dtype, and numbers of
algorithms mean nothing to another version. So the key of a choice has all of these in it. The file is read once a
process; a new choice is added to what other processes have written meanwhile, under a lock, and the file is replaced
in one step.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FORMAT = 1


class Choice(NamedTuple):
    """An algorithm of a library, and how long it took when it was chosen."""

    algorithm: int
    split_k: int
    microseconds: float


class Choices:
    """Choices by key, in memory and in a file.

    Args:
        path (`Path`, *optional*): the file. Default: `hf_sparse24/algorithms-1.json` in the Hugging Face cache.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(HF_HOME) / "hf_sparse24" / f"algorithms-{_FORMAT}.json"
        self._known: dict[str, Choice] | None = None
        self._lock = threading.Lock()

    def find(
        self, key: str, candidates: Callable[[], Iterable[tuple[int, int]]], measure: Callable[..., float]
    ) -> Choice:
        """Return the choice for a key; where there is none, measure the candidates and remember the fastest.

        Args:
            key (`str`): all that the choice depends on.
            candidates (`Callable`): returns pairs of algorithm and split-k.
            measure (`Callable`): from such a pair to microseconds; infinity where the library refuses it.

        Raises:
            `RuntimeError`: the library refuses every candidate.
        """
        with self._lock:  # one thread measures at a time: two would disturb each other
            if self._known is None:
                self._known = self._read()
            if key not in self._known:
                self._add(key, _fastest(key, candidates(), measure))
            return self._known[key]

    def known(self, key: str) -> Choice | None:
        """Return the choice for a key if there is one."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(key)

    def _add(self, key: str, choice: Choice) -> None:
        known = self._known = (self._known or {}) | {key: choice}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                known = self._known = self._read() | known
                choices = {name: chosen._asdict() for name, chosen in sorted(known.items())}
                temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps({"format": _FORMAT, "choices": choices}, indent=1) + "\n")
                temporary.replace(self.path)
        except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
            logger.warning_once(f"{self.path} cannot be written ({error}); kernels are tuned again in every process.")

    def _read(self) -> dict[str, Choice]:
        """Return what the file holds; what of it is not ours is left out, with a warning."""
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, not {_FORMAT}")
            found = {key: _checked(choice) for key, choice in content["choices"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning_once(f"{self.path} is not a file of tuned kernels ({error}) and is replaced.")
            return {}
        if None in found.values():
            logger.warning_once(f"{self.path} is not a file of tuned kernels in all its entries; some are ignored.")
        return {key: choice for key, choice in found.items() if choice is not None}


def bucket(tokens: int) -> int:
    """Return the power of two, 16 at least, that stands for a number of tokens.

    ```python
    >>> [bucket(tokens) for tokens in (1, 16, 17, 1000)]
    [16, 16, 32, 1024]

    ```
    """
    return max(16, 1 << (tokens - 1).bit_length())


def _fastest(key: str, candidates: Iterable[tuple[int, int]], measure: Callable[..., float]) -> Choice:
    measured = [Choice(*candidate, measure(*candidate)) for candidate in candidates]
    fastest = min(measured, key=lambda choice: choice.microseconds, default=None)
    if fastest is None or math.isinf(fastest.microseconds):
        raise RuntimeError(f"No algorithm of the library runs {key}.")
    return fastest


def _checked(choice: dict[str, int | float]) -> Choice | None:
    """Return the choice that an entry of the file describes, or None."""
    try:
        algorithm, split_k, microseconds = choice["algorithm"], choice["split_k"], float(choice["microseconds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    valid = isinstance(algorithm, int) and isinstance(split_k, int) and microseconds > 0
    return Choice(algorithm, split_k, microseconds) if valid else None
