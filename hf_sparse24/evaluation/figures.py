"""A figure as data: what was measured, on how much, which direction is better, and what is left of the dense model."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table

# metric: which direction is better
METRICS = {
    "perplexity": "lower",
    "nll": "lower",
    "word_error_rate": "lower",
    "accuracy": "higher",
    "recall_at_1": "higher",
    "mean_reciprocal_rank": "higher",
    "feature_cosine": "higher",
}
_RECOVERY_IS = {"lower": "100 * dense / pruned", "higher": "100 * pruned / dense"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One figure of a model, and of the dense model where that was measured too.

    Attributes:
        metric (`str`): a key of `METRICS`.
        value (`float`): of the model.
        samples (`int`): how many windows, queries, images or the like it is the mean of.
        unit (`str`): what the samples are, such as `"windows of 1024 tokens"`.
        dense (`float`, *optional*): the dense model's value on the same samples.
        dataset (`str`, *optional*): the name of what they were taken from.
    """

    metric: str
    value: float
    samples: int
    unit: str
    dense: float | None = None
    dataset: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """Return the figure that `to_dict` described.

        Raises:
            `ValueError`: something is missing, or the metric is unknown.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in ("metric", "value", "samples", "unit") if name not in values]
        if missing:
            raise ValueError(f"An evaluation needs {missing[0]!r}; got {', '.join(values) or 'nothing'}.")
        _better(values["metric"])
        return cls(**{name: values[name] for name in names if name in values})

    @property
    def better(self) -> str:
        """`"lower"` or `"higher"`: which direction is better."""
        return _better(self.metric)

    @property
    def recovery(self) -> float | None:
        """What is left of the dense model's quality, in percent; None where that was not measured."""
        return None if self.dense is None else recovery(self.metric, self.dense, self.value)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, with the direction, the recovery and how that is defined."""
        derived = {"better": self.better, "recovery": self.recovery, "recovery_is": _RECOVERY_IS[self.better]}
        return asdict(self) | derived

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def recovery(metric: str, dense: float, pruned: float) -> float:
    """Return how much of the dense model's quality is left, in percent; 100 is as good as dense.

    It is a ratio of the figures themselves: dense / pruned where lower is better (perplexity), pruned / dense where
    higher is better (accuracy). Recoveries of different metrics therefore do not compare.

    Args:
        metric (`str`): a key of `METRICS`.
        dense, pruned (`float`): the figures of the two models on the same samples.

    Raises:
        `ValueError`: the metric is unknown, a figure is NaN, or the divisor is not above zero.

    Example:
        >>> recovery("perplexity", dense=10.0, pruned=12.5)
        80.0
        >>> recovery("accuracy", dense=0.5, pruned=0.25)
        50.0
    """
    part, whole = (dense, pruned) if _better(metric) == "lower" else (pruned, dense)
    if not math.isfinite(part) or not whole > 0:
        raise ValueError(f"The recovery of {metric} is a ratio, undefined for dense={dense} and pruned={pruned}.")
    return 100 * part / whole


def print_evaluations(evaluations: Sequence[Evaluation], console: Console | None = None) -> None:
    """Print figures as a table, one line each; fits 100 columns."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 100
    table = Table(box=None, pad_edge=False)
    for title in ("metric", "better", "measured on", "dense", "model", "recovery", "recovery is"):
        is_number = title in ("dense", "model", "recovery")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=is_number)
    for evaluation in evaluations:
        dense, ratio = evaluation.dense, evaluation.recovery
        table.add_row(
            evaluation.metric,
            evaluation.better,
            f"{evaluation.samples} {evaluation.unit}",
            "-" if dense is None else f"{dense:,.4f}",
            f"{evaluation.value:,.4f}",
            "-" if ratio is None else f"{ratio:.1f} %",
            "-" if ratio is None else _RECOVERY_IS[evaluation.better],
        )
    console.print(table)


def _better(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {sorted(METRICS)}; got {metric!r}.")
    return METRICS[metric]
