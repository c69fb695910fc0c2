"""One quantization for layers that read the same input: q, k and v, or gate and up.

Outside of `torch.compile`, where equal quantizations become one by themselves, siblings are separate modules that are
called one after the other with the same tensor. The first quantizes it and leaves the result for the others.
"""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse24.kernels import dispatch


class _Left(NamedTuple):
    """A quantized input, and what must still be so for it to be taken."""

    input: "weakref.ref[Tensor]"
    written: int  # torch's count of writes to the input
    dtype: torch.dtype
    where: tuple[int, int]
    waiting: set[int]
    quantized: tuple[Tensor, Tensor]

    def serves(self, sibling: int, input: Tensor, dtype: torch.dtype, where: tuple[int, int]) -> bool:
        same = self.input() is input and self.written == input._version
        return same and sibling in self.waiting and (self.dtype, self.where) == (dtype, where)


class SharedInput:
    """The quantized input of siblings.

    A result is taken at most once by each sibling, for the very tensor that was quantized, if torch counted no write
    to it since, on the same stream and in the same CUDA graph or none. So a wrong one would take a write that torch
    does not see (by a kernel of somebody's own, or through `.data`) between the calls of two siblings. Tensors of
    inference mode count no writes and are quantized at every call.

    Args:
        siblings (`int`): how many there are; each asks by its number.
    """

    def __init__(self, siblings: int) -> None:
        self.siblings = siblings
        self._left: _Left | None = None
        self._lock = threading.RLock()

    def quantize(self, sibling: int, input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `kernels.dispatch.quantize_per_token(input, dtype)`, from memory where a sibling left it.

        Args:
            sibling (`int`): the number of the layer that asks.
            input (`Tensor`): (..., K).
            dtype (`torch.dtype`): torch.int8 or torch.float8_e4m3fn.
        """
        if input.is_inference():
            return dispatch.quantize_per_token(input, dtype)
        where = _where(input)
        with self._lock:
            left = self._left
            if left is not None and left.serves(sibling, input, dtype, where):
                left.waiting.discard(sibling)
                self._left = left if left.waiting else None
                return left.quantized
            quantized = dispatch.quantize_per_token(input, dtype)
            waiting = set(range(self.siblings)) - {sibling}
            reference = weakref.ref(input, self._forget)  # the result lives no longer than the input
            self._left = _Left(reference, input._version, dtype, where, waiting, quantized)
            return quantized

    def _forget(self, input: "weakref.ref[Tensor]") -> None:
        left = self._left
        if left is not None and left.input is input:
            self._left = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput":
        """Copy without what was left."""
        return SharedInput(self.siblings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without what was left."""
        return SharedInput, (self.siblings,)


def _where(input: Tensor) -> tuple[int, int]:
    """Return the current stream, and the CUDA graph that is being captured or 0."""
    if not input.is_cuda:
        return 0, 0
    stream = torch._C._cuda_getCurrentRawStream(input.device.index)
    if not torch.cuda.is_current_stream_capturing():
        return stream, 0
    from cuda.bindings import driver

    return stream, int(driver.cuStreamGetCaptureInfo(stream)[2])
