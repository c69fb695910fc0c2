"""The sequential walk: prune a model block by block, each on what the pruned blocks before it write.

For each block: the groups of projections in the order in which they run, each with statistics of its inputs as pruned
so far; then, where asked for, block matching; then the block's outputs become the next block's inputs. Two streams of
hidden states move along, the pruned model's and, for what targets the dense model, the dense one's. Under
torch.distributed every process walks its own share of the batches and the statistics are summed.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from hf_sparse24.calibration.blocks import Batch, Stream, block_names, block_of, find_chains, record
from hf_sparse24.calibration.distillation import distill_, why_not_distilled
from hf_sparse24.calibration.fitting import Fit, Masks, Schedule
from hf_sparse24.calibration.inputs import Group, expert_statistics, find_groups, group_statistics
from hf_sparse24.calibration.matching import Matching, match_block_
from hf_sparse24.calibration.progress import Progress
from hf_sparse24.calibration.solve import Solution, solve
from hf_sparse24.pattern import apply_mask_, check_finite, check_present, find_violations
from hf_sparse24.selection import Selection, Target

logger = logging.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is pruned on calibration data.

    Attributes:
        method (`str`): what chooses the mask: "magnitude", "wanda", "ria", "sparsegpt" or "alps".
        refit (`str`, *optional*): "asymmetric" or "symmetric": refit the weights that stay, against the dense model's
            output or the layer's own; None leaves what the method gives.
        dampening (`float`): share of the Hessian's mean diagonal.
        matching (`Matching`, *optional*): train each block against the dense one.
        distillation (`Schedule`, *optional*): train the whole model against the dense one at the end.
        seed (`int`): of the order of batches in training.
    """

    method: str = "alps"
    refit: str | None = "asymmetric"
    dampening: float = 0.01
    matching: Matching | None = None
    distillation: Schedule | None = None
    seed: int = 0

    @property
    def follows_dense(self) -> bool:
        """Whether the hidden states of the dense model are needed along the way."""
        matches_dense = self.matching is not None and self.matching.target == "dense"
        return self.refit == "asymmetric" or matches_dense or self.distillation is not None

    def facts(self) -> dict[str, Any]:
        """Return what the record of a model says of it, in plain JSON values."""
        return {key: value for key, value in asdict(self).items() if key not in ("method", "seed")}


@dataclass
class Walked:
    """What was done.

    Attributes:
        raised_dampening (`dict`): the dampening of each projection whose Hessian needed more than was asked for.
        matched (`dict`): the held-out error of each matched block, before and after.
        distilled (`Fit`, *optional*): the held-out divergence from the dense model, before and after distillation.
    """

    raised_dampening: dict[str, float] = field(default_factory=dict)
    matched: dict[str, Fit] = field(default_factory=dict)
    distilled: Fit | None = None

    def of_block(self, name: str) -> dict[str, Any]:
        """Return what is to be said of one block, in plain JSON values."""
        raised = {key: value for key, value in self.raised_dampening.items() if block_of(key) == name}
        return {"raised_dampening": raised, "matched": asdict(self.matched[name]) if name in self.matched else None}

    def add(self, name: str, facts: dict[str, Any]) -> None:
        """Take over what `of_block` said of a block, in an earlier run."""
        self.raised_dampening |= facts["raised_dampening"]
        if facts["matched"]:
            self.matched[name] = Fit(**facts["matched"])

    def facts(self) -> dict[str, Any]:
        """Return what the record of a model says of it, in plain JSON values: nothing of what did not happen."""
        facts = {"raised_dampening": self.raised_dampening, "distilled": self.distilled and asdict(self.distilled)}
        fits = list(self.matched.values())
        if fits:
            facts["matched"] = {key: sum(getattr(fit, key) for fit in fits) / len(fits) for key in ("before", "after")}
        return {key: value for key, value in facts.items() if value}


@torch.no_grad()
def prune_sequentially_(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Batch],
    recipe: Recipe,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Walked:
    """Prune the targets of a selection in place.

    Args:
        model (`nn.Module`): a transformers model.
        selection (`Selection`): its targets.
        batches (`Sequence[dict]`): model inputs; under torch.distributed all of them, in every process.
        recipe (`Recipe`): how.
        device (`torch.device`, *optional*): where each block goes in its turn. Default: blocks stay where they are.
        progress (`Progress`, *optional*): keeps finished blocks in a folder and takes up where it stopped.

    Raises:
        `ValueError`: the model cannot be walked, calibration data do not reach a projection, or are not finite.
            Blocks before the one named are pruned by then, the others as they were.
    """
    for target in selection.targets:
        weight = getattr(model.get_submodule(target.module_name), target.parameter)
        check_present(weight, target.name)
        check_finite(weight, target.name)
    names = block_names(model, [target.name for target in selection.targets])
    batches = _own_share(batches)
    walked, walker = Walked(), _Walker(model, selection, recipe, device, progress)
    with _set_for_walking(model):
        chains = find_chains(model, batches[0], names)
        with _told_when_interrupted(walker, [name for chain in chains for name in chain]) as bar:
            _walk(walker, batches, chains, walked, bar)
            if recipe.distillation is not None and walker.follow is not None:
                walked.distilled = distill_(
                    model, walker.masks, batches, chains[-1][-1], walker.follow, recipe.distillation, recipe.seed
                )
                walker.verify()
    return walked


@torch.no_grad()
def why_not_distilled_at_the_end(model: nn.Module, selection: Selection, batches: Sequence[Batch]) -> str | None:
    """Return why a model cannot be distilled after the walk, or None."""
    names = block_names(model, [target.name for target in selection.targets])
    with _set_for_walking(model):
        chains = find_chains(model, batches[0], names)
        return why_not_distilled(model, batches[0], chains[-1][-1])


def _walk(walker: "_Walker", batches: Sequence[Batch], chains: Sequence[list[str]], walked: Walked, bar: Any) -> None:
    """Prune all blocks, chain by chain."""
    dense = record(walker.model, batches, chains, walker.device) if walker.recipe.follows_dense else None
    for number, chain in enumerate(chains):
        if number or dense is None:
            (stream,) = record(walker.model, batches, [chain], walker.device)
        else:
            stream = dense[0].copy()
        walker.follow = None if dense is None else dense[number]
        for name in chain:
            bar.set_postfix_str(name)
            walker.prune_block_(name, stream, walked)
            walker.finished += 1
            bar.update()


@contextmanager
def _told_when_interrupted(walker: "_Walker", names: Sequence[str]) -> Iterator[Any]:
    """Yield a progress bar over the blocks, and where the walk is left early say how far it came."""
    bar = logging.tqdm(total=len(names), desc="Pruning to 2:4", unit="block")
    try:
        yield bar
    except BaseException as error:
        where = [*names, "the distillation"][walker.finished]
        folder = "..." if walker.progress is None else repr(str(walker.progress.folder))
        kept = "not kept: pass" if walker.progress is None else "kept: load the model anew and repeat the call with"
        then = "next time, to go on where it stops" if walker.progress is None else "to go on from there"
        logger.warning(
            f"Pruning stopped in {where} ({type(error).__name__}), and the model is pruned in part. "
            f"{walker.finished} of {len(names)} blocks are finished and {kept} progress_folder={folder} {then}."
        )
        raise
    finally:
        bar.close()


class _Walker:
    """What stays the same from block to block."""

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        recipe: Recipe,
        device: torch.device | str | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.selection, self.recipe, self.progress = model, selection, recipe, progress
        home = next(model.parameters()).device
        asked = None if device is None else torch.device(device)
        self.device = None if asked is None or asked == home else asked
        self.follow: Stream | None = None
        self.finished = 0
        self.masks: Masks = {}
        self.targets: dict[str, list[Target]] = {}
        for target in selection.targets:
            self.targets.setdefault(str(block_of(target.name)), []).append(target)

    def prune_block_(self, name: str, stream: Stream, walked: Walked) -> None:
        """Prune one block and move the streams behind it."""
        block = self.model.get_submodule(name)
        home = next(block.parameters()).device
        if self.device is not None:
            block.to(self.device)
        try:
            dense = copy.deepcopy(block) if self.recipe.follows_dense or self.recipe.matching else None
            if self.progress is not None and self.progress.has(name):
                walked.add(name, self.progress.load_(block, name))
            elif name in self.targets:
                self._prune_(block, name, stream, dense, walked)
                if self.progress is not None and _is_first_process():
                    self.progress.save(block, name, walked.of_block(name))
            if self.follow is not None and dense is not None:
                self.follow.hidden = self.follow.outputs(dense, name)
            stream.hidden = stream.outputs(block, name)
        finally:
            if self.device is not None:
                block.to(home)
        if self.recipe.distillation is not None:
            self._take_masks(name)

    def _prune_(self, block: nn.Module, name: str, stream: Stream, dense: nn.Module | None, walked: Walked) -> None:
        masks: Masks = {}
        for group in find_groups(block, name, self.targets[name], stream):
            for target, solution in self._solve_group(block, name, group, stream, dense):
                _write_(block, name, target, solution, masks)
                if solution.dampening > self.recipe.dampening:
                    walked.raised_dampening[target.name] = solution.dampening
        if self.recipe.matching is not None:
            targets = self._targets_of_matching(name, stream, dense)
            walked.matched[name] = match_block_(
                block, name, masks, stream, targets, self.recipe.matching, self.recipe.seed
            )
        self.verify(name)

    def _take_masks(self, name: str) -> None:
        """Read the masks of a finished block from its zeros, so that a resumed walk has the same ones."""
        for target in self.targets.get(name, ()):
            parameter = getattr(self.model.get_submodule(target.module_name), target.parameter)
            self.masks[parameter] = parameter != 0

    def _solve_group(
        self, block: nn.Module, name: str, group: Group, stream: Stream, dense: nn.Module | None
    ) -> Iterator[tuple[Target, Solution]]:
        """Yield each target of a group with its solution; of an expert stack all experts in one."""
        recipe, refitted = self.recipe, self.recipe.refit is not None
        weights = [_matrices(block, name, target) for target in group]
        if group[0].is_expert_stack:
            statistics = expert_statistics(block, name, group[0], stream)
            parts = [
                solve([weight], statistic, recipe.method, refitted, recipe.dampening)
                for weight, statistic in zip(weights[0], statistics, strict=True)
            ]
            together = Solution(
                [torch.stack([part.weights[0] for part in parts])],
                [torch.stack([part.masks[0] for part in parts])],
                max(part.dampening for part in parts),
            )
            yield group[0], together
            return
        asymmetric = recipe.refit == "asymmetric" and dense is not None and self.follow is not None
        followed = (dense, self.follow) if asymmetric else None
        solution = solve(
            weights, group_statistics(block, name, group, stream, followed), recipe.method, refitted, recipe.dampening
        )
        for target, weight, mask in zip(group, solution.weights, solution.masks, strict=True):
            yield target, Solution([weight], [mask], solution.dampening)

    def _targets_of_matching(self, name: str, stream: Stream, dense: nn.Module | None) -> list[Tensor]:
        source = self.follow if self.recipe.matching.target == "dense" else stream
        return source.outputs(dense, name)

    def verify(self, name: str | None = None) -> None:
        """Check the pattern of every target, or of those in one block."""
        for target in self.targets[name] if name else self.selection.targets:
            weight = getattr(self.model.get_submodule(target.module_name), target.parameter)
            violations = find_violations(weight, target.dim)
            if violations.count:
                raise RuntimeError(f"{target.name} is not 2:4 in {violations.count} groups after pruning.")


def _matrices(block: nn.Module, name: str, target: Target) -> Tensor:
    """Return the weight of a target with its inputs last: (N, K), or (experts, N, K)."""
    weight = getattr(block.get_submodule(target.module_name[len(name) + 1 :]), target.parameter).detach()
    return weight.movedim(target.dim, -1)


def _write_(block: nn.Module, name: str, target: Target, solution: Solution, masks: Masks) -> None:
    """Put new values into a projection, the same ones in every process, and note its mask."""
    parameter = getattr(block.get_submodule(target.module_name[len(name) + 1 :]), target.parameter)
    mask = solution.masks[0].movedim(-1, target.dim)
    weight = solution.weights[0].movedim(-1, target.dim).to(parameter.dtype).contiguous()
    mask = mask.contiguous()
    if _world_size() > 1:
        dist.broadcast(weight, 0)
        dist.broadcast(mask, 0)
    parameter.data = apply_mask_(weight, mask)
    masks[parameter] = mask


@contextmanager
def _set_for_walking(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and fused experts, whose inputs could not be told apart, and restore both."""
    training = [module for module in model.modules() if module.training]
    experts = getattr(model, "get_experts_implementation", lambda: None)()
    requires_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    switched = bool(experts) and any(value not in (None, "eager") for value in experts.values())
    model.eval()
    for parameter in requires_grad:
        parameter.requires_grad_(False)
    if switched:
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in requires_grad:
            parameter.requires_grad_(True)
        if switched:
            model.set_experts_implementation(experts)


def _own_share(batches: Sequence[Batch]) -> list[Batch]:
    """Return this process's batches."""
    size = _world_size()
    if size == 1:
        return list(batches)
    if len(batches) < size:
        raise ValueError(
            f"{size} processes share {len(batches)} calibration batches; give at least one each: lower batch_size."
        )
    return list(batches[dist.get_rank() :: size])


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_first_process() -> bool:
    return _world_size() == 1 or dist.get_rank() == 0
