"""A whole model: prefill and decode, eager and compiled, dense and packed.

- *Prefill* puts (batch, tokens) through the model and keeps the logits of the last token, without writing a cache,
  which would cost every candidate the same 1 %. It is timed on the stream, without a graph.
- *Decode* makes one token for each sequence over a full static cache (see `attention`). Each step does the same work,
  so one is captured in a CUDA graph and replayed; `eager` without a graph is what `generate` gives.
- *Compiled* means that each layer is compiled by `torch.compile` in its default mode: all layers run one compiled
  function, so that compiling takes seconds.

Logits of each mode are compared with the bf16 model's before it is timed.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse24.benchmark.attention import PREFILL, attach_caches, detach_caches
from hf_sparse24.benchmark.models import VARIANTS, Source, layer_stacks, make_variant_
from hf_sparse24.benchmark.results import OK, ModelRow, with_ratios
from hf_sparse24.benchmark.timing import capture, time_stream, warm_up

# Relative L2 error of the logits, errors of all layers in it. It tells a kernel that is wrong, whose logits have
# nothing to do with the right ones (1.4), not one that is inexact: `bench gemm` does that.
TOLERANCE = {"bf16": 0.15, "int8": 0.4, "fp8": 0.6}
_SEED = 1


class Workload(NamedTuple):
    """What a model is to do: `benchmark` prefill or decode, `batch` sequences of `tokens` each."""

    benchmark: str
    batch: int
    tokens: int


class Mode(NamedTuple):
    """How it is run."""

    compiled: bool
    graph: bool

    def __str__(self) -> str:
        """Return the mode as rows have it."""
        return ("compiled" if self.compiled else "eager") + ("+graph" if self.graph else "")


def modes(workload: Workload, compile: bool, device: torch.device) -> list[Mode]:
    """Return the modes in which a workload is measured on a device."""
    graphs = [False]
    if workload.benchmark == "decode" and device.type == "cuda":
        graphs.append(True)
    found = [Mode(False, graph) for graph in graphs]
    return [*found, Mode(True, graphs[-1])] if compile else found


def benchmark_model(
    source: Source,
    name: str,
    workloads: Sequence[Workload],
    device: torch.device,
    compile: bool = True,
    backend: str = "auto",
) -> Iterator[ModelRow]:
    """Measure one variant of a model, and yield a row for each workload and mode, without ratios.

    Args:
        source (`Source`): the dense model.
        name (`str`): of a variant, see `models.VARIANTS`.
        workloads (`Sequence[Workload]`): what to do.
        device (`torch.device`): where.
        compile (`bool`): also compiled.
        backend (`str`): of this package's layers.
    """
    variant, before = VARIANTS[name], _allocated(device)
    expected: dict[Workload, Tensor | str] = {}
    model = source.load(device)

    def remember(reference: PreTrainedModel) -> None:
        expected.update({workload: _logits_or_reason(reference, workload, device) for workload in workloads})

    try:
        make_variant_(model, variant, backend, remember)
    except Exception as error:  # torchao is missing, or this machine is: a row says so
        for workload in workloads:
            yield replace(
                _row(source, name, model, workload, Mode(False, False)), status=f"cannot run: {_reason(error)}"
            )
        return
    rows = [
        _measured(_row(source, name, model, workload, mode), model, workload, mode, expected[workload], device)
        for workload in workloads
        for mode in modes(workload, compile, device)
    ]
    detach_caches(model)
    torch._dynamo.reset()
    weights = (_allocated(device) - before) / 1e9 if device.type == "cuda" else _stored_bytes(model) / 1e9
    yield from (replace(row, weights_gb=weights) for row in rows)


def with_model_ratios(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """Fill in the ratios between variants that did the same in the same mode, and between their weights."""
    dense = next((row.weights_gb for row in rows if row.candidate == "dense-bf16" and row.weights_gb), None)
    keys = {(row.benchmark, row.mode, row.batch, row.tokens): None for row in rows}
    found = []
    for key in keys:
        alike = [row for row in rows if (row.benchmark, row.mode, row.batch, row.tokens) == key]
        found += with_ratios(alike, lambda row: row.ms)
    return [
        replace(row, weights_over_bf16=row.weights_gb / dense if dense and row.weights_gb else None) for row in found
    ]


@torch.no_grad()
def _measured(
    row: ModelRow,
    model: PreTrainedModel,
    workload: Workload,
    mode: Mode,
    expected: Tensor | str,
    device: torch.device,
) -> ModelRow:
    """Return the row with what was measured, or with the reason why nothing was."""
    if isinstance(expected, str):
        return replace(row, status=f"cannot run: {expected}")
    try:
        _reset_peak(device)
        with running(model, workload, mode, device) as step:
            logits, us = _run(step, mode, device)
            error = _relative_error(logits, expected)
            if not error <= TOLERANCE[row.precision]:
                return replace(row, status=f"wrong: relative error {error:.2g}", error=error)
            peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
            with _half_the_layers(model) as removed:
                layer_us = (us - _run(step, mode, device)[1]) / removed if removed else None
        produced = workload.batch * (workload.tokens if workload.benchmark == "prefill" else 1)
        return replace(
            row,
            ms=us / 1e3,
            tokens_s=produced / us * 1e6,
            layer_us=layer_us,
            error=error,
            peak_gb=peak,
        )
    except Exception as problem:  # whatever a library raises belongs into the row
        return replace(row, status=f"cannot run: {_reason(problem)}")


def _run(step: Callable[[], Tensor], mode: Mode, device: torch.device) -> tuple[Tensor, float]:
    """Return what a step computes, and the microseconds that it takes."""
    if not mode.graph:
        return step(), time_stream(step, device)
    results: list[Tensor] = []
    warm_up([step])
    graph = capture([lambda: results.append(step())])
    us = time_stream(graph.replay, device, repeats=15)
    return results[0].clone(), us


@contextmanager
def running(
    model: PreTrainedModel, workload: Workload, mode: Mode, device: torch.device
) -> Iterator[Callable[[], Tensor]]:
    """Yield a step of a workload, with the model set up for it."""
    step = _step(model, workload, device)
    if workload.benchmark == "decode":
        torch.manual_seed(_SEED)  # of the caches: every variant has the same
        attach_caches(model, step, workload.tokens)
    else:
        detach_caches(model)
        model.set_attn_implementation(PREFILL)
    layers = [layer for stack in layer_stacks(model).values() for layer in stack] if mode.compiled else []
    torch._dynamo.reset()  # a function for each workload would soon be more than dynamo keeps
    try:
        for layer in layers:
            layer.compile(dynamic=False)
        yield step
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        gc.collect()


def _step(model: PreTrainedModel, workload: Workload, device: torch.device) -> Callable[[], Tensor]:
    """Return a call that runs the model and returns the logits of each sequence's last token."""
    generator = torch.Generator().manual_seed(_SEED)
    length = workload.tokens if workload.benchmark == "prefill" else 1
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (workload.batch, length), generator=generator).to(device)
    arguments = {"input_ids": tokens, "use_cache": False}
    if workload.benchmark == "decode":
        arguments["position_ids"] = torch.full_like(tokens, workload.tokens - 1)
    if model.can_generate():
        arguments["logits_to_keep"] = 1
    return lambda: model(**arguments)[0][:, -1]


@torch.no_grad()
def _logits_or_reason(model: PreTrainedModel, workload: Workload, device: torch.device) -> Tensor | str:
    try:
        with running(model, workload, Mode(False, False), device) as step:
            return step().clone()
    except Exception as error:  # becomes the status of rows
        return _reason(error)


@contextmanager
def _half_the_layers(model: nn.Module) -> Iterator[int]:
    """Yield how many layers are left out meanwhile: the second half of each stack."""
    stacks = layer_stacks(model)
    try:
        for path, stack in stacks.items():
            model.set_submodule(path, nn.ModuleList(list(stack)[: (len(stack) + 1) // 2]))
        yield sum(len(stack) // 2 for stack in stacks.values())
    finally:
        for path, stack in stacks.items():
            model.set_submodule(path, stack)


def _row(source: Source, name: str, model: nn.Module, workload: Workload, mode: Mode) -> ModelRow:
    return ModelRow(
        benchmark=workload.benchmark,
        candidate=name,
        precision=VARIANTS[name].precision,
        status=OK,
        model=Path(source.name).name + (", random weights" if source.random_weights else ""),
        layers=sum(len(stack) for stack in layer_stacks(model).values()),
        mode=str(mode),
        batch=workload.batch,
        tokens=workload.tokens,
    )


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    difference = logits.float() - expected.float()
    return float((difference.norm(dim=-1) / expected.float().norm(dim=-1)).max())


def _stored_bytes(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:200]
