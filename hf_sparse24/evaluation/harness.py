"""Figures of EleutherAI's lm-evaluation-harness (the package lm-eval, extra `eval`) in this package's form.

The tasks, the scoring and the standard errors are lm-eval's; nothing is computed here. lm-eval is imported only where
it is asked for.
"""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_sparse24.evaluation.figures import Evaluation

logger = logging.get_logger(__name__)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    **options: Any,
) -> list[Evaluation]:
    """Measure a model, packed or not, on tasks of lm-eval, with `lm_eval.simple_evaluate`.

    Args:
        model (`PreTrainedModel`): a language model that generates, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        tasks (`Sequence[str]`): names of tasks, groups or tags, or paths of YAML files of tasks.
        limit (`int`, *optional*): the first so many documents of each task; default: all.
        batch_size (`int`): requests per forward pass.
        options: for `lm_eval.simple_evaluate`, such as `num_fewshot=5` or `apply_chat_template=True`.

    Returns:
        `list[Evaluation]`: a figure for each metric of each task, under lm-eval's names; of a group that averages its
        tasks, the average alone. `compared` puts those of the dense model beside them.

    Raises:
        `ImportError`: lm-eval is not installed.
        `ValueError`: a task is unknown, the model does not generate, or the tokenizer has no token to begin a text.
    """
    check_tasks(tasks)
    _check(model, tokenizer)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        limit=limit,
        task_manager=_index(),
        log_samples=False,
        **options,
    )
    return _evaluations(results)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what lm-eval has no task for, before a model is loaded for it.

    Raises:
        `ImportError`: lm-eval is not installed.
        `ValueError`: no task was named, or one is neither known nor a YAML file.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("Tasks need lm-eval; install it: pip install 'hf_sparse24[eval]'") from error
    if not tasks:
        raise ValueError("There is no task to measure; name some, such as arc_easy,hellaswag.")
    known = _index().all_tasks
    for task in tasks:
        if task not in known and not Path(task).is_file():
            near = ", ".join(difflib.get_close_matches(task, known))
            raise ValueError(
                f"lm-eval {version('lm_eval')} has no task {task!r} and there is no such YAML file."
                + (f" Near matches: {near}." if near else " Its tasks: lm-eval ls tasks")
            )


@functools.cache
def _index() -> Any:
    """Read the index of tasks, thousands of files; the tasks themselves are made anew for each evaluation."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if not model.can_generate():
        raise ValueError(f"lm-eval's tasks need a language model that generates; {type(model).__name__} does not.")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "lm-eval begins a text with the tokenizer's BOS token, or its EOS token; this one has neither. Set one."
        )


def _evaluations(results: Mapping[str, Any]) -> list[Evaluation]:
    """Turn what lm-eval returned into figures; documents are its word for samples."""
    groups: Mapping[str, Sequence[str]] = results.get("group_subtasks", {})
    averaged = {name for name in groups if any("," in key for key in results["results"].get(name, {}))}
    inside = {part for name in averaged for part in _parts(name, groups)}
    return [
        evaluation
        for name, figures in results["results"].items()
        if name not in inside
        for evaluation in _of_task(name, figures, _parts(name, groups) or [name], results)
    ]


def _parts(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return all that a group is made of, groups inside it too; [] for a task."""
    return [part for child in groups.get(name, ()) for part in (child, *_parts(child, groups))]


def _of_task(
    name: str, figures: Mapping[str, Any], parts: Sequence[str], results: Mapping[str, Any]
) -> list[Evaluation]:
    """Return the figures of one task or group; lm-eval's keys are "metric,filter" and "metric_stderr,filter"."""
    counts = [results["n-samples"][part] for part in parts if part in results["n-samples"]]
    samples, of = (sum(count[which] for count in counts) for which in ("effective", "original"))
    shots = sorted({results["n-shot"][part] for part in parts if part in results["n-shot"]})
    unit = "documents" if samples == of else f"of {of} documents"
    unit += "".join(f", {shot}-shot" for shot in shots) + f", lm-eval {results['lm_eval_version']}"
    found = []
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        higher = results["higher_is_better"].get(name, {}).get(metric)
        if higher is None:
            logger.warning(f"{metric} of {name} is left out: lm-eval does not say which direction is better.")
            continue
        error = figures.get(f"{metric}_stderr,{chosen}")
        found.append(
            Evaluation(
                metric=metric if chosen == "none" else key,
                value=float(value),
                samples=samples,
                unit=unit,
                dataset=name,
                better="higher" if higher else "lower",
                stderr=error if isinstance(error, float) and math.isfinite(error) else None,
            )
        )
    return found
