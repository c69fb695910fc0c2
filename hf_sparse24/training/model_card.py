"""What a model card says of a retrained model: tags, and a section on the pattern."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState

from hf_sparse24.report import sparsity_report
from hf_sparse24.version import __version__

TAGS = ("2:4", "sparsity")


def with_tags(tags: str | list[str] | None) -> list[str]:
    """Add this package's tags to those that were asked for."""
    asked = [tags] if isinstance(tags, str) else list(tags or ())
    return asked + [tag for tag in TAGS if tag not in asked]


def append_section(folder: str, model: nn.Module, policy: str, state: TrainerState) -> None:
    """Append to the card in a folder what is 2:4, how it was kept so, and what stayed dense and why."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    report = sparsity_report(model)
    totals = report.totals
    reasons: dict[str, int] = {}
    for row in report.rows:
        if row.state == "dense":
            reasons[row.reason or "not pruned"] = reasons.get(row.reason or "not pruned", 0) + 1
    lines = [
        "",
        "## 2:4 sparsity",
        "",
        f"{totals['matrices_2to4']} of {totals['matrices']} matrices hold at most two nonzeros in every four "
        f"consecutive weights of a row; violating groups: {totals['violating_groups']}. The weights are ordinary "
        "tensors with zeros and load without any package; `hf_sparse24.pack_` packs them.",
        "",
        f"- Trained for {state.global_step} steps with mask policy `{policy}`, hf_sparse24 {__version__}.",
        f"- Kept dense: {', '.join(f'{count} ({reason})' for reason, count in reasons.items()) or 'nothing'}.",
        *_last_losses(state.log_history),
    ]
    with (Path(folder) / "README.md").open("a", encoding="utf8") as file:
        file.write("\n".join(lines) + "\n")


def _last_losses(history: list[dict[str, Any]]) -> list[str]:
    lines = []
    for key, what in (
        ("eval_loss", "Loss on the evaluation set"),
        ("distill_logit_loss", "Divergence from the teacher"),
    ):
        values = [entry[key] for entry in history if key in entry]
        if values:
            lines.append(f"- {what}: {values[0]:.4g} at first, {values[-1]:.4g} at the end.")
    return lines
