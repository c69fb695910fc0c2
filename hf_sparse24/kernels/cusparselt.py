"""Matrix products of 2:4 weights through cuSPARSELt, with plans that are kept.

cuSPARSELt plans a product before it runs it, which takes half a millisecond of the host; torch's own operator does so
at every call, and takes the library's default algorithm, on Hopper a slow one. Here a plan is made once for a shape,
and its algorithm is the fastest of those that the library has (`kernels.autotune`).

The library reads a weight as one buffer: first the kept values, exactly as format 1 has them, then its own metadata.
`compress` makes it; a layer's `weight` is a view of its beginning, so that nothing is stored twice.

Bindings are NVIDIA's own, `nvmath.bindings.cusparseLt`. Handles, plans and workspaces belong to a thread: the
library's state is never shared. A plan is made outside of the capture of a CUDA graph, by a call of the same shape
before.
"""

import ctypes
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse24.kernels.autotune import Choices, bucket
from hf_sparse24.packing import PackedWeight, scatter_values

ROWS = {torch.float16: 8, torch.bfloat16: 8, torch.int8: 16}  # tokens come in multiples of this
FEATURES = {torch.float16: 16, torch.bfloat16: 16, torch.int8: 32}  # so do inputs and outputs

_CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.int8: 3, torch.bfloat16: 14}
_ROW_ORDER, _COLUMN_ORDER = 2, 1
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1
_ALIGNMENT = 16
_SPLITS = (1, 2, 4)
_WARM_UPS, _TIMED = 2, 5

choices = Choices()


class Problem(NamedTuple):
    """What a plan depends on: out (M, N) = input (M, K) @ weight (N, K).T, weight rows scaled where it is int8."""

    outputs: int
    features: int
    tokens: int
    dtype: torch.dtype
    out_dtype: torch.dtype


def compress(packed: PackedWeight) -> Tensor:
    """Return the library's buffer for a packed weight on a GPU, bytes: N*K/2 values, then metadata.

    Args:
        packed (`PackedWeight`): values (N, K/2) in float16, bfloat16 or int8.
    """
    dense = scatter_values(packed.weight, packed.weight_indices)
    return torch._cslt_compress(dense).flatten().view(torch.uint8)


def matmul(input: Tensor, weight: Tensor, weight_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Return input @ unpacked(weight).T, with int8 times the scale of each output, in `out_dtype`.

    Args:
        input (`Tensor`): (M, K) in the dtype of the weight; rows behind the last are read where the memory is there.
        weight (`Tensor`): (N, K/2), the view of the beginning of a buffer that `compress` made.
        weight_scale (`Tensor`, *optional*): (N,) float32, with int8.
        out_dtype (`torch.dtype`): float16 or bfloat16; that of the weight, if it is one of them.
    """
    tokens, features = input.shape
    padded = -(-tokens // ROWS[weight.dtype]) * ROWS[weight.dtype]
    out = torch.empty(padded, weight.shape[0], dtype=out_dtype, device=input.device)
    if not tokens:
        return out[:tokens]
    problem = Problem(weight.shape[0], features, padded, weight.dtype, out_dtype)
    with torch.cuda.device(input.device):
        _thread.library(input.device).run(problem, _with_rows(input, padded), weight, weight_scale, out)
    return out[:tokens]


def _with_rows(input: Tensor, rows: int) -> Tensor:
    """Return a contiguous input behind which there is memory up to a number of rows."""
    room = input.untyped_storage().nbytes() // input.element_size() - input.storage_offset()
    if input.is_contiguous() and room >= rows * input.shape[1]:
        return input
    padded = input.new_empty(rows, input.shape[1])
    padded[: len(input)] = input
    return padded


class Plan:
    """A product that the library is ready to run.

    Args:
        library (`Library`): of the device.
        problem (`Problem`): what is to be multiplied.
        algorithm, split_k (`int`): how; the library refuses some by raising.
    """

    def __init__(self, library: "Library", problem: Problem, algorithm: int, split_k: int) -> None:
        self._lt, self._handle = library.lt, library.handle
        self._destroy: list[tuple[Any, int]] = []
        try:
            self._descriptor = self._describe(problem)
            self._selection = self._own(
                self._lt.matmul_alg_selection_init(self._handle, self._descriptor, int(self._lt.MatmulAlg.DEFAULT)),
                self._lt.matmul_alg_selection_destroy,
            )
            self._set(self._lt.MatmulAlgAttribute.CONFIG_ID, algorithm)
            if split_k > 1:
                self._set(self._lt.MatmulAlgAttribute.SPLIT_K, split_k)
            self.plan = self._own(
                self._lt.matmul_plan_init(self._handle, self._descriptor, self._selection),
                self._lt.matmul_plan_destroy,
            )
            self.workspace = int(self._lt.matmul_get_workspace(self._handle, self.plan))
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Free what the library holds for the plan."""
        while self._destroy:
            destroy, pointer = self._destroy.pop()
            destroy(pointer)

    def __del__(self) -> None:
        """Free what is left."""
        self.close()

    def largest_algorithm(self) -> int:
        """Return the number that algorithms stay below."""
        value = ctypes.c_int32()
        self._lt.matmul_alg_get_attribute(
            self._handle,
            self._selection,
            int(self._lt.MatmulAlgAttribute.CONFIG_MAX_ID),
            ctypes.addressof(value),
            ctypes.sizeof(value),
        )
        return value.value

    def _describe(self, problem: Problem) -> int:
        lt, value_type, out_type = self._lt, _CUDA_TYPES[problem.dtype], _CUDA_TYPES[problem.out_dtype]
        weight = self._own(
            lt.structured_descriptor_init(
                self._handle,
                problem.outputs,
                problem.features,
                problem.features,
                _ALIGNMENT,
                value_type,
                _ROW_ORDER,
                int(lt.Sparsity.SPARSITY_50_PERCENT),
            ),
            lt.mat_descriptor_destroy,
        )
        input_ = self._dense(problem.tokens, problem.features, problem.features, value_type, _ROW_ORDER)
        out = self._dense(problem.outputs, problem.tokens, problem.outputs, out_type, _COLUMN_ORDER)
        integer = problem.dtype == torch.int8
        compute = lt.ComputeType.COMPUTE_32I if integer else lt.ComputeType.COMPUTE_32F
        descriptor = self._own(
            lt.matmul_descriptor_init(
                self._handle, _NOT_TRANSPOSED, _TRANSPOSED, weight, input_, out, out, int(compute)
            ),
            lt.matmul_descriptor_destroy,
        )
        if integer:  # alpha has a value for each output
            one = ctypes.c_int32(1)
            attribute = int(lt.MatmulDescAttribute.ALPHA_VECTOR_SCALING)
            lt.matmul_desc_set_attribute(
                self._handle, descriptor, attribute, ctypes.addressof(one), ctypes.sizeof(one)
            )
        return descriptor

    def _dense(self, rows: int, columns: int, stride: int, value_type: int, order: int) -> int:
        lt = self._lt
        descriptor = lt.dense_descriptor_init(self._handle, rows, columns, stride, _ALIGNMENT, value_type, order)
        return self._own(descriptor, lt.mat_descriptor_destroy)

    def _set(self, attribute: Any, value: int) -> None:
        number = ctypes.c_int32(value)
        self._lt.matmul_alg_set_attribute(
            self._handle, self._selection, int(attribute), ctypes.addressof(number), ctypes.sizeof(number)
        )

    def _own(self, pointer: int, destroy: Any) -> int:
        self._destroy.append((destroy, pointer))
        return pointer


class Library:
    """The library on one device, for one thread: its handle, its plans and a workspace for each stream."""

    def __init__(self, device: torch.device) -> None:
        from nvmath.bindings import cusparseLt

        self.lt, self.device = cusparseLt, device
        self.handle = cusparseLt.init()
        self._plans: dict[Problem, Plan] = {}
        self._workspaces: dict[int, Tensor] = {}
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        version = cusparseLt.get_version(self.handle)
        self._machine = f"{torch.cuda.get_device_name(device)}, cuSPARSELt {version}"

    def run(self, problem: Problem, input: Tensor, weight: Tensor, weight_scale: Tensor | None, out: Tensor) -> None:
        """Run a problem on the current stream; the first time, make a plan for it."""
        plan = self._plans.get(problem)
        if plan is None:
            plan = self._plans[problem] = self._best_plan(problem, input, weight, weight_scale, out)
        self._launch(plan, input, weight, weight_scale, out)

    def _launch(self, plan: Plan, input: Tensor, weight: Tensor, weight_scale: Tensor | None, out: Tensor) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        streams = (ctypes.c_void_p * 1)(stream)
        self.lt.matmul(
            self.handle,
            plan.plan,
            ctypes.addressof(self._one) if weight_scale is None else weight_scale.data_ptr(),
            weight.data_ptr(),
            input.data_ptr(),
            ctypes.addressof(self._zero),
            out.data_ptr(),
            out.data_ptr(),
            self._workspace(plan.workspace, stream),
            ctypes.addressof(streams),
            len(streams),
        )

    def _workspace(self, size: int, stream: int) -> int:
        if not size:
            return 0
        known = self._workspaces.get(stream)
        if known is None or known.numel() < size:
            known = self._workspaces[stream] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return known.data_ptr()

    def _best_plan(
        self, problem: Problem, input: Tensor, weight: Tensor, weight_scale: Tensor | None, out: Tensor
    ) -> Plan:
        dtypes = f"{str(problem.dtype)[6:]} to {str(problem.out_dtype)[6:]}"
        key = f"{self._machine}, {dtypes}, {problem.outputs}x{problem.features}, {bucket(problem.tokens)} tokens"

        def measure(algorithm: int, split_k: int) -> float:
            try:
                plan = Plan(self, problem, algorithm, split_k)
                return self._microseconds(plan, input, weight, weight_scale, out)
            except self.lt.cuSPARSELtError:
                return float("inf")

        if torch.cuda.is_current_stream_capturing():
            known = choices.known(key)
            algorithm, split_k = (known.algorithm, known.split_k) if known else (0, 1)
        else:
            algorithm, split_k, _ = choices.find(key, lambda: self._candidates(problem), measure)
        return Plan(self, problem, algorithm, split_k)

    def _candidates(self, problem: Problem) -> Iterator[tuple[int, int]]:
        plan = Plan(self, problem, 0, 1)
        for algorithm in range(plan.largest_algorithm()):
            for split_k in _SPLITS:
                yield algorithm, split_k

    def _microseconds(
        self, plan: Plan, input: Tensor, weight: Tensor, weight_scale: Tensor | None, out: Tensor
    ) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_WARM_UPS):
            self._launch(plan, input, weight, weight_scale, out)
        start.record()
        for _ in range(_TIMED):
            self._launch(plan, input, weight, weight_scale, out)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / _TIMED


class _Thread(threading.local):
    """The libraries that a thread has opened, one a device."""

    def __init__(self) -> None:
        self._libraries: dict[torch.device, Library] = {}

    def library(self, device: torch.device) -> Library:
        if device not in self._libraries:
            self._libraries[device] = Library(device)
        return self._libraries[device]


_thread = _Thread()
