"""Write `model_cards/`: the cards of the models that the benchmarks made, each from the rows in `results`.

    python benchmarks/model_cards.py

A card `model_cards/NAME/README.md` is rendered by `hf_sparse24.model_card`; beside it `evaluation.json` has its
figures in the form that `hf-sparse24 card --evaluation` reads. Every figure is that of a row of
`results/one_shot_NAME.json` or `results/retrain_NAME.json`. Which matrices are 2:4 follows from the architecture and
is counted on the meta device; that no group violates 2:4 was measured and is in the rows. A card without its row is
not there, and the script says why.
"""

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS
from model_card_bases import BASES
from model_card_rows import MissingRow, Results, figures_line

from hf_sparse24 import card_text
from hf_sparse24.evaluation import Evaluation
from hf_sparse24.model_card import CardSubject, model_card
from hf_sparse24.report import calibration_notes
from hf_sparse24.selection import select

CARDS_FOLDER = Path(__file__).parent.parent / "model_cards"
METHOD = "alps"  # what "auto" was when the rows were measured
ONE_SHOT = "default"
# The row of results/retrain_NAME.json that is a model's retrained card. Of those at several learning rates, the best
# by the validation loss, not by the test.
RETRAINED = {
    "smollm2": "recovered",
    "minilm": "recovered, 0.0003",
    "whisper": "recovered, 0.0003",
    "dinov2": "recovered, 0.0003",
}
# Of the recipe's record: the data have a sentence of their own, and outcomes are those of one run.
DATA_KEYS = ("dataset", "tokenizer", "num_samples", "sequence_length")
OUTCOME_KEYS = ("matched", "distilled", "smoothed_norms", "raised_dampening")


@dataclass(frozen=True)
class Card:
    """A card that is wanted.

    Attributes:
        base (`str`): a key of `BASES`.
        retrained (`bool`): whether it is of the retrained model.
        quantization (`str`, *optional*): in which it was packed afterwards.
    """

    base: str
    retrained: bool = False
    quantization: str | None = None

    @property
    def name(self) -> str:
        """The name of its folder, and of the model's."""
        parts = [BASES[self.base].hub_id.rpartition("/")[2], "2of4"]
        return "-".join([*parts, *(["retrained"] if self.retrained else []), *filter(None, [self.quantization])])

    @property
    def made_by(self) -> str:
        """The row of the run that made the weights."""
        return RETRAINED[self.base] if self.retrained else ONE_SHOT

    @property
    def row(self) -> str:
        """The row with its figures."""
        return f"{self.made_by}, then {self.quantization}" if self.quantization else self.made_by

    @property
    def file(self) -> str:
        """The name of its results."""
        return f"{'retrain' if self.retrained else 'one_shot'}_{self.base}"


CARDS = [
    *(Card(base) for base in BASES),
    *(Card(base, retrained=True) for base in BASES),
    *(Card("smollm2", retrained=True, quantization=quantization) for quantization in ("int8", "fp8")),
]


def render(card: Card, results: Path = RESULTS) -> dict[str, str]:
    """Return the files of a card, by their names.

    Raises:
        `MissingRow`: a row that it is made of is not there, or has none of its figures.
    """
    base, rows = BASES[card.base], Results(results, card.file)
    row, made = rows.row(card.row), rows.row(card.made_by)
    evaluations = rows.figures(card.row, base)
    if not evaluations:
        raise MissingRow(f"no figure in row {card.row!r} in {rows.name}")
    start = Results(results, f"one_shot_{card.base}")
    recipe = start.row(ONE_SHOT)["recipe"]
    rendered = model_card(
        subject_of(card, made, recipe, rows.conditions[row["run"]]),
        card.name,
        base_model=base.hub_id,
        license=base.license,
        evaluations=evaluations,
        notes=[base.weights, base.calibration, *history(card, rows), *measurements(card, rows)],
        commands=commands(card),
        limits=limits(card),
    )
    figures = json.dumps([evaluation.to_dict() for evaluation in evaluations], indent=2)
    return {"README.md": rendered.content.rstrip("\n") + "\n", "evaluation.json": figures + "\n"}


def subject_of(card: Card, made: dict, recipe: dict, run: dict) -> CardSubject:
    """Return what a card says of the model itself, as its config would have it."""
    base = BASES[card.base]
    with torch.device("meta"):
        selection = select(getattr(transformers, base.model_class)(base.config))
    # The retrained model began with a one-shot model of the same recipe and of another run.
    left_out = DATA_KEYS + (OUTCOME_KEYS if card.retrained else ())
    calibration = {key: value for key, value in recipe.items() if key not in left_out}
    record = {
        "method": METHOD,
        "seed": made.get("seed", 0),
        "versions": {key: run[key] for key in ("transformers", "torch")},
        "calibration": calibration,
    } | ({"training": {"mask_policy": "frozen"}} if card.retrained else {})
    totals = {
        "matrices": len(selection.matrices),
        "matrices_2to4": len(selection.targets),
        "violating_groups": made["violating_groups"],
    }
    kept_dense = Counter(matrix.reason for matrix in selection.skipped)
    packed, notes = card.quantization is not None, calibration_notes(calibration)
    return CardSubject(base.model_class, record, totals, kept_dense, notes, packed, card.quantization)


def history(card: Card, rows: Results) -> list[str]:
    """Say how a model was retrained, from the row of the training."""
    if not card.retrained:
        return []
    made, base = rows.row(card.made_by), BASES[card.base]
    beside = "".join(f", {key}={value}" for key, value in made.get("arguments", {}).items())
    said = [
        base.training,
        f"Retraining towards what the dense model writes, without labels: {made['steps']:,} steps, "
        f"{made['tokens'] / 1e6:.4g} million {base.tokens}, learning rate {made['learning_rate']:g} at the peak"
        f"{beside}, seed {made['seed']}.",
        *card_text.loss_lines(made.get("curve", ())),
    ]
    before = rows.figures("one-shot", base)
    return [*said, f"Before it: {figures_line(before)}."] if before else said


def measurements(card: Card, rows: Results) -> list[str]:
    """Say on what the figures were measured, and what was measured of other seeds and versions."""
    base, measured = BASES[card.base], rows.measured(card.row)
    bits = (card.quantization or "").upper()
    said = [f"Packed in {bits} after the training, which did not know of the rounding."] if bits else []
    how = "with the reference kernel" if bits else "in float32"
    said.append(f"Measured {how}: {measured} Run as `{rows.command(card.row)}`.")
    if "dense" in rows.rows and rows.measured("dense") != measured:
        said.append(f"The dense model was measured on: {rows.measured('dense')}")
    for name in sorted(rows.rows):
        seed = re.fullmatch(re.escape(card.row) + r", seed (\d+)", name)
        if seed and rows.figures(name, base):
            said.append(f"With seed {seed[1]}: {figures_line(rows.figures(name, base))}.")
    for run in rows.conditions:
        earlier = run.get("default_in_an_earlier_run", {})
        figures = [figure.evaluation(earlier[key], None) for key, figure in base.figures.items() if key in earlier]
        if figures and not card.retrained:
            said.append(f"An earlier version of the recipe had: {figures_line(figures)}.")
    return said


def commands(card: Card) -> list[str]:
    """Return the commands that make the model, in a checkout, in a folder of its name."""
    saved = ".models/saved"
    made = f"{saved}/{card.made_by.replace(', ', '_').replace(' ', '_')}"
    script = f"python benchmarks/{'retrain' if card.retrained else 'one_shot'}.py {card.base}"
    apt = ["apt-get install flite espeak-ng"] if card.base == "whisper" else []
    return [
        "pip install . onnx pillow gguf",
        *apt,
        "python benchmarks/fetch_models.py",
        f"python benchmarks/one_shot_bundles.py {card.base}",
        *([f"python benchmarks/retrain_data.py {card.base}"] if card.retrained else []),
        f"{script} --rows {shlex.quote(card.made_by)} --save {saved}",
        f"hf-sparse24 prune {made} {card.name} --quantization {card.quantization}  # keeps the mask that is there"
        if card.quantization
        else f"mv {made} {card.name}",
        f"cp model_cards/{card.name}/README.md {card.name}/",
    ]


def limits(card: Card) -> list[str]:
    """Return what is to be known before it is used."""
    base = BASES[card.base]
    return [
        "The repository has no weights: the commands above make them, with a GPU as measured.",
        "Its speed was not measured.",
        *base.limits,
        *(() if card.retrained else base.one_shot_limits),
    ]


def render_all(results: Path = RESULTS) -> tuple[dict[str, str], dict[str, str]]:
    """Return all files by their path below `model_cards`, and for each card that is not rendered why."""
    files, missing, listed = {}, {}, []
    for card in CARDS:
        try:
            rendered = render(card, results)
        except MissingRow as error:
            missing[card.name] = str(error)
            continue
        files |= {f"{card.name}/{name}": text for name, text in rendered.items()}
        listed.append((card.name, json.loads(rendered["evaluation.json"])[0]))
    return files | {"README.md": index(listed)}, missing


def index(listed: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the page that lists the cards, each with its first figure."""
    lines = [
        "# Model cards",
        "",
        "Written by `python benchmarks/model_cards.py` from the rows in `benchmarks/results`. Each folder has a card "
        "and its figures; the weights are made by the commands in the card.",
        "",
        "| model | | on | dense | 2:4 | recovery |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in listed:
        figure = Evaluation.from_dict(values)
        dense = "" if figure.dense is None else f"{figure.dense:.4g}"
        recovery = "" if figure.recovery is None else f"{figure.recovery:.1f} %"
        cells = [f"[{name}]({name}/README.md)", card_text.metric_title(figure), figure.dataset, dense]
        lines.append(f"| {' | '.join([*cells, f'{figure.value:.4g}', recovery])} |")
    return "\n".join(lines) + "\n"


def main(results: Path = RESULTS, folder: Path = CARDS_FOLDER) -> None:
    """Write all cards, and remove those whose rows are gone."""
    files, missing = render_all(results)
    for name, reason in missing.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        print(f"{name}: not rendered, {reason}")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
