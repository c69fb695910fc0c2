"""Projections beside their dense baselines: one at a time (`gemm`), or all of a layer together (`layer`).

Both are the same thing: a *workload* is a list of groups, and the projections of a group read one input. Dense
candidates run a dense random weight, sparse ones its magnitude-pruned form, so that no dense kernel gains from zeros.
Every output is compared with a float64 product before anything is timed; a row that is wrong has no time.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse24.benchmark.candidates import Candidate
from hf_sparse24.benchmark.results import OK, ProjectionRow, with_ratios
from hf_sparse24.benchmark.roofline import DTYPE, Machine, measure_machine, projection_work
from hf_sparse24.benchmark.shapes import Shape
from hf_sparse24.benchmark.timing import Timing, rotations, time_calls
from hf_sparse24.pattern import prune_2to4

Workload = Sequence[Sequence[Shape]]

# Relative L2 error of a token: rounding the output to bfloat16 is 0.002; 8-bit weights and tokens of normally
# distributed numbers are 0.01 with INT8 and 0.04 with FP8, whatever the size. The margin is for tokens that differ.
TOLERANCE = {"bf16": 0.01, "int8": 0.03, "fp8": 0.08}
_COLUMN = 6  # how much larger the error of one output may be: with one token it is that of a single number
_CHECKED_AT_ONCE = 2048  # tokens


class Run:
    """A candidate on one copy of a workload: a layer, as it were.

    Args:
        candidate (`type`): of `candidates`.
        weights: for each group the weights of its projections, (N, K) each; copied.
        backend (`str`): of this package's layers.
    """

    def __init__(self, candidate: type[Candidate], weights: Sequence[Sequence[Tensor]], backend: str) -> None:
        self.groups = [[candidate(weight.clone(), backend) for weight in group] for group in weights]
        for group in self.groups:
            if len(group) > 1:
                candidate.join(group)

    def place(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs, one for each group, as the candidate wants them."""
        return [group[0].place(x) for group, x in zip(self.groups, inputs, strict=True)]

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        """Run all projections, each input prepared once."""
        for group, x in zip(self.groups, inputs, strict=True):
            prepared = group[0].prepare(x)
            for projection in group:
                projection.multiply(prepared)

    def outputs(self, inputs: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
        """Yield the output of each projection, (M, N), as its consumer would see it."""
        for group, x in zip(self.groups, inputs, strict=True):
            prepared = group[0].prepare(x)
            for projection in group:
                yield projection.finished(projection.multiply(prepared), prepared, tokens)


class _Entry(NamedTuple):
    """A candidate with all its copies, or why there are none."""

    name: str
    kind: type[Candidate]
    runs: list[Run]
    reason: str = ""


@torch.no_grad()
def benchmark_projections(
    workload: Workload,
    tokens: Sequence[int],
    candidates: Mapping[str, type[Candidate]],
    device: torch.device,
    name: str = "gemm",
    backend: str = "auto",
) -> Iterator[list[ProjectionRow]]:
    """Measure candidates on a workload, and yield the rows of each number of tokens, with ratios.

    Args:
        workload (`Sequence`): groups of shapes; the projections of a group read one input.
        tokens (`Sequence[int]`): rows M of the inputs.
        candidates (`Mapping`): classes by name (`candidates.chosen`).
        device (`torch.device`): where to run.
        name (`str`): what the rows are called: gemm or layer.
        backend (`str`): of this package's layers.
    """
    machine = measure_machine(device)
    torch._dynamo.reset()  # what baselines compile is kept for few shapes only
    dense = [[_random(shape.out_features, shape.in_features, device) for shape in group] for group in workload]
    pruned = [[prune_2to4(weight) for weight in group] for group in dense]
    entries = []
    for candidate, kind in candidates.items():
        most = rotations(_bytes_read(workload, min(tokens), kind), device)  # the fewest tokens need the most copies
        entries.append(_build(candidate, kind, pruned if kind.sparse else dense, most, backend))
    for count in tokens:
        copies = [rotations(_bytes_read(workload, count, entry.kind), device) for entry in entries]
        inputs = [[_random(count, group[0].in_features, device) for group in workload] for _ in range(max(copies))]
        expected = {sparse: _products(inputs[0], pruned if sparse else dense) for sparse in (False, True)}
        rows = []
        for entry, needed in zip(entries, copies, strict=True):
            status, error, timing = _measure(entry, inputs[:needed], expected[entry.kind.sparse], device)
            rows.append(_row(name, workload, count, entry, machine, status, error, timing))
        yield with_ratios(rows, lambda row: row.us)


def _build(name: str, kind: type[Candidate], weights: Sequence[Sequence[Tensor]], copies: int, backend: str) -> _Entry:
    try:
        return _Entry(name, kind, [Run(kind, weights, backend) for _ in range(copies)])
    except Exception as error:  # whatever a library raises belongs into the row
        return _Entry(name, kind, [], _reason(error))


def _measure(
    entry: _Entry, inputs: Sequence[Sequence[Tensor]], expected: Sequence[Tensor], device: torch.device
) -> tuple[str, float | None, Timing | None]:
    """Return status, error and time of a candidate on as many inputs as it is to rotate through."""
    if not entry.runs:
        return f"cannot run: {entry.reason}", None, None
    first, limit = entry.runs[0], TOLERANCE[entry.kind.precision]
    try:
        outputs = first.outputs(first.place(inputs[0]), len(inputs[0][0]))
        errors = [relative_errors(*pair) for pair in zip(outputs, expected, strict=True)]
        error, column_error = (max(values) for values in zip(*errors, strict=True))
        if not (error <= limit and column_error <= _COLUMN * limit):  # so that NaN is wrong, too
            return f"wrong: relative error {max(error, column_error):.2g}", error, None
        calls = [partial(run, run.place(x)) for run, x in zip(entry.runs, inputs, strict=False)]
        return OK, error, time_calls(calls, device)
    except Exception as problem:  # as above
        return f"cannot run: {_reason(problem)}", None, None


def relative_errors(output: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return how wrong an output (M, N) is: relative L2 error of the worst token, and of the worst column.

    A column's error is relative to the average column: with few tokens a right one may be next to zero.
    """
    if output.shape != expected.shape:
        raise RuntimeError(f"the output is {tuple(output.shape)} where {tuple(expected.shape)} was expected")
    difference = output.float() - expected
    by_token = difference.norm(dim=1) / expected.norm(dim=1)
    by_column = difference.norm(dim=0) / expected.norm(dim=0).mean()
    return float(by_token.max()), float(by_column.max())


def _products(inputs: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each projection's output in float32, computed in float64 some tokens at a time."""
    products = []
    for x, group in zip(inputs, weights, strict=True):
        for weight in group:
            exact = weight.double().t()
            products.append(torch.cat([(part.double() @ exact).float() for part in x.split(_CHECKED_AT_ONCE)]))
    return products


def _row(
    name: str,
    workload: Workload,
    tokens: int,
    entry: _Entry,
    machine: Machine,
    status: str,
    error: float | None,
    timing: Timing | None,
) -> ProjectionRow:
    bits = 16 if entry.kind.precision == "bf16" else 8
    works = [
        projection_work(
            sum(shape.out_features for shape in group), group[0].in_features, tokens, bits, entry.kind.sparse
        )
        for group in workload
    ]
    floor_us = sum(machine.floor_us(work) for work in works)
    return ProjectionRow(
        benchmark=name,
        shape=" ".join("+".join(map(str, group)) for group in workload),
        label=" ".join("+".join(shape.label for shape in group) for group in workload),
        tokens=tokens,
        candidate=entry.name,
        precision=entry.kind.precision,
        status=status,
        us=timing and timing.us,
        host_us=timing and timing.host_us,
        error=error,
        bytes=sum(work.bytes for work in works),
        flops=sum(work.flops for work in works),
        floor_us=floor_us,
        roofline=floor_us / timing.us if timing else None,
    )


def _bytes_read(workload: Workload, tokens: int, kind: type[Candidate]) -> int:
    """Return the bytes of weights and inputs that a call reads."""
    bits = 16 if kind.precision == "bf16" else 8
    inputs = sum(DTYPE.itemsize * tokens * group[0].in_features for group in workload)
    shapes = [shape for group in workload for shape in group]
    return inputs + sum(projection_work(*shape[:2], 0, bits, kind.sparse).bytes for shape in shapes)


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device).to(DTYPE)


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:200]
