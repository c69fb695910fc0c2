"""The roofline of this machine, measured in the same run: how fast it copies and multiplies, and what a call needs.

A projection of M tokens reads its weight, its scales and its input once, writes its output once, and does 2MNK
operations, or MNK with 2:4, where half of them are with zeros. It can take no less than the larger of bytes over
bandwidth and operations over rate: the *floor*. The share of the roofline is the floor over the measured time.

The rates are those of dense products of the same libraries that the baselines use. INT8 and FP8 have the same peak on
NVIDIA's tensor cores since Ada, so that the better of the two stands for both; 2:4 does as many operations a second as
dense at best, twice as fast if the zeros are counted.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse24.benchmark.timing import time_stream

DTYPE = torch.bfloat16  # of inputs, outputs and unquantized weights
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
_SIZE = {"cuda": 8192, "cpu": 512}


class Machine(NamedTuple):
    """What a machine was measured to do.

    Attributes:
        copy_gb_s (`float`): 10^9 bytes a second, read and written, of a copy on the device.
        tflops_16 (`float`): 10^12 operations a second of a dense bf16 product.
        tflops_8 (`float`): of a dense FP8 or INT8 product, the better of the two.
    """

    copy_gb_s: float
    tflops_16: float
    tflops_8: float

    def floor_us(self, work: "Work") -> float:
        """Return the microseconds that some work takes at least."""
        rate = self.tflops_8 if work.bits == 8 else self.tflops_16
        return max(work.bytes / self.copy_gb_s / 1e3, work.flops / rate / 1e6)


class Work(NamedTuple):
    """What a call has to do: bytes to move, operations to perform, and with operands of how many bits."""

    bytes: int
    flops: int
    bits: int


def projection_work(out_features: int, in_features: int, tokens: int, bits: int, sparse: bool) -> Work:
    """Return the work of a projection with inputs and outputs of 16 bits.

    Args:
        out_features, in_features, tokens (`int`): N, K, M.
        bits (`int`): of a weight: 16 or 8.
        sparse (`bool`): 2:4: half the values, and half a byte of indices for four of them.
    """
    weights = out_features * in_features
    stored = weights * bits // 8 // (2 if sparse else 1) + (weights // 8 if sparse else 0)
    scales = 4 * out_features if bits == 8 else 0
    activations = 2 * tokens * (in_features + out_features)
    return Work(stored + scales + activations, (1 if sparse else 2) * tokens * weights, bits)


@functools.cache
def measure_machine(device: torch.device) -> Machine:
    """Measure the roofline of a device, in about a tenth of a second; once a process."""
    source = torch.empty(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = time_stream(lambda: target.copy_(source), device)
    left, right = (torch.randn(_SIZE[device.type], _SIZE[device.type], device=device) for _ in range(2))
    rate_16 = _rate(_bf16(left, right), device)
    products_8 = [_int8, _fp8] if device.type == "cuda" else [_int8]  # a CPU takes seconds for FP8
    rate_8 = max(_rate(product(left, right), device) for product in products_8)
    return Machine(2 * source.numel() / copy_us / 1e3, rate_16, rate_8 or rate_16)


def _bf16(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    left, right = left.to(DTYPE), right.to(DTYPE)
    return lambda: left @ right.t()


def _int8(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    left, right = ((32 * operand).clamp(-127, 127).to(torch.int8) for operand in (left, right))
    return lambda: torch._int_mm(left, right.t())


def _fp8(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    left, right, one = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn), left.new_ones(())
    arguments = {"scale_a": one, "scale_b": one, "out_dtype": DTYPE, "use_fast_accum": True}
    return lambda: torch._scaled_mm(left, right.t(), **arguments)


def _rate(product: Callable[[], Tensor], device: torch.device) -> float:
    """Return 10^12 operations a second, or 0 where this machine has no such product."""
    try:
        product()
    except (RuntimeError, NotImplementedError, ValueError):
        return 0.0
    return 2 * _SIZE[device.type] ** 3 / time_stream(product, device) / 1e6
