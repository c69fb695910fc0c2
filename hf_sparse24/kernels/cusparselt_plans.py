"""The library cuSPARSELt on one device: plans that are kept, and the fastest algorithm for each.

The library plans a product before it runs it, which takes half a millisecond of the host. A plan is made once for a
shape, with the algorithm that `kernels.autotune` found fastest for shapes near it, and kept; the longest unused ones
are dropped. Bindings are NVIDIA's own, `nvmath.bindings.cusparseLt`.

A plan is made outside of the capture of a CUDA graph, by a call of the same shape before; within a capture no
algorithm is searched. Workspaces come from torch's allocator at every call, so that a graph owns what it was captured
with.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from hf_sparse24.kernels.autotune import Choice, Choices, bucket

_CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.int8: 3, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
_ROW_ORDER, _COLUMN_ORDER = 2, 1
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1
_ALIGNMENT = 16
_SPLITS = (1, 2, 4)  # Hopper refuses all but 1
# On an H100 (0.8.0) a search over float16's algorithms ended in an illegal instruction; the default one always ran.
_NOT_SEARCHED = (torch.float16,)
_WARM_UPS, _TIMED = 2, 5
_KEPT = 2048  # plans a device, some kilobytes each

logger = logging.get_logger(__name__)
choices = Choices()


class Problem(NamedTuple):
    """What a plan depends on: out (M, N) = input (M, K) @ weight (N, K).T, rows of the weight scaled where int8."""

    outputs: int
    features: int
    tokens: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    has_bias: bool


class Operands(NamedTuple):
    """What a plan is run on; shapes as in `Problem`. `alpha` has N values, or is None: one; so has `bias`: zero."""

    input: Tensor
    weight: Tensor
    alpha: Tensor | None
    bias: Tensor | None
    out: Tensor


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
        self._bias = ctypes.c_void_p()
        try:
            descriptor = self._describe(problem)
            self._selection = self._own(
                self._lt.matmul_alg_selection_init(self._handle, descriptor, int(self._lt.MatmulAlg.DEFAULT)),
                self._lt.matmul_alg_selection_destroy,
            )
            self._set(self._lt.MatmulAlgAttribute.CONFIG_ID, algorithm)
            if split_k != 1:
                self._set(self._lt.MatmulAlgAttribute.SPLIT_K, split_k)
            self.pointer = self._own(
                self._lt.matmul_plan_init(self._handle, descriptor, self._selection),
                self._lt.matmul_plan_destroy,
            )
            self.workspace = int(self._lt.matmul_get_workspace(self._handle, self.pointer))
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Free what the library holds for the plan."""
        while self._destroy:
            destroy, pointer = self._destroy.pop()
            destroy(pointer)

    def set_bias(self, address: int) -> None:
        """Say where the bias of the next run stands: the plan reads its descriptor anew each time."""
        self._bias.value = address
        attribute = int(self._lt.MatmulDescAttribute.BIAS_POINTER)
        self._lt.matmul_desc_set_attribute(
            self._handle, self._descriptor, attribute, ctypes.addressof(self._bias), ctypes.sizeof(self._bias)
        )

    def number_of_algorithms(self) -> int:
        """Return how many algorithms the library has for the problem; it refuses some of them."""
        value = ctypes.c_int32()
        attribute = int(self._lt.MatmulAlgAttribute.CONFIG_MAX_ID)
        self._lt.matmul_alg_get_attribute(
            self._handle, self._selection, attribute, ctypes.addressof(value), ctypes.sizeof(value)
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
        self._descriptor = descriptor
        if problem.has_bias:
            self.set_bias(_ALIGNMENT)  # any address, until there is one
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


def _sizes(tokens: int) -> tuple[str, str]:
    """Return what a choice is known by: numbers of tokens of about this size, and this very number."""
    return f"about {bucket(tokens)} tokens", f"{tokens} tokens"


class Library:
    """The library on one device, for all threads, one at a time: its handle and its plans."""

    def __init__(self, device: int) -> None:
        from nvmath.bindings import cusparseLt

        self.lt, self.device = cusparseLt, device
        self.handle = cusparseLt.init()
        self._plans: OrderedDict[Problem, Plan] = OrderedDict()
        self._lock = threading.RLock()
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        self._numbers = (one, zero)  # kept, since the library reads them by address
        self._one, self._zero = ctypes.addressof(one), ctypes.addressof(zero)
        self._streams = (ctypes.c_void_p * 1)()
        version = cusparseLt.get_version(self.handle)
        self._machine = f"{torch.cuda.get_device_name(device)}, cuSPARSELt {version}"

    def run(self, problem: Problem, operands: Operands) -> None:
        """Run a problem on the current stream; the first time, make a plan for it."""
        with self._lock:
            plan = self._plans.get(problem)
            if plan is not None:
                self._plans.move_to_end(problem)
                self._launch(plan, operands)
            elif torch.cuda.is_current_stream_capturing():
                self._run_while_capturing(problem, operands)
            else:
                plan = self._plans[problem] = self._best_plan(problem, operands)
                if len(self._plans) > _KEPT:
                    self._plans.popitem(last=False)[1].close()
                self._launch(plan, operands)

    def choice(self, problem: Problem) -> Choice:
        """Return the algorithm that a problem which has run was found to be fastest with."""
        known = (choices.known(self._key(problem, size)) for size in reversed(_sizes(problem.tokens)))
        return next(choice for choice in known if choice is not None)

    def _launch(self, plan: Plan, operands: Operands) -> None:
        self._streams[0] = torch._C._cuda_getCurrentRawStream(self.device)
        workspace = None
        if plan.workspace:
            workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=operands.out.device)
        if operands.bias is not None:
            plan.set_bias(operands.bias.data_ptr())
        out = operands.out.data_ptr()
        self.lt.matmul(
            self.handle,
            plan.pointer,
            self._one if operands.alpha is None else operands.alpha.data_ptr(),
            operands.weight.data_ptr(),
            operands.input.data_ptr(),
            self._zero,
            out,
            out,
            0 if workspace is None else workspace.data_ptr(),
            ctypes.addressof(self._streams),
            1,
        )

    def _best_plan(self, problem: Problem, operands: Operands) -> Plan:
        """Return a plan with the algorithm that is fastest for the problem or, at first, for one of about its size."""
        for size in _sizes(problem.tokens):
            choice = choices.find(
                self._key(problem, size),
                lambda: self._candidates(problem),
                lambda *candidate: self._microseconds(problem, operands, *candidate),
            )
            plan = self._plan(problem, choice)
            if plan is not None:
                return plan
        raise RuntimeError(f"cuSPARSELt refuses {problem} with the algorithm that it ran a moment ago.")

    def _run_while_capturing(self, problem: Problem, operands: Operands) -> None:
        """Run a problem that never ran before, where nothing can be measured; the plan is not kept."""
        known = choices.known(self._key(problem, _sizes(problem.tokens)[0]))
        if known is None:
            logger.warning_once(
                "A CUDA graph is captured with shapes that never ran before: in it cuSPARSELt takes its default "
                "algorithm. Run the model once before, or hf-sparse24 tune."
            )
        plan = self._plan(problem, known) or Plan(self, problem, 0, 1)
        self._launch(plan, operands)
        plan.close()

    def _key(self, problem: Problem, size: str) -> str:
        dtypes = f"{str(problem.dtype)[6:]} to {str(problem.out_dtype)[6:]}"
        return f"{self._machine}, {dtypes}, {problem.outputs}x{problem.features}, {size}"

    def _plan(self, problem: Problem, choice: Choice | None) -> Plan | None:
        """Return a plan for a choice, or None where the library refuses it for this very number of tokens."""
        if choice is None:
            return None
        try:
            return Plan(self, problem, choice.algorithm, choice.split_k)
        except self.lt.cuSPARSELtError:
            return None

    def _candidates(self, problem: Problem) -> Iterator[tuple[int, int]]:
        if problem.dtype in _NOT_SEARCHED:
            logger.warning_once(
                "cuSPARSELt runs float16 with its default algorithm, on Hopper a slow one; bfloat16 is faster."
            )
            yield 0, 1
            return
        plan = Plan(self, problem, 0, 1)
        algorithms = plan.number_of_algorithms()
        plan.close()
        for algorithm in range(algorithms):
            for split_k in _SPLITS:
                yield algorithm, split_k

    def _microseconds(self, problem: Problem, operands: Operands, algorithm: int, split_k: int) -> float:
        plan = None
        try:
            plan = Plan(self, problem, algorithm, split_k)
            return self._time(plan, operands)
        except self.lt.cuSPARSELtError:
            return float("inf")
        finally:
            if plan is not None:
                plan.close()

    def _time(self, plan: Plan, operands: Operands) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_WARM_UPS):
            self._launch(plan, operands)
        start.record()
        for _ in range(_TIMED):
            self._launch(plan, operands)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / _TIMED
