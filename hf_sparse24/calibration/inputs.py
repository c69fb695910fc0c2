"""What reaches the projections of a block, in which order, and the statistics of it.

Projections that read one tensor (q, k, v; gate, up) form a group: they share their statistics and are pruned together.
Groups are pruned in the order in which the block runs them, so that each sees inputs that the earlier ones have made
with their new weights.

A stack of experts (3-D) is a group of its own with one statistic an expert, over the tokens that the router sends it.
An expert that saw fewer tokens than it has inputs is completed with the average token of all experts: its Hessian
would be singular, and its few tokens chance.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from hf_sparse24 import processes
from hf_sparse24.calibration.blocks import StopForward, Stream
from hf_sparse24.selection import Target
from hf_sparse24.statistics import InputStatistics

logger = logging.get_logger(__name__)

Group = list[Target]


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


def find_groups(block: nn.Module, name: str, targets: Sequence[Target], stream: Stream) -> list[Group]:
    """Return the targets of a block in groups that read the same tensor, in the order in which they run.

    Where the router decides which experts run first, processes see other orders on other batches: what the first one
    found holds in all, followed by what only others reached.

    Raises:
        `ValueError`: no calibration batch of any process reaches one of them.
    """
    groups: list[Group] = []
    by_name = {target.name: target for target in targets}
    seen = [[target.name for target in group] for group in _groups_seen(block, name, targets, stream)]
    for names in itertools.chain.from_iterable(processes.gather(seen)):
        group = [by_name.pop(found) for found in names if found in by_name]
        if group:
            groups.append(group)
    if not by_name:
        return groups
    absent = next(iter(by_name))
    raise ValueError(
        f"No calibration token reached {absent}. Give calibration inputs that use it, or keep it dense with "
        f"modules_to_not_convert=['{absent.rpartition('.')[2]}']."
    )


def _groups_seen(block: nn.Module, name: str, targets: Sequence[Target], stream: Stream) -> list[Group]:
    """Return the groups that this process's batches reach, from as few of them as reach all."""
    missing = {target.name: target for target in targets}
    groups: list[Group] = []
    for index in range(len(stream)):
        by_input: dict[tuple[Any, ...], Group] = {}
        held = []  # keeps the inputs alive, so that an address means one tensor

        def found(read: Read, by_input: Any = by_input, held: Any = held) -> None:
            target, inputs = read.target, read.inputs
            key = (target.name,) if target.is_expert_stack else (inputs.data_ptr(), inputs.numel(), inputs.dtype)
            held.append(inputs)
            if missing.pop(target.name, None) is None:
                return
            if key not in by_input:
                groups.append(by_input.setdefault(key, []))
            by_input[key].append(target)

        _run_watched(block, name, list(missing.values()), stream, index, found)
        if not missing:
            break
    return groups


def group_statistics(
    block: nn.Module, name: str, group: Group, stream: Stream, dense: tuple[nn.Module, Stream] | None
) -> InputStatistics:
    """Run all batches up to a group and sum the statistics of what it reads.

    Args:
        block (`nn.Module`): the block as pruned so far.
        name (`str`): its path in the model.
        group (`list[Target]`): targets that read the same tensor.
        stream (`Stream`): the pruned model's hidden states before the block.
        dense (`tuple`, *optional*): the dense block and the dense model's stream, for asymmetric statistics.
    """
    weight = module_of(block, name, group[0]).weight
    in_features = weight.shape[group[0].dim]
    statistics = InputStatistics(in_features, weight.device, asymmetric=dense is not None)
    for index in range(len(stream)):
        read = _first_read(block, name, group[0], stream, index)
        if read is None:  # this batch does not use the module
            continue
        followed = None if dense is None else _first_read(dense[0], name, group[0], dense[1], index)
        if followed is not None or dense is None:
            statistics.add(read.inputs, None if followed is None else followed.inputs, read.kept)
    statistics.all_reduce_()
    statistics.check(group[0].name)
    if statistics.tokens < in_features:
        logger.warning_once(
            f"Projections of {in_features} inputs saw {statistics.tokens} calibration tokens: what is chosen on them "
            "will not generalize. Give more data."
        )
    return statistics


def expert_statistics(block: nn.Module, name: str, target: Target, stream: Stream) -> list[InputStatistics]:
    """Sum the statistics of the tokens routed to each expert of a stack, and complete those that saw too few.

    Only the symmetric form: the router of the dense model may send a token elsewhere.
    """
    stack = getattr(module_of(block, name, target), target.parameter)
    in_features = stack.shape[target.dim]
    statistics = [InputStatistics(in_features, stack.device) for _ in range(len(stack))]

    def found(read: Read) -> None:
        for number, rows in enumerate(read.inputs) if read.expert is None else [(read.expert, read.inputs)]:
            statistics[number].add(rows[rows.any(-1)] if read.expert is None else rows)

    for index in range(len(stream)):
        _run_watched(block, name, [target], stream, index, found)
    for statistic in statistics:
        statistic.all_reduce_()
    total = InputStatistics(in_features, stack.device)
    for statistic in statistics:
        total.hessian += statistic.hessian
        total.tokens += statistic.tokens
    total.check(target.name)
    for statistic in statistics:
        lacking = in_features - statistic.tokens
        if lacking > 0:
            statistic.hessian.add_(total.hessian, alpha=lacking / total.tokens)
            statistic.tokens = in_features
    return statistics


def producers(block: nn.Module, name: str, groups: Sequence[Group], stream: Stream) -> list[nn.Module | None]:
    """Return for each group the norm that writes what it reads, or None: told by the memory of the tensor."""
    written: dict[tuple[int, int], nn.Module] = {}
    held: list[Any] = []  # keeps the outputs alive, so that an address means one tensor
    made_by: list[nn.Module | None] = [None] * len(groups)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            held.append(output)
            written[output.data_ptr(), output.numel()] = module

    def look_up(number: int, args: Any, kwargs: Any) -> None:
        inputs = _first(args, kwargs)
        made_by[number] = written.get((inputs.data_ptr(), inputs.numel()))

    handles = [
        module.register_forward_hook(keep)
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1
    ]
    for number, group in enumerate(groups):
        if group[0].is_expert_stack:
            continue
        handles.append(
            module_of(block, name, group[0]).register_forward_pre_hook(
                lambda _, args, kwargs, number=number: look_up(number, args, kwargs), with_kwargs=True
            )
        )
    try:
        stream.run(block, name, 0)
    finally:
        for handle in handles:
            handle.remove()
    return made_by


def module_of(block: nn.Module, name: str, target: Target) -> nn.Module:
    """Return the module of a target, whose path begins with the block's."""
    return block.get_submodule(target.module_name[len(name) + 1 :])


def _first_read(block: nn.Module, name: str, target: Target, stream: Stream, index: int) -> Read | None:
    """Return what a projection reads for one batch, and run no further than it."""
    caught: list[Read] = []

    def catch(read: Read) -> None:
        caught.append(read)
        raise StopForward

    _run_watched(block, name, [target], stream, index, catch)
    return caught[0] if caught else None


def _run_watched(
    block: nn.Module,
    name: str,
    targets: Sequence[Target],
    stream: Stream,
    index: int,
    found: Callable[[Read], None],
) -> None:
    """Run a block on one batch and call `found` for each use of a target, in order, until it stops the forward."""
    handles = []
    stacks: list[tuple[nn.Parameter, Target]] = []
    hidden, args, kwargs = stream.call(block, name, index)
    handed = {value.data_ptr() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}

    def reads(target: Target, inputs: Tensor, expert: int | None = None) -> None:
        kept = stream.kept_tokens(index, inputs, inputs.data_ptr() in handed)
        found(Read(target, inputs, kept, expert))

    for target in targets:
        module = module_of(block, name, target)
        if target.is_expert_stack:
            stacks.append((getattr(module, target.parameter), target))
            continue

        def catch(module: nn.Module, args: Any, kwargs: Any, target: Target = target) -> None:
            reads(target, _first(args, kwargs))

        handles.append(module.register_forward_pre_hook(catch, with_kwargs=True))
    try:
        with _WatchStacks(stacks, reads):
            block(hidden, *args, **kwargs)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


class _WatchStacks(TorchFunctionMode):
    """Tells which inputs are multiplied with which expert of a stack, wherever in the model's code that happens."""

    _PRODUCTS = (
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
    )

    def __init__(self, stacks: Sequence[tuple[nn.Parameter, Target]], found: Callable[..., None]) -> None:
        super().__init__()
        self._stacks = stacks
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and len(args) > 1:
            for stack, target in self._stacks:
                offset = args[1].data_ptr() - stack.data_ptr()
                if args[1].ndim == 3 and offset == 0:
                    self._found(target, args[0])
                elif args[1].ndim == 2 and 0 <= offset < stack.nbytes:
                    self._found(target, args[0], offset // stack[0].nbytes)
        return func(*args, **(kwargs or {}))
