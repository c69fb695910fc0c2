"""The experts of a layer, packed, beside transformers' dense `grouped_mm`: module for module, routing included.

Both run the same module of transformers on the same random tokens, each sent to `top_k` experts at random, and both
are timed in two ways, which their label tells: as a stream sees them in eager mode (`timing.time_stream`), and in a
CUDA graph of several such calls, each with tokens and experts of its own (`timing.time_calls`). Packed experts with
many tokens cannot be captured; their rows say so. The dense candidate runs dense weights; the packed ones the pruned
form of them, which is also what their outputs are compared with.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_sparse24.benchmark.results import OK, ProjectionRow, with_ratios
from hf_sparse24.benchmark.roofline import DTYPE, Work, measure_machine, projection_work
from hf_sparse24.benchmark.timing import Timing, rotations, time_calls, time_stream
from hf_sparse24.nn import Sparse24Experts
from hf_sparse24.nn.mixture import pack_experts_
from hf_sparse24.pattern import prune_into

# Relative L2 error of a token against the dense module in bfloat16: three roundings to bfloat16, then two products of
# 8-bit operands, each with the error of `gemm.TOLERANCE`.
TOLERANCE = {"bf16": 0.02, "int8": 0.06, "fp8": 0.16}
STACKS = ("gate_up_proj", "down_proj")
_MOST_ROTATIONS = 16
MODES = ("eager", "CUDA graph")
_QUANTIZATION = {"2:4-bf16": None, "2:4-int8": "int8", "2:4-fp8": "fp8"}


Arguments = tuple[Tensor, Tensor, Tensor]


class Mixture(NamedTuple):
    """The sizes of a layer of experts, each gated as Mixtral's and Qwen3-MoE's are."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(N, K) of gate and up together, and of down."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)


MIXTURES = (
    Mixture("Mixtral-8x7B", 8, 2, 4096, 14336),
    Mixture("Qwen3-30B-A3B", 128, 8, 2048, 768),
)


@torch.no_grad()
def benchmark_experts(
    mixture: Mixture,
    tokens: Sequence[int],
    device: torch.device,
    candidates: Sequence[str] = tuple(_QUANTIZATION),
    backend: str = "auto",
) -> Iterator[list[ProjectionRow]]:
    """Measure the experts of a layer, and yield the rows of each number of tokens and each of `MODES`, with ratios.

    Args:
        mixture (`Mixture`): sizes.
        tokens (`Sequence[int]`): tokens, each of which goes to `top_k` experts.
        device (`torch.device`): where to run.
        candidates (`Sequence[str]`): of 2:4-bf16, 2:4-int8 and 2:4-fp8; dense-bf16 is always there.
        backend (`str`): of the packed experts.
    """
    stacks = {
        name: nn.Parameter((torch.randn(mixture.experts, *shape, device=device) * shape[1] ** -0.5).to(DTYPE))
        for name, shape in zip(STACKS, mixture.shapes, strict=True)
    }
    arguments = {count: _rotation(mixture, count, device) for count in tokens}
    module = _module(mixture, stacks)
    rows: dict[tuple[int, str], list[ProjectionRow]] = {(count, mode): [] for count in tokens for mode in MODES}
    for (count, mode), found in rows.items():
        found.append(_row(mixture, arguments[count][0], "dense-bf16", mode, _timed(module, arguments[count], mode)))
    for stack in stacks.values():
        prune_into(stack.data, stack.data, torch.abs)
    expected = {count: module(*arguments[count][0]).float() for count in tokens}
    for candidate in candidates:
        module = _packed(_module(mixture, stacks), _QUANTIZATION[candidate], backend)
        for (count, mode), found in rows.items():
            measured = _timed(module, arguments[count], mode, expected[count], TOLERANCE[_precision(candidate)])
            found.append(_row(mixture, arguments[count][0], candidate, mode, measured))
    for found in rows.values():
        yield with_ratios(found, lambda row: row.us)


class _Measured(NamedTuple):
    status: str
    error: float | None = None
    us: float | None = None
    host_us: float | None = None


def _module(mixture: Mixture, stacks: dict[str, nn.Parameter]) -> nn.Module:
    """Return transformers' module of these experts, which runs `grouped_mm`."""
    config = MixtralConfig(
        hidden_size=mixture.hidden, intermediate_size=mixture.intermediate, num_local_experts=mixture.experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name, stack in stacks.items():
        setattr(module, name, stack)
    return module.eval()


def _packed(module: nn.Module, quantization: str | None, backend: str) -> nn.Module | str:
    """Return the module with its experts packed, or why it cannot be."""
    try:
        pack_experts_(
            module,
            lambda name: Sparse24Experts.from_stack(
                getattr(module, name), quantization=quantization, backend=backend, name=name
            ),
        )
    except Exception as error:  # whatever a library raises belongs into the row
        return _reason(error)
    return module


def _routed(mixture: Mixture, tokens: int, device: torch.device) -> Arguments:
    """Return random tokens, the experts of each, and how much each counts."""
    weights, chosen = torch.rand(tokens, mixture.experts, device=device).topk(mixture.top_k)
    return torch.randn(tokens, mixture.hidden, device=device).to(DTYPE), chosen, weights.softmax(-1).to(DTYPE)


def _rotation(mixture: Mixture, tokens: int, device: torch.device) -> list[Arguments]:
    """Return arguments of as many calls as read more packed weights together than the cache holds."""
    hit = min(mixture.experts, tokens * mixture.top_k)
    packed_bytes = sum(projection_work(*shape, 0, 8, True).bytes for shape in mixture.shapes) * hit
    return [_routed(mixture, tokens, device) for _ in range(min(rotations(packed_bytes, device), _MOST_ROTATIONS))]


def _timed(
    module: nn.Module | str,
    arguments: Sequence[Arguments],
    mode: str,
    expected: Tensor | None = None,
    tolerance: float = 0.0,
) -> _Measured:
    """Compare the module's output with what is expected, if that is known, and time it."""
    if isinstance(module, str):
        return _Measured(f"cannot run: {module}")
    error = None
    try:
        if expected is not None:
            difference = module(*arguments[0]).float() - expected
            error = float((difference.norm(dim=1) / expected.norm(dim=1)).max())
            if not error <= tolerance:  # so that NaN is wrong, too
                return _Measured(f"wrong: relative error {error:.2g}", error)
        return _Measured(OK, error, *_time(module, arguments, mode))
    except Exception as problem:  # as above
        return _Measured(f"cannot run: {_reason(problem)}", error)


def _time(module: nn.Module, arguments: Sequence[Arguments], mode: str) -> Timing:
    device = arguments[0][0].device
    if mode == "eager":
        return Timing(time_stream(lambda: module(*arguments[0]), device), None)
    return time_calls([functools.partial(module, *each) for each in arguments], device)


def _row(mixture: Mixture, arguments: Arguments, name: str, mode: str, measured: _Measured) -> ProjectionRow:
    bits, sparse = 16 if _precision(name) == "bf16" else 8, name.startswith("2:4")
    hit, pairs = len(arguments[1].unique()), arguments[1].numel()
    works = [projection_work(*shape, 0, bits, sparse).bytes * hit for shape in mixture.shapes]
    operations = [projection_work(*shape, pairs, bits, sparse).flops for shape in mixture.shapes]
    activations = DTYPE.itemsize * pairs * sum(sum(shape) for shape in mixture.shapes)
    work = Work(sum(works) + activations, sum(operations), bits)
    floor_us = measure_machine(arguments[0].device).floor_us(work)
    return ProjectionRow(
        benchmark="experts",
        shape=" ".join(
            f"{mixture.experts}x{out_features}x{in_features}" for out_features, in_features in mixture.shapes
        ),
        label=f"{mixture.name}, {mixture.top_k} of {mixture.experts}, {mode}",
        tokens=len(arguments[0]),
        candidate=name,
        precision=_precision(name),
        status=measured.status,
        us=measured.us,
        host_us=measured.host_us,
        error=measured.error,
        bytes=work.bytes,
        flops=work.flops,
        floor_us=floor_us,
        roofline=floor_us / measured.us if measured.us else None,
    )


def _precision(candidate: str) -> str:
    return candidate.partition("-")[2]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
