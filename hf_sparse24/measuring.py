"""`hf-sparse24 evaluate`: read options, measure the model and then the dense one, print both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers import PreTrainedModel

from hf_sparse24.calibration.documents import check_file
from hf_sparse24.calibration.tokenizer import load_tokenizer
from hf_sparse24.calibration.windows import window_length
from hf_sparse24.evaluation import (
    Evaluation,
    check_causal,
    check_tasks,
    compared,
    evaluate_pairs,
    evaluate_tasks,
    feature_cosine,
    features,
    held_out_tokens,
    image_batches,
    images_in,
    perplexity,
    print_evaluations,
)
from hf_sparse24.folders import chosen_device, load_model
from hf_sparse24.model_name import check_model_name

Model = Annotated[str, typer.Argument(help="A folder with a transformers model, or a Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

Load = Callable[[str], PreTrainedModel]
Measure = Callable[[PreTrainedModel], list[Evaluation]]


Text = Annotated[
    Path | None,
    typer.Option(
        help="A text, or .csv, .json, .jsonl or .parquet. Its last tenth is scored; calibration reads the rest."
    ),
]
Tasks = Annotated[str | None, typer.Option(help="Tasks of lm-eval, or YAML files of tasks, separated by commas.")]
Pairs = Annotated[
    Path | None,
    typer.Option(help="Rows of .csv, .json, .jsonl or .parquet with target, and input or audio. All are scored."),
]
Images = Annotated[Path | None, typer.Option(help="A folder with images. Needs --dense.")]
Dense = Annotated[str | None, typer.Option(help="The dense model, to say what is left of its quality.")]
Window = Annotated[
    int | None,
    typer.Option(min=2, help="Of the text: tokens per window. Default: 1024, or the model's context if that is less."),
]
Windows = Annotated[int, typer.Option(min=1, help="Of the text: how many to score at most.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Of each task: the first so many documents. Default: all.")]
Fewshot = Annotated[
    int | None, typer.Option(min=0, help="Of each task: solved examples in the prompt. Default: the task's.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Of each task: requests per forward pass.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Of pairs: read only the first so many tokens of each text.")
]
Pooling = Annotated[str, typer.Option(help="Of images: cls, mean, or pooler for models without tokens.")]


def evaluate(
    model: Model,
    text: Text = None,
    tasks: Tasks = None,
    pairs: Pairs = None,
    images: Images = None,
    dense: Dense = None,
    window: Window = None,
    windows: Windows = 32,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    pooling: Pooling = "cls",
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure MODEL, packed or not, and what is left of the dense model's quality. What --json prints is for card.

    --text: the perplexity of a causal language model. --tasks: its score in tasks of lm-eval, which comes with the
    extra "eval" of this package. --pairs: the recall at 1 of a sentence encoder, or the loss per target token of an
    encoder-decoder model. --images: the cosine of a vision model's features to the dense model's.

    Examples:

        hf-sparse24 evaluate ./SmolLM2-2of4 --text book.txt --dense ./SmolLM2

        hf-sparse24 evaluate ./SmolLM2-2of4 --tasks arc_easy,hellaswag --limit 100 --dense ./SmolLM2

        hf-sparse24 evaluate ./MiniLM-2of4 --pairs titles.jsonl --max-length 128 --dense ./MiniLM

        hf-sparse24 evaluate ./DINOv2-2of4 --images ./photos --dense ./DINOv2
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _check_one_kind(text is not None or bool(names), pairs is not None, images is not None)
    _check_paths(model, dense, text, pairs)
    if names:
        check_tasks(names)
    place = chosen_device(device)

    def load(name: str) -> PreTrainedModel:
        return load_model(name, dtype).to(place)

    # The dense model reads what the tokenizer or processor beside the pruned one makes.
    measures: list[Measure] = []
    if pairs is not None:
        measures.append(lambda loaded: [evaluate_pairs(loaded, processors=model, table=pairs, max_length=max_length)])
    if text is not None:
        measures.append(lambda loaded: [_perplexity(loaded, model, text, window, windows)])
    if names:
        options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
        measures.append(lambda loaded: evaluate_tasks(loaded, load_tokenizer(model), names, **options))
    found = [_cosine(load, model, dense, images, pooling)] if images is not None else _measured(load(model), measures)
    if dense is not None and measures:
        found = compared(found, _measured(load(dense), measures))
    _print(found, as_json, as_list=bool(names))


def _check_one_kind(*kinds: bool) -> None:
    if sum(kinds) != 1:
        raise ValueError(
            "There is one thing to measure at a time: give --text FILE or --tasks with tasks of lm-eval or both, "
            "--pairs FILE, or --images FOLDER."
        )


def _check_paths(model: str, dense: str | None, text: Path | None, pairs: Path | None) -> None:
    """Look for everything that was named before anything is loaded."""
    for name in filter(None, (model, dense)):
        check_model_name(name)
    if text is not None:
        check_file(text, "Text was")
    if pairs is not None:
        check_file(pairs, "Pairs were")


def _print(found: list[Evaluation], as_json: bool, as_list: bool) -> None:
    if not as_json:
        print_evaluations(found, Console(width=100))
    elif as_list:
        typer.echo(json.dumps([evaluation.to_dict() for evaluation in found], indent=2))
    else:
        typer.echo(found[0].to_json())


def _measured(model: PreTrainedModel, measures: list[Measure]) -> list[Evaluation]:
    return [evaluation for measure in measures for evaluation in measure(model)]


def _perplexity(model: PreTrainedModel, name: str, text: Path, window: int | None, windows: int) -> Evaluation:
    check_causal(model)
    window = window_length(model, window)
    token_ids = held_out_tokens(load_tokenizer(name), text, window, windows)
    return Evaluation(
        metric="perplexity",
        value=perplexity(model, token_ids, window),
        samples=len(token_ids) // window,
        unit=f"windows of {window} tokens",
        dataset=text.name,
    )


def _cosine(load: Load, name: str, dense: str | None, folder: Path, pooling: str) -> Evaluation:
    """Return how near a vision model's features are to the dense one's, whose own figure is 1 by definition."""
    if dense is None:
        raise ValueError("--images measures how near features are to the dense model's; name that with --dense.")
    images = images_in(folder)
    reference = features(load(dense), image_batches(name, images), pooling)
    return Evaluation(
        metric="feature_cosine",
        value=feature_cosine(load(name), reference, image_batches(name, images), pooling),
        samples=len(images),
        unit=f"images, {pooling} feature",
        dense=1.0,
        dataset=folder.name,
    )
