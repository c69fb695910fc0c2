"""What projections read, call by call.

Hooks tell it of modules; a function mode tells it of 3-D stacks of experts, and of layers that are never called:
`nn.MultiheadAttention` and what is made like it hand their weights to torch's function for attention.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_sparse24.calibration.blocks import StopForward, Stream
from hf_sparse24.selection import Target

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Read(NamedTuple):
    """What a projection reads in one call.

    Attributes:
        target (`Target`): the projection, or the stack of experts.
        inputs (`Tensor`): (..., in_features).
        kept (`Tensor`, *optional*): bool, which of its rows are no padding; None where that is not known.
        expert (`int`, *optional*): which of a stack; None for all of them, (experts, tokens, in_features).
    """

    target: Target
    inputs: Tensor
    kept: Tensor | None
    expert: int | None


def module_of(block: nn.Module, name: str, target: Target) -> nn.Module:
    """Return the module of a target, whose path begins with the block's."""
    return block.get_submodule(target.module_name[len(name) + 1 :])


def run_watched(
    block: nn.Module,
    name: str,
    targets: Sequence[Target],
    stream: Stream,
    index: int,
    found: Callable[[Read], None],
) -> None:
    """Run a block on one batch and call `found` for each use of a target, in order, until it stops the forward."""
    hidden, args, kwargs = stream.call(block, name, index)
    handed = {value.data_ptr() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}

    def reads(target: Target, inputs: Tensor, expert: int | None = None) -> None:
        kept = stream.kept_tokens(index, inputs, inputs.data_ptr() in handed)
        found(Read(target, inputs, kept, expert))

    with watching([(target, module_of(block, name, target)) for target in targets], reads), suppress(StopForward):
        block(hidden, *args, **kwargs)


@contextmanager
def padding_marked(block: nn.Module, name: str, target: Target, stream: Stream, index: int) -> Iterator[None]:
    """While active, padding that enters the mixture of an expert is NaN, and so is all that its experts read of it.

    A router sends tokens where no mask follows them. They are marked in the outermost module around the experts that
    is called with all of them: there is no attention in it that could spread them.
    """
    parts = target.module_name[len(name) + 1 :].split(".")
    handles = []
    marked = False

    def mark(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal marked
        states = first_of(args, kwargs)
        kept = None if marked else stream.kept_tokens(index, states)
        if kept is None:
            return None
        marked = True
        states = states.masked_fill(~kept.unsqueeze(-1), torch.nan)
        return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): states})

    for end in range(1, len(parts) + target.is_expert_stack):
        module = block.get_submodule(".".join(parts[:end]))
        handles.append(module.register_forward_pre_hook(mark, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching(modules: Sequence[tuple[Target, nn.Module]], reads: Callable[..., Any]) -> Iterator[None]:
    """While active, call `reads(target, inputs)` when a projection runs, and add which of a stack of experts it is."""
    handles = []
    watched: list[tuple[nn.Parameter, Target]] = []
    for target, module in modules:
        if not target.packs:
            watched.append((getattr(module, target.parameter), target))
            continue

        def catch(module: nn.Module, args: Any, kwargs: Any, target: Target = target) -> None:
            reads(target, first_of(args, kwargs))

        handles.append(module.register_forward_pre_hook(catch, with_kwargs=True))
    try:
        with _WatchWeights(watched, reads):
            yield
    finally:
        for handle in handles:
            handle.remove()


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first argument of a call, which is what a projection reads."""
    return args[0] if args else next(iter(kwargs.values()))


class _WatchWeights(TorchFunctionMode):
    """Tells what is multiplied with weights that belong to no layer that is called, wherever that happens.

    These are the experts of a stack, and the weights that torch's function for attention is given.
    """

    _PRODUCTS = (
        F.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
    )

    def __init__(self, watched: Sequence[tuple[nn.Parameter, Target]], found: Callable[..., None]) -> None:
        super().__init__()
        self._stacks = [(stack, target) for stack, target in watched if target.is_expert_stack]
        self._read = {id(weight): target for weight, target in watched if not target.is_expert_stack}
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and self._read:
            return self._attention(inspect.signature(func).bind(*args, **kwargs).arguments)
        if func in self._PRODUCTS and len(args) > 1:
            for stack, target in self._stacks:
                offset = args[1].data_ptr() - stack.data_ptr()
                if args[1].ndim == 3 and offset == 0:
                    self._found(target, args[0])
                elif args[1].ndim == 2 and 0 <= offset < stack.nbytes:
                    self._found(target, args[0], offset // stack[0].nbytes)
        return func(*args, **kwargs)

    def _attention(self, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Tell what attention reads, run it up to its last projection, and tell what that reads."""
        query, key, value = (call[name] for name in ("query", "key", "value"))
        for name, inputs in zip(_ATTENTION_WEIGHTS, (query, query, key, value), strict=True):
            target = self._read.get(id(call.get(name)))
            if target is None:
                continue
            if name == "in_proj_weight" and (query.data_ptr(), query.shape) != (key.data_ptr(), key.shape):
                raise ValueError(
                    f"{target.name} reads two inputs (cross-attention), and calibrated methods take one. Keep it "
                    f"dense with modules_to_not_convert=['{target.name.split('.')[-2]}'], or use method='magnitude'."
                )
            self._found(target, _batch_first(inputs))
        weight, bias = call["out_proj_weight"], call["out_proj_bias"]
        unprojected = {"out_proj_weight": torch.eye(len(weight)).to(weight), "out_proj_bias": None}
        attended, probabilities = F.multi_head_attention_forward(**call | unprojected)
        if id(weight) in self._read:
            self._found(self._read[id(weight)], _batch_first(attended))
        return F.linear(attended, weight, bias), probabilities


def _batch_first(inputs: Tensor) -> Tensor:
    return inputs.transpose(0, 1) if inputs.ndim == 3 else inputs
