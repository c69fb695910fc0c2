"""One block: its groups of projections in the order in which they run, then the block as a whole."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_sparse24 import processes
from hf_sparse24.calibration.blocks import Stream, block_of
from hf_sparse24.calibration.fitting import Masks
from hf_sparse24.calibration.inputs import Group, expert_statistics, find_groups, group_statistics, module_of
from hf_sparse24.calibration.matching import match_block_
from hf_sparse24.calibration.progress import Progress
from hf_sparse24.calibration.recipe import Recipe, Walked
from hf_sparse24.calibration.rounding import rounded
from hf_sparse24.calibration.smoothing import smooth_
from hf_sparse24.calibration.solve import Solution, full_dampening, solve
from hf_sparse24.pattern import apply_mask_, find_violations
from hf_sparse24.selection import Selection, Target
from hf_sparse24.statistics import InputStatistics


class BlockPruner:
    """Prunes the blocks of one model, one at a time, and moves the streams of hidden states behind each.

    Args:
        model (`nn.Module`): the model.
        selection (`Selection`): its targets.
        recipe (`Recipe`): how.
        device (`torch.device`, *optional*): where each block goes in its turn.
        progress (`Progress`, *optional*): keeps finished blocks.

    Attributes:
        follow (`Stream`, *optional*): the dense model's hidden states before the next block, where they are followed.
        masks (`dict`): the masks of the finished blocks, where the whole model is to be trained.
        finished (`int`): how many blocks are.
    """

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
        self._dense_outputs: list[Tensor] | None = None
        self._column_norms: dict[str, Tensor] = {}
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
                if self.progress is not None and processes.is_first():
                    self.progress.save(block, name, walked.of_block(name))
            if self.follow is not None and dense is not None:
                self.follow.hidden = self._dense_outputs or self.follow.outputs(dense, name)
                self._dense_outputs = None
            with self.rounded(name), parametrize.cached():
                stream.hidden = stream.outputs(block, name)
        finally:
            if self.device is not None:
                block.to(home)
        if self.recipe.distillation is not None:
            self._take_masks(name)

    def _prune_(self, block: nn.Module, name: str, stream: Stream, dense: nn.Module | None, walked: Walked) -> None:
        masks: Masks = {}
        groups = find_groups(block, name, self.targets[name], stream)
        for group in groups:
            for target, solution in self._solve_group(block, name, group, stream, dense):
                _write_(block, name, target, solution, masks)
                if solution.raised:
                    walked.raised_dampening[target.name] = solution.dampening
        if self.recipe.smooth:
            smoothable = [group for group in groups if not group.is_mixture and group.targets[0].packs]
            read = [(group, self._column_norms.pop(group.targets[0].name)) for group in smoothable]
            smoothed = smooth_(block, name, read, stream)
            if smoothed:
                walked.smoothed[name] = smoothed
        matching = self.recipe.matching
        if matching is not None and dense is not None:
            targets = self._targets_of_matching(name, stream, dense, self.follow, matching.target)
            with self.rounded(name):
                walked.matched[name] = match_block_(block, name, masks, stream, targets, matching, self.recipe.seed)
        self.verify(name)

    def rounded(self, *names: str) -> AbstractContextManager[None]:
        """Return a context in which the targets of some blocks round as they will when they are packed."""
        targets = [target for name in names for target in self.targets.get(name, ()) if target.packs]
        layers = [(self.model.get_submodule(target.module_name), target.dim) for target in targets]
        return rounded(layers, self.recipe.quantization)

    def _take_masks(self, name: str) -> None:
        """Read the masks of a finished block from its zeros, so that a resumed walk has the same ones."""
        for target in self.targets.get(name, ()):
            parameter = getattr(self.model.get_submodule(target.module_name), target.parameter)
            self.masks[parameter] = parameter != 0

    def _solve_group(
        self, block: nn.Module, name: str, group: Group, stream: Stream, dense: nn.Module | None
    ) -> Iterator[tuple[Target, Solution]]:
        """Yield each target of a group with its solution; of an expert stack all experts in one."""
        recipe = self.recipe
        if group.is_mixture:
            yield from self._solve_mixture(block, name, group, stream)
            return
        asymmetric = recipe.refit == "asymmetric" and dense is not None and self.follow is not None
        followed = (dense, self.follow) if asymmetric else None
        statistics = group_statistics(block, name, group, stream, followed)
        self._column_norms[group.targets[0].name] = statistics.column_norms
        weights = [_matrices(block, name, target) for target in group.targets]
        solution = self._solve(weights, statistics, recipe.quantization if group.targets[0].packs else None)
        for target, weight, mask in zip(group.targets, solution.weights, solution.masks, strict=True):
            yield target, Solution([weight], [mask], solution.dampening, solution.raised)

    def _solve_mixture(
        self, block: nn.Module, name: str, group: Group, stream: Stream
    ) -> Iterator[tuple[Target, Solution]]:
        """Solve each expert by itself, on its own tokens."""
        statistics = expert_statistics(block, name, group, stream)
        weights = [_matrices(block, name, target) for target in group.targets]
        if not group.targets[0].is_expert_stack:
            for target, weight, statistic in zip(group.targets, weights, statistics, strict=True):
                yield target, self._solve([weight], statistic, self.recipe.quantization)
            return
        parts = [self._solve([weight], statistic) for weight, statistic in zip(weights[0], statistics, strict=True)]
        yield (
            group.targets[0],
            Solution(
                [torch.stack([part.weights[0] for part in parts])],
                [torch.stack([part.masks[0] for part in parts])],
                max(part.dampening for part in parts),
                any(part.raised for part in parts),
            ),
        )

    def _solve(self, weights: list[Tensor], statistics: InputStatistics, quantization: str | None = None) -> Solution:
        recipe = self.recipe
        dampening = full_dampening(recipe.dampening, statistics)
        return solve(weights, statistics, recipe.method, recipe.refit is not None, dampening, quantization)

    def _targets_of_matching(
        self, name: str, stream: Stream, dense: nn.Module, follow: Stream | None, target: str
    ) -> list[Tensor]:
        if target == "sparse" or follow is None:
            return stream.outputs(dense, name)
        self._dense_outputs = follow.outputs(dense, name)  # the dense stream goes on from them
        return self._dense_outputs

    def verify(self, name: str | None = None) -> None:
        """Check the pattern of every target, or of those in one block."""
        for target in self.targets[name] if name else self.selection.targets:
            weight = getattr(self.model.get_submodule(target.module_name), target.parameter)
            violations = find_violations(weight, target.dim)
            if violations.count:
                raise RuntimeError(f"{target.name} is not 2:4 in {violations.count} groups after pruning.")


def _matrices(block: nn.Module, name: str, target: Target) -> Tensor:
    """Return the weight of a target with its inputs last: (N, K), or (experts, N, K)."""
    weight = getattr(module_of(block, name, target), target.parameter).detach()
    return weight.movedim(target.dim, -1)


def _write_(block: nn.Module, name: str, target: Target, solution: Solution, masks: Masks) -> None:
    """Put new values into a projection, the same ones in every process, and note its mask."""
    parameter = getattr(module_of(block, name, target), target.parameter)
    weight = torch.empty_like(parameter, memory_format=torch.contiguous_format)  # memory of its own
    weight.copy_(solution.weights[0].movedim(-1, target.dim))
    mask = solution.masks[0].movedim(-1, target.dim).contiguous()
    processes.broadcast_(weight)
    processes.broadcast_(mask)
    parameter.data = apply_mask_(weight, mask)
    masks[parameter] = mask
