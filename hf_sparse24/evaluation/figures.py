"""A figure as data: what was measured, on how much, which direction is better, and what is left of the dense model."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
        metric (`str`): a key of `METRICS`, or a name of your own with `better`.
        value (`float`): of the model.
        samples (`int`): how many windows, queries, images or the like it is the mean of.
        unit (`str`): what the samples are, such as `"windows of 1024 tokens"`.
        dense (`float`, *optional*): the dense model's value on the same samples.
        dataset (`str`, *optional*): the name of what they were taken from.
        better (`str`, *optional*): `"lower"` or `"higher"`; known of the keys of `METRICS`.
        stderr (`float`, *optional*): the standard error of `value` over the samples.

    Raises:
        `ValueError`: the metric is unknown and `better` does not say its direction.
    """

    metric: str
    value: float
    samples: int
    unit: str
    dense: float | None = None
    dataset: str | None = None
    better: str | None = None
    stderr: float | None = None

    def __post_init__(self) -> None:
        """Fill in the direction of a known metric."""
        object.__setattr__(self, "better", _better(self.metric, self.better))

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
        return cls(**{name: values[name] for name in names if name in values})

    @property
    def recovery(self) -> float | None:
        """What is left of the dense model's quality, in percent; None where that was not measured or is no number."""
        if self.dense is None:
            return None
        try:
            return recovery(self.metric, self.dense, self.value, self.better)
        except ValueError:  # a dense accuracy of zero, say: the figures themselves still stand
            return None

    @property
    def measured_on(self) -> str:
        """The data and how much of it, for people."""
        amount = f"{self.samples} {self.unit}"
        return f"{self.dataset}, {amount}" if self.dataset else amount

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, with the recovery and how that is defined."""
        return asdict(self) | {"recovery": self.recovery, "recovery_is": _RECOVERY_IS[self.better or ""]}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def compared(evaluations: Sequence[Evaluation], dense: Sequence[Evaluation]) -> list[Evaluation]:
    """Put the dense model's figures beside those of the pruned one.

    Args:
        evaluations (`Sequence[Evaluation]`): of the pruned model.
        dense (`Sequence[Evaluation]`): of the dense model, on the same data, in any order.

    Raises:
        `ValueError`: a figure was not measured of the dense model, or not on the same samples.
    """
    found = {(figure.metric, figure.dataset): figure for figure in dense}
    for figure in evaluations:
        twin = found.get((figure.metric, figure.dataset))
        if twin is None or (twin.samples, twin.unit) != (figure.samples, figure.unit):
            raise ValueError(
                f"{figure.metric} of the pruned model was measured on {figure.measured_on}; of the dense model on "
                f"{'nothing' if twin is None else twin.measured_on}. Measure both on the same."
            )
    return [replace(figure, dense=found[figure.metric, figure.dataset].value) for figure in evaluations]


def read_evaluations(text: str) -> list[Evaluation]:
    """Return the figures in what `hf-sparse24 evaluate --json` printed: one, or a list.

    Raises:
        `ValueError`: the text is no JSON, or a figure lacks something.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"What hf-sparse24 evaluate --json prints was expected, and this is no JSON: {error}."
        ) from None
    return [Evaluation.from_dict(values) for values in (found if isinstance(found, list) else [found])]


def recovery(metric: str, dense: float, pruned: float, better: str | None = None) -> float:
    """Return how much of the dense model's quality is left, in percent; 100 is as good as dense.

    It is a ratio of the figures themselves: dense / pruned where lower is better (perplexity), pruned / dense where
    higher is better (accuracy). Recoveries of different metrics therefore do not compare.

    Args:
        metric (`str`): a key of `METRICS`, or any name with `better`.
        dense, pruned (`float`): the figures of the two models on the same samples.
        better (`str`, *optional*): `"lower"` or `"higher"`, of a metric that is not in `METRICS`.

    Raises:
        `ValueError`: the metric is unknown, a figure is NaN, or the divisor is not above zero.

    Example:
        >>> recovery("perplexity", dense=10.0, pruned=12.5)
        80.0
        >>> recovery("accuracy", dense=0.5, pruned=0.25)
        50.0
    """
    part, whole = (dense, pruned) if _better(metric, better) == "lower" else (pruned, dense)
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
        error = "" if evaluation.stderr is None else f" ± {evaluation.stderr:.4f}"
        table.add_row(
            evaluation.metric,
            evaluation.better,
            evaluation.measured_on,
            "-" if dense is None else f"{dense:,.4f}",
            f"{evaluation.value:,.4f}{error}",
            "-" if ratio is None else f"{ratio:.1f} %",
            "-" if ratio is None else _RECOVERY_IS[evaluation.better or ""],
        )
    console.print(table)


def _better(metric: str, better: str | None = None) -> str:
    """Return which direction of a metric is better: what was said, or what is known."""
    if better is None and metric not in METRICS:
        raise ValueError(f"metric must be one of {sorted(METRICS)}, or come with better; got {metric!r}.")
    if better not in (None, *_RECOVERY_IS):
        raise ValueError(f"better must be 'lower' or 'higher'; got {better!r}.")
    return better or METRICS[metric]
