"""`prune_`: choose the projections of a model, choose their weights, write the zeros, say what was done."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_sparse24.config import Sparse24Config
from hf_sparse24.criteria.saliency import SALIENCY
from hf_sparse24.identity import declare_dense, record_of
from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.pattern import check_finite, check_present, find_violations, prune_into
from hf_sparse24.report import SparsityReport, sparsity_report
from hf_sparse24.selection import Selection, Target, select
from hf_sparse24.version import __version__

logger = logging.get_logger(__name__)


@torch.no_grad()
def prune_(model: nn.Module, config: Sparse24Config | None = None, calibration: Any = None) -> SparsityReport:
    """Prune a model in memory to 2:4, in place. The weights stay dense tensors, with exact zeros.

    The config of the model gets a `sparse24` record of what was done.

    One matrix at a time: the peak is the model and at most one copy of a matrix. (Weights that are mapped from a file
    count twice until the last of them is replaced: the file's pages stay, as cache.)

    Args:
        model (`nn.Module`): a transformers model, on any device.
        config (`Sparse24Config`, *optional*): method and modules; `pack` and `quantization` are left to `pack_`.
        calibration (*optional*): inputs for calibrated methods.

    Returns:
        `SparsityReport`: what the model is made of now.

    Raises:
        `ValueError`: a name in the config matches nothing, nothing is left to prune, or a weight is not finite or is
            offloaded. The model is then as it was before the module that is named.
        `NotImplementedError`: the method is not available in this version.
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

    With `in_place=False` no memory is written to that the parameters had before.
    """
    refuse_packed_layers(model)
    known = record_of(model)
    config = config.completed_by(known)
    selection = select(model, config.target_modules, config.modules_to_not_convert)
    if known and config.method == "auto" and selection.targets and find_violating(model, selection) is None:
        return selection, {**known, **config.choices(), "roles": selection.roles}
    method = resolve_method(config, calibration)
    prune_selected_(model, selection, method, in_place)
    return selection, config.record(method, selection.roles)


def prune_selected_(model: nn.Module, selection: Selection, method: str, in_place: bool = True) -> None:
    """Prune the targets of a selection in place, with a method that needs no data."""
    if not selection.targets:
        reasons = "; ".join(sorted({matrix.reason for matrix in selection.skipped})) or "it has none"
        raise ValueError(
            f"Nothing to prune in {type(model).__name__}: every matrix stays dense ({reasons}). "
            "Name projections with target_modules."
        )
    for target in logging.tqdm(selection.targets, desc="Pruning to 2:4", unit="matrix", leave=False):
        _prune_target_(model.get_submodule(target.module_name), target, method, in_place)


def refuse_packed_layers(model: nn.Module) -> None:
    """Raise `ValueError` when a model has packed layers: pruning or packing the rest would leave two kinds in one."""
    packed = [name for name, module in model.named_modules() if isinstance(module, Sparse24Linear)]
    if packed:
        raise ValueError(
            f"{type(model).__name__} has {len(packed)} packed 2:4 layers already, {packed[0] or 'itself'} for one. "
            "Call unpack_ on it first."
        )


def find_violating(model: nn.Module, selection: Selection) -> Target | None:
    """Return the first target that is not 2:4, or None."""
    for target in selection.targets:
        weight = getattr(model.get_submodule(target.module_name), target.parameter)
        check_present(weight, target.name)
        if find_violations(weight, target.dim).count:
            return target
    return None


def check_method(config: Sparse24Config, calibration: Any = None) -> None:
    """Raise `NotImplementedError` when the method is not available in this version."""
    has_data = calibration is not None or config.dataset is not None
    if has_data or config.method not in ("auto", *SALIENCY):
        asked = f"method={config.method!r}" + (" with calibration data" if has_data else "")
        raise NotImplementedError(
            f"{asked} is not available yet in hf_sparse24 {__version__}; use method='magnitude' without data."
        )


def resolve_method(config: Sparse24Config, calibration: Any = None) -> str:
    """Return the method that runs. "auto" without data is magnitude, and says what that costs."""
    check_method(config, calibration)
    if config.method != "auto":
        return config.method
    logger.warning_once(
        "Sparse24Config(method='auto') without a dataset prunes by magnitude. A language model then needs retraining: "
        "magnitude alone ruins its perplexity."
    )
    return "magnitude"


def _prune_target_(module: nn.Module, target: Target, method: str, in_place: bool) -> None:
    parameter = getattr(module, target.parameter)
    check_present(parameter, target.name)
    check_finite(parameter, target.name)
    weight = parameter.data
    # In place, since fresh memory costs more than the pruning; but what is mapped from the checkpoint's file (memory
    # that torch does not own and cannot resize) would be copied page by page, which costs more still.
    pruned = weight if in_place and weight.untyped_storage().resizable() else torch.empty_like(weight)
    prune_into(pruned, weight, SALIENCY[method], target.dim)
    parameter.data = pruned
