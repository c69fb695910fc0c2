"""How long a call takes: on a GPU by replaying CUDA graphs, on a CPU by `torch.utils.benchmark`.

A GPU is asked two questions that must not be mixed. *Device time* is what the kernels take back to back: calls are
captured in a CUDA graph, so that the host costs nothing, and the graph is replayed between two events. *Host time* is
what issuing a call costs the process while the GPU works on what came before: in eager mode a small projection takes
no less than that.

Weights of one projection fit in the cache of a large GPU, where a model never finds them. So a candidate is given as
several calls, each on its own copy of weights and inputs, and they are timed in rotation (`rotations`).
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], Any]

CACHES_TO_EXCEED = 4  # the cache is not what is measured when a rotation is this many times its size
_GRAPH_MICROSECONDS = 1500  # of a graph at least: a replay then costs under 1 % of what it measures
_MOST_CALLS = 200  # in a graph
_REPLAYS = 7
_ISSUED = 20  # calls in a row for the host time: a GPU's queue holds 1000 kernels, and a layer has about 20
_ISSUES = 15  # of which the median is taken
_LONGEST_ISSUED = 300.0  # microseconds
_WARM_UPS = 2
_CPU_SECONDS = 0.02


class Timing(NamedTuple):
    """What a call takes.

    Attributes:
        us (`float`): microseconds of the device (on a CPU: wall time).
        host_us (`float`, *optional*): microseconds to issue the call in eager mode (on a CPU the wall time). None
            for a call that keeps the GPU busy for so long that its host time says nothing new.
    """

    us: float
    host_us: float | None


def rotations(bytes_a_call: int, device: torch.device) -> int:
    """Return how many copies of its operands a candidate needs so that a rotation does not fit in the cache.

    Args:
        bytes_a_call (`int`): of the weights and inputs that one call reads.
        device (`torch.device`): on a CPU one copy is enough: nothing is claimed of its caches.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, math.ceil(CACHES_TO_EXCEED * cache / max(bytes_a_call, 1)))


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """Time calls that do the same on different operands, in rotation; see the module for what is measured.

    Args:
        calls (`Sequence[Callable]`): take nothing; what they return is dropped.
        device (`torch.device`): where they run.

    Returns:
        `Timing`: medians, of one call.
    """
    if device.type != "cuda":
        microseconds = _wall_microseconds(calls)
        return Timing(microseconds, microseconds)
    with torch.cuda.device(device):
        estimate = warm_up(calls)
        us = _graph_microseconds(calls, estimate)
        host_us = _host_microseconds(calls) if us <= _LONGEST_ISSUED else None
    return Timing(us, host_us)


def time_stream(call: Call, device: torch.device, repeats: int = 5) -> float:
    """Return the median microseconds of a call as the stream sees it: no graph, the host may be what it waits for.

    For calls of many milliseconds, which a host keeps ahead of.
    """
    if device.type != "cuda":
        return _wall_microseconds([call])
    with torch.cuda.device(device):
        warm_up([call])
        return statistics.median(_event_microseconds(call) for _ in range(repeats))


def capture(calls: Sequence[Call], rounds: int = 1) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of all calls, `rounds` times in turn. They must have run before: nothing may compile now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def warm_up(calls: Sequence[Call]) -> float:
    """Run every call three times on a side stream, as graphs need; return microseconds of a call, host included."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        microseconds = [_event_microseconds(lambda: [call() for call in calls]) for _ in range(_WARM_UPS)]
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return min(microseconds) / len(calls)


def _graph_microseconds(calls: Sequence[Call], estimate: float) -> float:
    rounds = math.ceil(min(_GRAPH_MICROSECONDS / estimate, _MOST_CALLS) / len(calls))
    graph = capture(calls, rounds)
    graph.replay()
    times = [_event_microseconds(graph.replay) for _ in range(_REPLAYS)]
    return statistics.median(times) / (rounds * len(calls))


def _host_microseconds(calls: Sequence[Call]) -> float:
    times = []
    issued = [calls[index % len(calls)] for index in range(_ISSUED)]
    for _ in range(_ISSUES):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for call in issued:
            call()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(times) / _ISSUED * 1e6


def _event_microseconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _wall_microseconds(calls: Sequence[Call]) -> float:
    def run() -> None:
        for call in calls:
            call()

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_CPU_SECONDS).median / len(calls) * 1e6
