"""`prune_`: choose the projections of a model, choose their weights, write the zeros, say what was done."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_sparse24 import processes
from hf_sparse24.calibration.fitting import Schedule
from hf_sparse24.calibration.matching import Matching
from hf_sparse24.calibration.progress import Progress, fingerprint_data, fingerprint_model
from hf_sparse24.calibration.recipe import Recipe
from hf_sparse24.calibration.sequential import prune_sequentially_, why_not_distilled_at_the_end
from hf_sparse24.calibration.text import calibration_batches, is_text
from hf_sparse24.config import CALIBRATED_METHODS, Sparse24Config
from hf_sparse24.criteria.saliency import SALIENCY
from hf_sparse24.identity import declare_dense, record_of
from hf_sparse24.nn import PackedModule
from hf_sparse24.pattern import check_finite, check_present, find_violations, prune_into
from hf_sparse24.report import SparsityReport, sparsity_report
from hf_sparse24.selection import Selection, Target, select
from hf_sparse24.shards import check_shards, is_sharded, local
from hf_sparse24.version import __version__

logger = logging.get_logger(__name__)

_ONLY_WITH_DATA = ("refit", "match_blocks", "distill", "smooth", "calibration_device", "progress_folder")

DISTILLATION = Schedule(steps=300, learning_rate=5e-3)
BYTES_A_LOGIT = 32  # student's and teacher's, their gradient, and in float32 the softmax of a sequence: at most
BYTES_A_DISTILLED_WEIGHT = 20  # in float32: the weight, its gradient, Adam's two moments, the best state so far


@torch.no_grad()
def prune_(model: nn.Module, config: Sparse24Config | None = None, calibration: Any = None) -> SparsityReport:
    """Prune a model in memory to 2:4, in place. The weights stay dense tensors, with exact zeros.

    The config of the model gets a `sparse24` record of what was done.

    Without calibration data one matrix at a time: the peak is the model and at most one copy of a matrix. (Weights
    that are mapped from a file count twice until the last of them is replaced: the file's pages stay, as cache.) With
    data it is the model, a second copy of one block, the hidden states of all batches and a layer's Hessian.

    In each process of torchrun or accelerate launch, called with the same arguments, it walks a share of the data and
    leaves the same weights. Where there is no process group yet, one is made then.

    Args:
        model (`nn.Module`): a transformers model, on any device.
        config (`Sparse24Config`, *optional*): method and modules. Packing is left to `pack_`; with `quantization` what
            calibrated methods write is fitted to be rounded so.
        calibration (*optional*): calibration data in place of `config.dataset`, in any form that it takes.

    Returns:
        `SparsityReport`: what the model is made of now.

    Raises:
        `ValueError`: a name in the config matches nothing, nothing is left to prune, a weight is not finite or is
            offloaded, or the calibration data do not do. The model is then as it was before the module that is named;
            one that was stopped between blocks is pruned in part, and has to be loaded anew.
    """
    config = config or Sparse24Config()
    _, record = prune_on_request_(model, config, calibration)
    declare_dense(model, record)
    return sparsity_report(model, config.target_modules, config.modules_to_not_convert)


def prune_on_request_(
    model: nn.Module, config: Sparse24Config, calibration: Any = None, in_place: bool = True
) -> tuple[Selection, dict[str, Any]]:
    """Prune what the config asks for, and return what was chosen and the record of what was done.

    A model with a record, pruned before and perhaps retrained since, keeps its choice of modules unless the config
    names others; with method "auto", if it still is 2:4, it keeps its weights and its record too.

    With `in_place=False` no memory is written to that the parameters had before, unless they are sharded.
    """
    refuse_packed_layers(model)
    known = record_of(model)
    config = config.completed_by(known)
    selection = select(model, config.target_modules, config.modules_to_not_convert)
    data = config.dataset if calibration is None else calibration
    unchanged = known and config.method == "auto" and data is None
    if unchanged and selection.targets and find_violating(model, selection) is None:
        return selection, {**known, **config.choices(), "roles": selection.roles}
    method = resolve_method(config, data)
    _refuse_nothing(model, selection)
    if data is None:
        prune_selected_(model, selection, method, in_place)
        return selection, config.record(method, selection.roles)
    facts = prune_calibrated_(model, selection, config, method, data)
    return selection, config.record(method, selection.roles, facts)


def prune_calibrated_(
    model: nn.Module, selection: Selection, config: Sparse24Config, method: str, data: Any
) -> dict[str, Any]:
    """Prune the targets of a selection on calibration data, and return what is to be recorded of it."""
    _refuse_shards(model, selection)
    processes.join()
    with processes.together():
        batches = calibration_batches(
            data, model, config.tokenizer, config.num_samples, config.sequence_length, config.batch_size, config.seed
        )
    recipe = recipe_of(config, method, config.calibration_device or next(model.parameters()).device)
    if torch.is_inference_mode_enabled() and (recipe.matching is not None or recipe.distillation is not None):
        raise ValueError(
            "Block matching and distillation train, which torch.inference_mode() forbids. Prune outside of it, or "
            "with match_blocks=False and distill=False."
        )
    reason = None
    if recipe.distillation is not None:
        with processes.together():
            reason = _why_not_distilled(model, selection, batches)
        reason = next(filter(None, processes.gather(reason)), None)  # each GPU has another amount of free memory
    if reason is not None and config.distill:
        raise ValueError(
            f"distill=True cannot distill {type(model).__name__}: {reason}. Use distill=False (--no-distill)."
        )
    if reason is not None:
        logger.warning(f"{type(model).__name__} is pruned without distillation: {reason}.")
        recipe = replace(recipe, distillation=None)
    if config.method == "auto" and recipe.matching is None and config.match_blocks is None:
        logger.warning_once(
            "By default blocks are matched, and the model distilled, on a GPU only; match_blocks=True and "
            "distill=True (--match-blocks --distill) do so here, slowly."
        )
    windows = {"sequence_length": batches[0]["input_ids"].shape[1]} if is_text(data) else {}
    facts = {**config.describe_data(data), **windows, **recipe.facts()}
    progress = _progress(model, selection, config.progress_folder, facts, recipe, batches)
    walked = prune_sequentially_(model, selection, batches, recipe, config.calibration_device, progress)
    return {**facts, **walked.facts()}


def _why_not_distilled(model: nn.Module, selection: Selection, batches: Sequence[dict[str, Any]]) -> str | None:
    """Return why a model cannot be distilled after the walk, where it is, or None."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        weights = [getattr(model.get_submodule(t.module_name), t.parameter).numel() for t in selection.targets]
        logits = _tokens(batches) * getattr(model.config.get_text_config(), "vocab_size", 0) * BYTES_A_LOGIT
        needed, free = sum(weights) * BYTES_A_DISTILLED_WEIGHT + logits, torch.cuda.mem_get_info(device)[0]
        if needed > free * 0.7:  # the rest is for activations
            return (
                f"it takes {needed / 1e9:.0f} GB and the activations of a batch, of {free / 1e9:.0f} GB that are free"
            )
    return why_not_distilled_at_the_end(model, selection, batches)


def _tokens(batches: Sequence[dict[str, Any]]) -> int:
    """Return the most tokens of a batch for which a language model writes logits."""
    ids = [batch.get("decoder_input_ids", batch.get("input_ids")) for batch in batches]
    return max((tensor.numel() for tensor in ids if isinstance(tensor, torch.Tensor)), default=0)


def _progress(
    model: nn.Module,
    selection: Selection,
    folder: str | None,
    facts: dict[str, Any],
    recipe: Recipe,
    batches: Sequence[dict[str, Any]],
) -> Progress | None:
    if folder is None:
        return None
    description = {
        **facts,
        "method": recipe.method,
        "seed": recipe.seed,
        "targets": [target.name for target in selection.targets],
        "data": fingerprint_data(batches),
        "model": fingerprint_model(model),
        "version": __version__,
    }
    return Progress(folder, description)


def recipe_of(config: Sparse24Config, method: str, device: torch.device | str) -> Recipe:
    """Return the recipe that a config asks for, with what it leaves open filled in for a device."""
    matches = torch.device(device).type == "cuda" if config.match_blocks is None else config.match_blocks
    at_home = config.calibration_device is None  # a model that lives on the CPU would be distilled there
    distills = matches and config.method == "auto" and at_home if config.distill is None else config.distill
    refit = "asymmetric" if config.refit in (None, True) else config.refit
    return Recipe(
        method=method,
        refit=refit or None,
        dampening=config.dampening,
        matching=Matching() if matches else None,
        distillation=DISTILLATION if distills else None,
        quantization=config.quantization,
        smooth=config.smooth is not False,
        seed=config.seed,
    )


def prune_selected_(model: nn.Module, selection: Selection, method: str, in_place: bool = True) -> None:
    """Prune the targets of a selection in place, with a method that needs no data."""
    for target in logging.tqdm(selection.targets, desc="Pruning to 2:4", unit="matrix", leave=False):
        _prune_target_(model.get_submodule(target.module_name), target, method, in_place)


def refuse_packed_layers(model: nn.Module) -> None:
    """Raise `ValueError` when a model has packed layers: pruning or packing the rest would leave two kinds in one."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedModule)]
    if packed:
        raise ValueError(
            f"{type(model).__name__} has {len(packed)} packed 2:4 layers already, {packed[0] or 'itself'} for one. "
            "Call unpack_ on it first."
        )


def find_violating(model: nn.Module, selection: Selection) -> Target | None:
    """Return the first target that is not 2:4, or None. Of a sharded model every process has to call it."""
    for target in selection.targets:
        weight = getattr(model.get_submodule(target.module_name), target.parameter)
        check_present(weight, target.name)
        check_shards(weight, target.dim, target.name)
        count = find_violations(local(weight), target.dim).count
        if processes.largest(count, local(weight).device) if is_sharded(weight) else count:
            return target
    return None


def check_method(config: Sparse24Config, calibration: Any = None) -> None:
    """Raise `ValueError` when a config asks for calibration without data, or for a GPU that is not there."""
    if torch.device(config.calibration_device or "cpu").type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"calibration_device={config.calibration_device!r} was asked for and torch sees no CUDA device. "
            "Leave it out to prune where the model is."
        )
    if calibration is not None or config.dataset is not None:
        return
    asked = [f"method={config.method!r}"] if config.method in CALIBRATED_METHODS else []
    asked += [f"{key}={getattr(config, key)!r}" for key in _ONLY_WITH_DATA if getattr(config, key)]
    if asked:
        raise ValueError(
            f"{asked[0]} needs calibration data; pass dataset=... (--dataset; 'self' lets the model write its own), "
            "or use method='magnitude' alone."
        )


def resolve_method(config: Sparse24Config, calibration: Any = None) -> str:
    """Return the method that runs. "auto" without data is magnitude, and says what that costs."""
    check_method(config, calibration)
    if config.method != "auto":
        return config.method
    if calibration is not None or config.dataset is not None:
        return Recipe().method
    logger.warning_once(
        "Sparse24Config(method='auto') without a dataset prunes by magnitude. A language model then needs retraining: "
        "magnitude alone ruins its perplexity."
    )
    return "magnitude"


def _refuse_shards(model: nn.Module, selection: Selection) -> None:
    for target in selection.targets:
        if is_sharded(getattr(model.get_submodule(target.module_name), target.parameter)):
            raise ValueError(
                f"Calibrated methods take whole weights; {target.name} is sharded over processes. Load the model "
                "without distributed_config, where processes share the data, or use method='magnitude' alone."
            )


def _refuse_nothing(model: nn.Module, selection: Selection) -> None:
    if not selection.targets:
        reasons = "; ".join(sorted({matrix.reason for matrix in selection.skipped})) or "it has none"
        raise ValueError(
            f"Nothing to prune in {type(model).__name__}: every matrix stays dense ({reasons}). "
            "Name projections with target_modules."
        )


def _prune_target_(module: nn.Module, target: Target, method: str, in_place: bool) -> None:
    parameter = getattr(module, target.parameter)
    check_present(parameter, target.name)
    check_shards(parameter, target.dim, target.name)
    weight = local(parameter)
    check_finite(weight, target.name)
    # In place, since fresh memory costs more than the pruning; but what is mapped from the checkpoint's file (memory
    # that torch does not own and cannot resize) would be copied page by page, which costs more still.
    pruned = weight if in_place and weight.untyped_storage().resizable() else torch.empty_like(weight)
    prune_into(pruned, weight, SALIENCY[method], target.dim)
    if is_sharded(parameter):
        weight.copy_(pruned)
    else:
        parameter.data = pruned
