"""`prune_`: choose the projections of a model, choose their weights, write the zeros, say what was done."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_sparse24.config import Sparse24Config
from hf_sparse24.criteria.saliency import SALIENCY
from hf_sparse24.identity import declare_dense, record_of
from hf_sparse24.pattern import apply_mask_, check_finite, find_violations, mask_2to4
from hf_sparse24.report import SparsityReport, sparsity_report
from hf_sparse24.selection import Selection, Target, select
from hf_sparse24.version import __version__

logger = logging.get_logger(__name__)


@torch.no_grad()
def prune_(model: nn.Module, config: Sparse24Config | None = None, calibration: Any = None) -> SparsityReport:
    """Prune a model in memory to 2:4, in place. The weights stay dense tensors, with exact zeros.

    The config of the model gets a `sparse24` record of what was done.

    One tensor at a time: the peak is the model, and the scores, the mask and a copy of one matrix.

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
    model: nn.Module, config: Sparse24Config, calibration: Any = None
) -> tuple[Selection, dict[str, Any]]:
    """Prune what the config asks for, and return what was chosen and the record of what was done.

    A model with a record, pruned before and perhaps retrained since, keeps its choice of modules unless the config
    names others; with method "auto", if it still is 2:4, it keeps its weights and its record too.
    """
    known = record_of(model)
    config = config.completed_by(known)
    selection = select(model, config.target_modules, config.modules_to_not_convert)
    if known and config.method == "auto" and selection.targets and find_violating(model, selection) is None:
        return selection, {**known, "roles": selection.roles}
    method = resolve_method(config, calibration)
    prune_selected_(model, selection, method)
    return selection, config.record(method, selection.roles)


def prune_selected_(model: nn.Module, selection: Selection, method: str) -> None:
    """Prune the targets of a selection in place, with a method that needs no data."""
    if not selection.targets:
        reasons = "; ".join(sorted({matrix.reason for matrix in selection.skipped})) or "it has none"
        raise ValueError(
            f"Nothing to prune in {type(model).__name__}: every matrix stays dense ({reasons}). "
            "Name projections with target_modules."
        )
    for target in logging.tqdm(selection.targets, desc="Pruning to 2:4", unit="matrix", leave=False):
        _prune_target_(model.get_submodule(target.module_name), target, method)


def find_violating(model: nn.Module, selection: Selection) -> Target | None:
    """Return the first target that is not 2:4, or None."""
    for target in selection.targets:
        if find_violations(getattr(model.get_submodule(target.module_name), target.parameter), target.dim).count:
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


def _prune_target_(module: nn.Module, target: Target, method: str) -> None:
    parameter = getattr(module, target.parameter)
    if parameter.is_meta:
        raise ValueError(
            f"{target.name} is offloaded and cannot be pruned where it is. Load the model onto one device, save it "
            "packed, and load that with the device map."
        )
    check_finite(parameter, target.name)
    weight = parameter.data
    mask = mask_2to4(SALIENCY[method](weight), target.dim)
    # In place, since fresh memory costs more than the pruning; but what is mapped from the checkpoint's file (memory
    # that torch does not own and cannot resize) would be copied page by page, which costs more still.
    parameter.data = apply_mask_(weight if weight.untyped_storage().resizable() else weight.clone(), mask)
