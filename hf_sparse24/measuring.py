"""`hf-sparse24 evaluate`: read options, measure the model and then the dense one, print both."""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from hf_sparse24.evaluation import (
    Evaluation,
    check_causal,
    check_tasks,
    compared,
    evaluate_tasks,
    held_out_tokens,
    perplexity,
    print_evaluations,
)
from hf_sparse24.folders import chosen_device, load_model, load_tokenizer

Model = Annotated[str, typer.Argument(help="A folder with a transformers model, or a Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class _Asked(NamedTuple):
    """What is measured of the one model and of the other."""

    text: Path | None
    window: int
    windows: int
    tasks: list[str]
    options: dict[str, Any]  # of evaluate_tasks
    device: torch.device
    dtype: str


def evaluate(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text. Its last tenth is scored; calibration reads the rest.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, or YAML files of tasks, separated by commas.")
    ] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, to say what is left of its quality.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Of the text: tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Of the text: how many to score at most.")] = 32,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each task: the first so many documents. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Of each task: solved examples in the prompt. Default: the task's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of each task: requests per forward pass.")] = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure MODEL, packed or not: its perplexity on the held-out end of a text, its score in tasks, its recovery.

    --tasks needs lm-eval, which comes with: pip install 'hf_sparse24[eval]'. What --json prints is for card.

    Examples:

        hf-sparse24 evaluate ./SmolLM2-2of4 --text book.txt --dense ./SmolLM2

        hf-sparse24 evaluate ./SmolLM2-2of4 --tasks arc_easy,hellaswag --limit 100 --dense ./SmolLM2
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None and not names:
        raise ValueError("There is nothing to measure: give --text FILE, or --tasks with tasks of lm-eval, or both.")
    options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    if names:
        check_tasks(names)
    asked = _Asked(text, window, windows, names, options, chosen_device(device), dtype)
    found = _measured(model, model, asked)
    if dense is not None:
        found = compared(found, _measured(dense, model, asked))
    if not as_json:
        print_evaluations(found, Console(width=100))
    elif names:
        typer.echo(json.dumps([evaluation.to_dict() for evaluation in found], indent=2))
    else:
        typer.echo(found[0].to_json())


def _measured(name: str, tokenizer_of: str, asked: _Asked) -> list[Evaluation]:
    """Return the figures of one model; the dense one reads the tokens of the pruned one's tokenizer."""
    text = None if asked.text is None else asked.text.read_text("utf8")
    model = load_model(name, asked.dtype).to(asked.device)
    if text is not None:
        check_causal(model)
    tokenizer = load_tokenizer(tokenizer_of)
    found = []
    if asked.text is not None and text is not None:
        token_ids = held_out_tokens(tokenizer, text, asked.window, asked.windows)
        found.append(
            Evaluation(
                metric="perplexity",
                value=perplexity(model, token_ids, asked.window),
                samples=len(token_ids) // asked.window,
                unit=f"windows of {asked.window} tokens",
                dataset=asked.text.name,
            )
        )
    if asked.tasks:
        found += evaluate_tasks(model, tokenizer, asked.tasks, **asked.options)
    return found
