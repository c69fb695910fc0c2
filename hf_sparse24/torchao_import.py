"""Let transformers import torchao, where it is installed, without what that prints beside a CPU build of torch.

transformers imports torchao with its quantizers. torchao then warns of every library for GPUs that it cannot load,
which without CUDA is all of them and no loss, and torch warns of two enumerations that torchao registers. Those lines
alone are held back, and only during this import: on a machine with CUDA a library that does not load is news.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _is_noise(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if record.name == "torchao":
        return torch.version.cuda is None and message.startswith("Failed to load ") and ".so: " in message
    return "is an Enum subclass and is now natively supported" in message and all(
        getattr(argument, "__module__", "").startswith("torchao.") for argument in record.args or ()
    )


@contextmanager
def without_noise() -> Iterator[None]:
    """Hold back those lines, and no others, while it lasts."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]

    def keep(record: logging.LogRecord) -> bool:
        return not _is_noise(record)

    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


with without_noise():
    import transformers.quantizers.auto  # noqa: F401
