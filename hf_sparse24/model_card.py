"""What a model card says: of a model from its own config and weights, of measurements from rows that were measured.

Nothing is made up: a measurement that is missing is an absent row, and a table without rows is an absent section. The
Trainer appends one section to a card of its own (`append_section`), in the same words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers.modelcard import TASK_MAPPING
from transformers.utils import logging

from hf_sparse24 import card_text as text
from hf_sparse24.benchmark.results import Row, is_emulated
from hf_sparse24.config import Sparse24Config
from hf_sparse24.evaluation import Evaluation
from hf_sparse24.identity import TAGS, record_of
from hf_sparse24.report import SparsityReport, sparsity_report
from hf_sparse24.version import __version__

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")


@dataclass(frozen=True, slots=True)
class CardSubject:
    """What a card says of a pruned model besides its measurements, read from the model.

    Attributes:
        model_class (`str`): the class that loads it.
        record (`Mapping[str, Any]`): what its config says of how it was pruned (`identity.record_of`).
        totals (`Mapping[str, int]`): `matrices`, `matrices_2to4` and `violating_groups` of its report.
        kept_dense (`Mapping[str, int]`): how many matrices are dense, by reason.
        notes (`Sequence[str]`): of its report.
        packed (`bool`): whether it is stored packed.
        quantization (`str`, *optional*): `"int8"` or `"fp8"`, where it is packed so.
    """

    model_class: str
    record: Mapping[str, Any]
    totals: Mapping[str, int]
    kept_dense: Mapping[str, int]
    notes: Sequence[str] = ()
    packed: bool = False
    quantization: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "CardSubject":
        """Read a model, packed or dense-masked."""
        report = sparsity_report(model)
        config = getattr(model.config, "quantization_config", None)
        packed = isinstance(config, Sparse24Config)
        quantization = config.quantization if packed else None
        return cls(
            type(model).__name__,
            record_of(model),
            report.totals,
            report.kept_dense,
            report.notes,
            packed,
            quantization,
        )


def model_card(
    model: nn.Module | CardSubject,
    name: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    benchmark: Sequence[Row] = (),
    conditions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> ModelCard:
    """Render the card of a pruned model, packed or dense-masked.

    Args:
        model (`nn.Module` or `CardSubject`): what was pruned; its report and its record are read.
        name (`str`): the repository that it will be loaded from, or the folder.
        base_model (`str`, *optional*): the Hub id of the dense model.
        license (`str`, *optional*): the Hub's identifier, such as "apache-2.0".
        evaluations (`Sequence[Evaluation]`): what was measured of this model; the first is the headline.
        benchmark (`Sequence[Row]`): rows of `hf-sparse24 bench` for this model; those without a time are left out, and
            all that were measured on a CPU, which emulates the kernels.
        conditions (`Mapping[str, str]`, *optional*): what stands beside the rows (`benchmark.results.read_csv`).
        notes, limits (`Sequence[str]`): sentences of your own on how it was made, and on what it does not do.
        commands (`Sequence[str]`): the shell commands that make it.

    Raises:
        `ValueError`: the model has no record of being pruned or violates 2:4, `base_model` is no Hub id, or there are
            rows without conditions.
    """
    subject = model if isinstance(model, CardSubject) else CardSubject.of(model)
    _check(subject, base_model, benchmark, conditions)
    benchmark = _measured_on_a_gpu(benchmark, conditions)
    use = text.PACKED_USE if subject.packed else text.DENSE_USE
    return ModelCard.from_template(
        _metadata(subject, name, base_model, license, evaluations),
        template_path=str(TEMPLATE),
        name=name.rpartition("/")[2],
        what_it_is=text.what_it_is(base_model, subject.packed, subject.quantization),
        pattern=text.pattern(subject.totals),
        headline=text.headline(evaluations),
        made=[*text.made_lines(subject.record), text.dense_line(subject.kept_dense), *subject.notes, *notes],
        commands="\n".join(commands),
        use=use.format(model_class=subject.model_class, name=name),
        evaluation_table=text.evaluation_table(evaluations),
        speed_table=text.speed_table(benchmark),
        speed_conditions=text.conditions_line(conditions or {}),
        limits=[*text.limit_lines(evaluations, subject.packed), *limits],
    )


def with_tags(tags: str | list[str] | None) -> list[str]:
    """Add this package's tags to those that were asked for."""
    asked = [tags] if isinstance(tags, str) else list(tags or ())
    return asked + [tag for tag in TAGS if tag not in asked]


def append_section(
    folder: str, report: SparsityReport, policy: str, steps: int, history: Sequence[Mapping[str, Any]]
) -> None:
    """Append to the card that a trainer wrote what is 2:4, how it was kept so, and what stayed dense and why.

    Args:
        folder (`str`): where the README.md is.
        report (`SparsityReport`): of the model as trained.
        policy (`str`): the mask policy.
        steps (`int`): how many optimizer steps were made.
        history (`Sequence[Mapping]`): the trainer's `log_history`.
    """
    lines = [
        f"Trained for {steps} steps with mask policy `{policy}`, hf_sparse24 {__version__}.",
        text.dense_line(report.kept_dense),
        *text.loss_lines(history),
    ]
    section = [
        "",
        "## 2:4 sparsity",
        "",
        f"{text.pattern(report.totals)} The weights are ordinary tensors with zeros and load without any package; "
        "`hf_sparse24.pack_` packs them.",
        "",
        *(f"- {line}" for line in lines),
    ]
    with (Path(folder) / "README.md").open("a", encoding="utf8") as file:
        file.write("\n".join(section) + "\n")


def _metadata(
    subject: CardSubject,
    name: str,
    base_model: str | None,
    license: str | None,
    evaluations: Sequence[Evaluation],
) -> ModelCardData:
    """Return what stands in the head of a card, for the Hub."""
    quantization, task = subject.quantization, _task(subject.model_class)
    results = _eval_results(evaluations, task or "feature-extraction")
    return ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model and quantization else None,
        library_name="transformers",
        license=license,
        pipeline_tag=task,
        tags=[*TAGS, *([quantization] if quantization else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _measured_on_a_gpu(benchmark: Sequence[Row], conditions: Mapping[str, str] | None) -> Sequence[Row]:
    """Return the rows, or none, with a warning, where a CPU emulated the kernels."""
    if not benchmark or not is_emulated(conditions or {}):
        return benchmark
    logger.warning("The card leaves out the speed, which was measured on a CPU: it emulates the kernels.")
    return ()


def _check(
    subject: CardSubject,
    base_model: str | None,
    benchmark: Sequence[Row],
    conditions: Mapping[str, str] | None,
) -> None:
    if not subject.record:
        raise ValueError(f"A model card needs a pruned model; this {subject.model_class} has no record of it.")
    violating = subject.totals["violating_groups"]
    if violating:
        raise ValueError(f"A model card needs a 2:4 model; violating groups: {violating}.")
    if benchmark and not conditions:
        raise ValueError("Rows of a benchmark need their conditions; pass both as read_csv returns them.")
    if base_model is not None:
        try:
            validate_repo_id(base_model)
        except HFValidationError:
            raise ValueError(
                f"base_model must be the Hub id of the dense model, such as user/name; got {base_model!r}."
            ) from None


def _eval_results(evaluations: Sequence[Evaluation], task: str) -> list[EvalResult]:
    """Return what the Hub shows beside a card: finite figures on data that has a name."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=evaluation.dataset,
            dataset_name=evaluation.dataset,
            metric_type=evaluation.metric,
            metric_value=float(f"{evaluation.value:.6g}"),
            metric_name=text.metric_title(evaluation),
        )
        for evaluation in evaluations
        if evaluation.dataset and math.isfinite(evaluation.value)
    ]


def _task(model_class: str) -> str | None:
    """Return the Hub's name of what a model class does."""
    return next((task for task, classes in TASK_MAPPING.items() if model_class in classes.values()), None)
