"""`hf-sparse24 evaluate`: read options, measure the model and the dense one, print both."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers import PreTrainedModel

from hf_sparse24.evaluation import (
    Evaluation,
    check_causal,
    evaluate_pairs,
    feature_cosine,
    features,
    held_out_tokens,
    image_batches,
    images_in,
    perplexity,
    print_evaluations,
)
from hf_sparse24.folders import chosen_device, load_model, load_tokenizer

Model = Annotated[str, typer.Argument(help="A folder with a transformers model, or a Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def evaluate(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text, or .csv, .json, .jsonl or .parquet. Its last tenth is scored; calibration reads the rest."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Rows of .csv, .json, .jsonl or .parquet with target, and input or audio. All are scored."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="A folder with images. Needs --dense.")] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, to say what is left of its quality.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Of the text: tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Of the text: how many to score at most.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Of pairs: read only the first so many tokens of each text.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="Of images: cls, mean, or pooler for models without tokens.")] = "cls",
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure MODEL, packed or not, and what is left of the dense model's quality. What --json prints is for card.

    --text: the perplexity of a causal language model. --pairs: the recall at 1 of a sentence encoder, or the loss per
    target token of an encoder-decoder model. --images: the cosine of a vision model's features to the dense model's.

    Examples:

        hf-sparse24 evaluate ./SmolLM2-2of4 --text book.txt --dense ./SmolLM2

        hf-sparse24 evaluate ./MiniLM-2of4 --pairs titles.jsonl --max-length 128 --dense ./MiniLM

        hf-sparse24 evaluate ./DINOv2-2of4 --images ./photos --dense ./DINOv2
    """
    if sum(source is not None for source in (text, pairs, images)) != 1:
        raise ValueError("There is one thing to measure at a time: give --text FILE, --pairs FILE or --images FOLDER.")
    place = chosen_device(device)

    def load(name: str) -> PreTrainedModel:
        return load_model(name, dtype).to(place)

    if images is not None:
        found = _cosine(load, model, dense, images, pooling)
    else:
        # The dense model reads what the processors beside the pruned one make.
        if text is not None:
            measure = partial(_perplexity, name=model, text=text, window=window, windows=windows)
        else:
            measure = partial(evaluate_pairs, processors=model, table=pairs, max_length=max_length)
        found = measure(load(model))
        if dense is not None:
            found = replace(found, dense=measure(load(dense)).value)
    if as_json:
        typer.echo(found.to_json())
    else:
        print_evaluations([found], Console(width=100))


def _perplexity(model: PreTrainedModel, name: str, text: Path, window: int, windows: int) -> Evaluation:
    check_causal(model)
    token_ids = held_out_tokens(load_tokenizer(name), text, window, windows)
    return Evaluation(
        metric="perplexity",
        value=perplexity(model, token_ids, window),
        samples=len(token_ids) // window,
        unit=f"windows of {window} tokens",
        dataset=text.name,
    )


def _cosine(
    load: Callable[[str], PreTrainedModel], name: str, dense: str | None, folder: Path, pooling: str
) -> Evaluation:
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
