"""The sentences and tables of a model card, each from what was recorded or measured, and "" where nothing was."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_sparse24.benchmark.results import OK, ModelRow, ProjectionRow, Row
from hf_sparse24.evaluation import Evaluation

PACKED_USE = """\
With this package, packed:

```python
import hf_sparse24  # teaches transformers the format
from transformers import {model_class}

model = {model_class}.from_pretrained("{name}")
```

Without it transformers refuses the file with a size mismatch. `hf-sparse24 unpack {name} dense` writes ordinary
weights with zeros, which any server loads, and runs as a dense model."""
DENSE_USE = """\
The weights are ordinary tensors with zeros and load without any package, to run as a dense model:

```python
from transformers import {model_class}

model = {model_class}.from_pretrained("{name}")
```

With this package they are packed for sparse kernels, or retrained further:

```python
from hf_sparse24 import pack_

pack_(model, quantization="int8")  # or "fp8", or without
```"""
_SPEED_COLUMNS = {
    "ms": "ms",
    "us": "us",
    "tokens_s": "tokens/s",
    "over_same_precision": "x dense, same precision",
    "over_dense_bf16": "x dense bf16",
    "weights_gb": "weights, GB",
}
_CONDITIONS = ("device", "driver", "cuda", "torch", "transformers", "torchao", "hf_sparse24", "date")


def pattern(totals: Mapping[str, int]) -> str:
    """Say how much of a model is 2:4, of the totals of its report."""
    return (
        f"{totals['matrices_2to4']} of {totals['matrices']} matrices hold at most two nonzeros in every four "
        f"consecutive weights of a row; violating groups: {totals['violating_groups']}."
    )


def dense_line(kept_dense: Mapping[str, int]) -> str:
    """Say what is dense, and why."""
    return f"Kept dense: {', '.join(f'{count} ({reason})' for reason, count in kept_dense.items()) or 'nothing'}."


def what_it_is(base_model: str | None, packed: bool, quantization: str | None) -> str:
    """Say in two sentences what the model is."""
    origin = f"of [{base_model}](https://huggingface.co/{base_model}) " if base_model else ""
    form = "packed" if packed else "stored dense, with zeros"
    bits = f", weights and activations in {quantization.upper()}" if quantization else ""
    return (
        f"A 2:4 (semi-structured) sparse version {origin}made with hf_sparse24: {form}{bits}. NVIDIA's sparse tensor "
        "cores skip the half of the weights that is zero."
    )


def headline(evaluations: Sequence[Evaluation]) -> str | None:
    """Say what is left of the dense model by the first figure; None where that was not measured."""
    first = next(iter(evaluations), None)
    if first is None or first.dense is None or first.recovery is None:
        return None
    return (
        f"{metric_title(first)} {first.value:.4g}, dense {first.dense:.4g}: recovery {first.recovery:.1f} % on "
        f"{first.measured_on}."
    )


def made_lines(record: Mapping[str, Any]) -> list[str]:
    """Say method, data, seed and versions, of which the record has whatever there was."""
    calibration = record.get("calibration") or {}
    steps = [f"`{record['method']}`"]
    if calibration.get("refit"):
        steps.append(f"{calibration['refit']} refit")
    steps += [
        what
        for key, what in (("matching", "block matching"), ("distillation", "distillation from the dense model"))
        if calibration.get(key)
    ]
    lines = [f"Method: {', then '.join(steps)}; seed {record['seed']}."]
    if calibration.get("dataset") is not None:
        lines.append(f"Calibration: {_data(calibration['dataset'])}.")
    if record.get("training"):
        lines.append(f"Retrained with mask policy `{record['training']['mask_policy']}`.")
    lines += [f"`{key}={record[key]!r}`." for key in ("target_modules", "modules_to_not_convert") if record.get(key)]
    if record.get("versions"):
        lines.append(f"Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}.")
    return lines


def _data(dataset: Any) -> str:
    """Name the data without the folders of the machine that it lay on."""
    if isinstance(dataset, list):
        return " + ".join(f"{weight} x {_data(source)}" for source, weight in dataset)
    path = PurePath(str(dataset))
    return f"`{path.name if path.is_absolute() or path.suffix else dataset}`"


def evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    """Return dense, 2:4 and recovery, a line for each figure."""
    body = [
        [
            f"{metric_title(evaluation)} ({evaluation.better} is better)",
            evaluation.measured_on,
            "" if evaluation.dense is None else f"{evaluation.dense:.4g}",
            f"{evaluation.value:.4g}" + ("" if evaluation.stderr is None else f" ± {evaluation.stderr:.2g}"),
            "" if evaluation.recovery is None else f"{evaluation.recovery:.1f} %",
        ]
        for evaluation in evaluations
    ]
    return _table(["", "measured on", "dense", "2:4", "recovery"], body)


def speed_table(rows: Sequence[Row]) -> str:
    """Return the rows that have a time, dense ones too, with the columns that any of them has."""
    timed = [row for row in rows if row.status == OK]
    columns = {key: title for key, title in _SPEED_COLUMNS.items() if any(getattr(row, key, None) for row in timed)}
    body = [
        [
            _work(row),
            row.candidate,
            *("" if (value := getattr(row, key)) is None else f"{value:.4g}" for key in columns),
        ]
        for row in timed
    ]
    return _table(["", "", *columns.values()], body)


def _work(row: Row) -> str:
    if isinstance(row, ModelRow):
        return f"{row.model}, {row.layers} layers: {row.benchmark} {row.batch} x {row.tokens}, {row.mode}"
    return f"{row.shape}, {row.tokens} tokens" if isinstance(row, ProjectionRow) else row.benchmark


def conditions_line(facts: Mapping[str, str]) -> str:
    """Say on what the rows were measured, and by which command."""
    said = [facts[key] if key in ("device", "date") else f"{key} {facts[key]}" for key in _CONDITIONS if key in facts]
    command = f"; `{facts['command']}`." if "command" in facts else "."
    return ", ".join(said) + command + (f" Note: {facts['note']}." if "note" in facts else "")


def limit_lines(evaluations: Sequence[Evaluation], packed: bool) -> list[str]:
    """Say what the model does not do."""
    lines = ["Where there are no sparse kernels it runs as a dense model; `hf-sparse24 env` says which a machine has."]
    if packed:
        lines.append("vLLM and SGLang do not read this format; they serve what `hf-sparse24 unpack` writes.")
    if evaluations:
        lines.append("Quality was measured on the data named above alone, and may differ elsewhere.")
    return [*lines, "What the dense model's card says of its data, biases and use holds here too."]


def metric_title(evaluation: Evaluation) -> str:
    """Return the name of a metric for people."""
    return evaluation.metric.replace("_", " ").capitalize()


def loss_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where the losses of a training began and ended."""
    lines = []
    for key, what in (
        ("eval_loss", "Loss on the evaluation set"),
        ("distill_logit_loss", "Divergence from the teacher"),
    ):
        values = [entry[key] for entry in history if key in entry]
        if values:
            lines.append(f"{what}: {values[0]:.4g} at first, {values[-1]:.4g} at the end.")
    return lines


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, or "" without rows."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if body else ""
