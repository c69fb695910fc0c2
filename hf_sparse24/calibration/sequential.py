"""The sequential walk: prune a model block by block, each on what the pruned blocks before it write.

For each block: the groups of projections in the order in which they run, each with statistics of its inputs as pruned
so far; then, where asked for, block matching; then the block's outputs become the next block's inputs. Two streams of
hidden states move along, the pruned model's and, for what targets the dense model, the dense one's. Under
torch.distributed every process walks its own share of the batches and the statistics are summed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_sparse24 import processes
from hf_sparse24.calibration.blocks import Batch, Stream, block_names, find_chains, record
from hf_sparse24.calibration.distillation import distill_, why_not_distilled
from hf_sparse24.calibration.fitting import Fit
from hf_sparse24.calibration.inputs import check_reached, noting_reached
from hf_sparse24.calibration.progress import Progress
from hf_sparse24.calibration.pruner import BlockPruner
from hf_sparse24.calibration.recipe import Recipe, Walked
from hf_sparse24.pattern import check_finite, check_present
from hf_sparse24.selection import Selection

logger = logging.get_logger(__name__)


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
    _say_what_is_shared(model, selection)
    names = block_names(model, [target.name for target in selection.targets])
    batches = _own_share(batches)
    walked, pruner = Walked(), BlockPruner(model, selection, recipe, device, progress)
    with _set_for_walking(model):
        with processes.together():
            chains = find_chains(model, batches[0], names)
        dense = _dense_streams(pruner, batches, chains)
        with _told_when_interrupted(pruner, [name for chain in chains for name in chain]) as bar:
            _walk(pruner, batches, chains, dense, walked, bar)
            walked.distilled = _distill(pruner, batches, chains[-1][-1])
    return walked


def _say_what_is_shared(model: nn.Module, selection: Selection) -> None:
    """Warn of weights that several layers use, as Zamba's do: the walk meets them in the first of these alone."""
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    weights = {t.name: getattr(model.get_submodule(t.module_name), t.parameter) for t in selection.targets}
    shared = [name for name, weight in weights.items() if uses[id(weight)] > 1]
    if shared:
        logger.warning_once(
            f"{len(shared)} weights, that of {shared[0]} for one, are used by later layers too: they are chosen on "
            "what the first of their layers reads."
        )


@torch.no_grad()
def why_not_distilled_at_the_end(model: nn.Module, selection: Selection, batches: Sequence[Batch]) -> str | None:
    """Return why a model cannot be distilled after the walk, or None."""
    names = block_names(model, [target.name for target in selection.targets])
    with _set_for_walking(model):
        chains = find_chains(model, batches[0], names)
        return why_not_distilled(model, batches[0], chains[-1][-1])


def _dense_streams(pruner: BlockPruner, batches: Sequence[Batch], chains: Sequence[list[str]]) -> list[Stream]:
    """Run the dense model on all batches: a stream at the start of each chain, once the data prove to reach all."""
    with processes.together(), noting_reached(pruner.model, pruner.selection.targets) as missing:
        streams = record(pruner.model, batches, chains, pruner.device)
    check_reached(missing)
    return streams


def _walk(
    pruner: BlockPruner,
    batches: Sequence[Batch],
    chains: Sequence[list[str]],
    dense: list[Stream],
    walked: Walked,
    bar: Any,
) -> None:
    """Prune all blocks, chain by chain, beside the dense model's streams where these are followed."""
    follows = pruner.recipe.follows_dense
    stream = dense[0].copy() if follows else dense[0]
    if not follows:
        del dense[1:]  # they take memory
    for number, chain in enumerate(chains):
        if number:
            with processes.together():
                (stream,) = record(pruner.model, batches, [chain], pruner.device)
        pruner.follow = dense[number] if follows else None
        for name in chain:
            bar.set_postfix_str(name)
            pruner.prune_block_(name, stream, walked)
            pruner.finished += 1
            bar.update()


def _distill(pruner: BlockPruner, batches: Sequence[Batch], last_block: str) -> Fit | None:
    """Distill the pruned model where that was asked for.

    Where the device's memory does not do, say so and leave the model as the walk did.
    """
    recipe = pruner.recipe
    if recipe.distillation is None or pruner.follow is None:
        return None
    try:
        with pruner.rounded(*pruner.targets):
            fit = distill_(
                pruner.model, pruner.masks, batches, last_block, pruner.follow, recipe.distillation, recipe.seed
            )
    except torch.OutOfMemoryError as error:
        logger.warning(
            f"The pruned model is not distilled: {str(error).splitlines()[0]} Use a smaller batch_size for that, or "
            "distill=False."
        )
        return None
    pruner.verify()
    return fit


@contextmanager
def _told_when_interrupted(pruner: BlockPruner, names: Sequence[str]) -> Iterator[Any]:
    """Yield a progress bar over the blocks, and where the walk is left early say how far it came."""
    bar = logging.tqdm(total=len(names), desc="Pruning to 2:4", unit="block")
    try:
        yield bar
    except BaseException as error:
        where = [*names, "the distillation"][pruner.finished]
        kept = "lost; with progress_folder (--progress-folder) the same call would go on there"
        if pruner.progress is not None:
            kept = f"kept in {pruner.progress.folder}; the same call goes on from there"
        logger.warning(
            f"Pruning stopped in {where} ({type(error).__name__}) with {pruner.finished} of {len(names)} blocks "
            f"finished, which are {kept}, with the dense model loaded anew."
        )
        raise
    finally:
        bar.close()


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
    size = processes.count()
    if len(batches) < size:
        raise ValueError(
            f"{size} processes share {len(batches)} calibration batches; give at least one each: lower batch_size."
        )
    return list(batches[processes.rank() :: size])
