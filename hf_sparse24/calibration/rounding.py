"""Layers that round as their packed 8-bit forms will, while a model is being pruned and trained.

What is trained is then what runs: the hidden states that later blocks are fitted to carry the rounding of the blocks
before, and Adam moves the weights to where rounding them, and what they read, does least harm. Gradients pass the
rounding as if it were not there (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_sparse24.packing import QUANTIZED_DTYPES, quantize_rows, quantize_tokens


@contextmanager
def rounded(layers: Iterable[tuple[nn.Module, int]], quantization: str | None) -> Iterator[None]:
    """While active, layers round their weights per output channel and what they read per token.

    Args:
        layers (`Iterable[tuple]`): linear layers, each with the input dimension of its weight.
        quantization (`str`, *optional*): `"int8"` or `"fp8"`; None rounds nothing.
    """
    if quantization is None:
        yield
        return
    layers, handles = list(layers), []
    quantize = partial(quantize_tokens, dtype=QUANTIZED_DTYPES[quantization])

    def round_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (read, *rest), keys = [*args, *kwargs.values()], list(kwargs)
        values = [_Round.apply(read, quantize), *rest]
        return tuple(values[: len(args)]), dict(zip(keys, values[len(args) :], strict=True))

    try:
        for layer, dim in layers:
            parametrize.register_parametrization(layer, "weight", _RoundedWeight(quantization, dim))
            handles.append(layer.register_forward_pre_hook(round_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, _ in layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                if layer._parameters.get("bias") is not None:  # the weight came back last; it was first
                    layer._parameters["bias"] = layer._parameters.pop("bias")


class _RoundedWeight(nn.Module):
    """A weight as it will be when it is packed, over the parameter that stays what it is."""

    def __init__(self, quantization: str, dim: int) -> None:
        super().__init__()
        self.quantization, self.dim = quantization, dim

    def forward(self, weight: Tensor) -> Tensor:
        return _Round.apply(weight.movedim(self.dim, -1), self._quantize).movedim(-1, self.dim)

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = quantize_rows(rows, self.quantization)
        return values, scale.unsqueeze(-1)


class _Round(torch.autograd.Function):
    """Round rows (..., K) to 8 bits and back; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        values, scale = quantize(rows)
        return (values.float() * scale).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
