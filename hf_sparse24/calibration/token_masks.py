"""Which tokens are padding, as the stack of a chain of blocks was told by what is around it."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

Told = dict[str, dict[str, Any]]


class TokenMasks(NamedTuple):
    """Which tokens of a batch are real, as the stack of a chain was told: bool (batch, tokens), False for padding.

    Attributes:
        own (`Tensor`, *optional*): those of its hidden states.
        handed (`Tensor`, *optional*): those of what it is handed beside them, the encoder's output.
    """

    own: Tensor | None
    handed: Tensor | None


@contextmanager
def listening(model: nn.Module, names: Sequence[str], told: Told) -> Iterator[None]:
    """While active, put into `told` what the modules around some blocks are called with, by their names."""
    around = {name[:end] for name in names for end in [0, *(dot.start() for dot in re.finditer(r"\.", name))]}
    handles = []
    for name in around:
        module = model.get_submodule(name)
        signature = inspect.signature(module.forward)

        def listen(_: nn.Module, args: Any, kwargs: Any, name: str = name, signature: Any = signature) -> None:
            told[name] = {**kwargs, **signature.bind_partial(*args, **kwargs).arguments}

        handles.append(module.register_forward_pre_hook(listen, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masks_of_stack(model: nn.Module, block: str, told: Told) -> TokenMasks:
    """Return the masks of the stack of a block, from what the modules around it were called with."""
    return TokenMasks(*(_nearest(model, block, key, told) for key in ("attention_mask", "encoder_attention_mask")))


def _nearest(model: nn.Module, block: str, key: str, told: Told) -> Tensor | None:
    """Return the (batch, tokens) mask with which the nearest module around a block was called, or None.

    No further out than the stack of the block, the first that is a model by itself: an image encoder's blocks know
    nothing of the text's padding. Only where that has a mask in another form, made by what is around it.
    """
    while block:
        block = block.rpartition(".")[0]
        mask = told.get(block, {}).get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.bool()
        if mask is None and isinstance(model.get_submodule(block), PreTrainedModel):
            return None
    return None
