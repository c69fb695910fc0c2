"""What reaches the projections of a block, in which order, and the statistics of it.

Projections that read one tensor (q, k, v; gate, up) form a group: they share their statistics and are pruned together.
Groups are pruned in the order in which the block runs them, so that each sees inputs that the earlier ones have made
with their new weights.

The experts of a mixture, a 3-D stack or a module each, are a group of their own with one statistic an expert, over the
tokens that the router sends it. An expert that saw fewer tokens than it has inputs, or none, is completed with the
average token of all experts: its Hessian would be singular, and its few tokens chance.

A few layers are never called: `nn.MultiheadAttention` and what is made like it hand their weights to torch's function
for attention (see `watching`).
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.utils import logging

from hf_sparse24 import processes
from hf_sparse24.calibration.blocks import StopForward, Stream
from hf_sparse24.calibration.watching import Read, first_of, module_of, padding_marked, run_watched, watching
from hf_sparse24.selection import Target
from hf_sparse24.statistics import InputStatistics, no_token_reached

logger = logging.get_logger(__name__)

Units = dict[str, list[Target]]


class Group(NamedTuple):
    """Projections that are pruned together.

    Attributes:
        targets (`list[Target]`): what reads the same tensors; or one projection of all experts, stacked or one by one.
        is_mixture (`bool`): whether they are experts.
        calls (`int`): how often a forward pass calls each: in DeBERTa also on the embeddings of relative positions.
    """

    targets: list[Target]
    is_mixture: bool = False
    calls: int = 1


def mixture_of(target: Target) -> str | None:
    """Return what names one projection of all experts of a mixture, or None for a projection of no expert.

    ```python
    >>> mixture_of(Target("layers.0.mlp.experts.3.w1", "layers.0.mlp.experts.3.w1", "weight", "gate", -1))
    'layers.0.mlp.experts.*.w1'

    ```
    """
    before, inside, path = target.name.partition(".experts.")
    if target.is_expert_stack or not inside:
        return target.name if target.is_expert_stack else None
    return f"{before}.experts.*.{path.partition('.')[2]}"


@contextmanager
def noting_reached(model: nn.Module, targets: Sequence[Target]) -> Iterator[Units]:
    """While active, strike from what is yielded each projection that the model runs, and each mixture."""
    missing = _units(targets)
    modules = [(target, model.get_submodule(target.module_name)) for target in targets]
    with watching(modules, lambda target, *_: missing.pop(_unit(target), None)):
        yield missing


def check_reached(missing: Units) -> None:
    """Raise `ValueError`, in all processes, when there is something that no process's calibration data reached."""
    everywhere = set.intersection(*map(set, processes.gather(list(missing))))
    for unit in missing:
        if unit in everywhere:
            raise ValueError(no_token_reached(unit))


def find_groups(block: nn.Module, name: str, targets: Sequence[Target], stream: Stream) -> list[Group]:
    """Return the targets of a block in groups, in the order in which they run.

    Where something in the data decides what runs first, processes see other orders on other batches: what the first
    one found holds in all, followed by what only others reached.

    Raises:
        `ValueError`: no calibration batch of any process reaches one of them.
    """
    groups: list[Group] = []
    missing = _units(targets)
    for units, calls in itertools.chain.from_iterable(processes.gather(_groups_seen(block, name, missing, stream))):
        group = [target for unit in units for target in missing.pop(unit, [])]
        if group:
            groups.append(Group(group, mixture_of(group[0]) is not None, calls))
    check_reached(missing)
    return groups


def _groups_seen(block: nn.Module, name: str, units: Units, stream: Stream) -> list[tuple[list[str], int]]:
    """Return the groups that this process's batches reach, with their calls, from as few batches as reach all."""
    missing = dict(units)
    groups: list[tuple[list[str], int]] = []
    for index in range(len(stream)):
        reads: list[Read] = []  # keeps the inputs alive, so that an address means one tensor
        run_watched(block, name, list(itertools.chain(*missing.values())), stream, index, reads.append)
        inputs: dict[str, list[tuple[Any, ...]]] = {}
        for read in reads:
            memory = (read.inputs.data_ptr(), read.inputs.numel(), read.inputs.dtype)
            inputs.setdefault(_unit(read.target), []).append(memory)
        by_inputs: dict[Any, list[str]] = {}
        for unit, memories in inputs.items():
            is_mixture = mixture_of(missing.pop(unit)[0]) is not None
            by_inputs.setdefault(unit if is_mixture else tuple(memories), []).append(unit)
        groups += [(found, len(inputs[found[0]])) for found in by_inputs.values()]
        if not missing:
            break
    return groups


def _units(targets: Sequence[Target]) -> Units:
    """Return what is pruned as one, by its name: single projections, and those of all experts of a mixture."""
    units: Units = {}
    for target in targets:
        units.setdefault(_unit(target), []).append(target)
    return units


def _unit(target: Target) -> str:
    return mixture_of(target) or target.name


def group_statistics(
    block: nn.Module, name: str, group: Group, stream: Stream, dense: tuple[nn.Module, Stream] | None
) -> InputStatistics:
    """Run all batches up to a group and sum the statistics of what it reads.

    Args:
        block (`nn.Module`): the block as pruned so far.
        name (`str`): its path in the model.
        group (`Group`): targets that read the same tensor.
        stream (`Stream`): the pruned model's hidden states before the block.
        dense (`tuple`, *optional*): the dense block and the dense model's stream, for asymmetric statistics.
    """
    first = group.targets[0]
    weight = getattr(module_of(block, name, first), first.parameter)
    in_features = weight.shape[first.dim]
    statistics = InputStatistics(in_features, weight.device, asymmetric=dense is not None)
    for index in range(len(stream)):
        reads = _reads(block, name, group, stream, index)
        followed = reads if dense is None else _reads(dense[0], name, group, dense[1], index)
        for read, dense_read in zip(reads, followed, strict=False):  # none where a batch does not use the module
            statistics.add(read.inputs, None if dense is None else dense_read.inputs, read.kept)
    statistics.all_reduce_()
    statistics.check(first.name)
    if statistics.tokens < in_features:
        logger.warning_once(
            f"Projections of {in_features} inputs saw {statistics.tokens} calibration tokens: what is chosen on them "
            "will not generalize. Give more data."
        )
    return statistics


def expert_statistics(block: nn.Module, name: str, group: Group, stream: Stream) -> list[InputStatistics]:
    """Sum the statistics of the tokens routed to each expert of a mixture, and complete those that saw too few.

    Only the symmetric form: the router of the dense model may send a token elsewhere.
    """
    first = group.targets[0]
    weight = getattr(module_of(block, name, first), first.parameter)
    in_features = weight.shape[first.dim]
    number_of = {target.name: number for number, target in enumerate(group.targets)}
    experts = len(weight) if first.is_expert_stack else len(number_of)
    statistics = [InputStatistics(in_features, weight.device) for _ in range(experts)]

    def found(read: Read) -> None:
        at_once = first.is_expert_stack and read.expert is None  # zeros stand for what is routed elsewhere
        number = number_of[read.target.name] if read.expert is None else read.expert
        for expert, rows in enumerate(read.inputs) if at_once else [(number, read.inputs)]:
            is_padding = rows.isnan().all(-1)
            statistics[expert].add(rows[~is_padding & rows.any(-1) if at_once else ~is_padding])

    for index in range(len(stream)):
        with padding_marked(block, name, first, stream, index):
            run_watched(block, name, group.targets, stream, index, found)
    for statistic in statistics:
        statistic.all_reduce_()
    total = InputStatistics(in_features, weight.device)
    for statistic in statistics:
        total.hessian += statistic.hessian
        total.tokens += statistic.tokens
    total.check(_unit(first))
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
        inputs = first_of(args, kwargs)
        made_by[number] = written.get((inputs.data_ptr(), inputs.numel()))

    handles = [
        module.register_forward_hook(keep)
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1
    ]
    for number, group in enumerate(groups):
        if group.is_mixture or not group.targets[0].packs:
            continue
        handles.append(
            module_of(block, name, group.targets[0]).register_forward_pre_hook(
                lambda _, args, kwargs, number=number: look_up(number, args, kwargs), with_kwargs=True
            )
        )
    try:
        stream.run(block, name, 0)
    finally:
        for handle in handles:
            handle.remove()
    return made_by


def _reads(block: nn.Module, name: str, group: Group, stream: Stream, index: int) -> list[Read]:
    """Return what the projections of a group read for one batch, call by call, and run no further than the last."""
    reads: list[Read] = []

    def catch(read: Read) -> None:
        reads.append(read)
        if len(reads) == group.calls:
            raise StopForward

    run_watched(block, name, group.targets[:1], stream, index, catch)
    return reads
