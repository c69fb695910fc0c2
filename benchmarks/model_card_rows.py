"""The rows of results that `model_cards.py` reads, with what they were measured on."""

import json
from pathlib import Path
from typing import Any

from model_card_bases import Base

from hf_sparse24 import card_text
from hf_sparse24.evaluation import Evaluation


class MissingRow(LookupError):
    """A row that a card needs is not among the results."""


class Results:
    """The rows of one file of results, by name, each with the conditions that it was measured under."""

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / f"{name}.json"
        found = json.loads(path.read_text("utf8")) if path.exists() else {"conditions": [], "rows": []}
        self.name = path.name + ("" if path.exists() else ", which is not there")
        self.conditions = found["conditions"]
        self.rows = {row["row"]: row for row in found["rows"]}

    def row(self, name: str) -> dict[str, Any]:
        """Return a row.

        Raises:
            `MissingRow`: there is none of that name.
        """
        if name not in self.rows:
            raise MissingRow(f"no row {name!r} in {self.name}")
        return self.rows[name]

    def figures(self, name: str, base: Base) -> list[Evaluation]:
        """Return what was measured in a row, beside the dense model; none where there is no such row."""
        row, dense = (self.rows.get(key, {}) for key in (name, "dense"))
        known = {key: figure for key, figure in base.figures.items() if row.get(key) is not None}
        return [figure.evaluation(row[key], dense.get(key)) for key, figure in known.items()]

    def measured(self, name: str) -> str:
        """Say on what a row was measured, and when."""
        run = self.conditions[self.row(name)["run"]]
        facts = {key: run[key] for key in ("torch", "transformers", "date")}
        return card_text.conditions_line(facts | {"device": run.get("gpu", run["cpu"])})

    def command(self, name: str) -> str:
        """Return the command that measured a row."""
        return self.conditions[self.row(name)["run"]]["command"]


def figures_line(evaluations: list[Evaluation]) -> str:
    """Return figures in one line, as in "perplexity 36 on BBC News"."""
    return ", ".join(
        f"{figure.metric.replace('_', ' ')} {figure.value:.4g} on {figure.dataset}" for figure in evaluations
    )
