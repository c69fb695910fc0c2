"""What the parts of the default recipe bring: the rows of one_shot_ablation.json, smoothing.json and rounding.json.

    python benchmarks/one_shot_ablation.py recipes --model smollm2   # hours on a GPU; all models without --model
    python benchmarks/one_shot_ablation.py recipes --only 27 28 29   # some settings, by their numbers in `SETTINGS`
    python benchmarks/one_shot_ablation.py smoothing                 # the demo's model on a CPU, minutes
    python benchmarks/one_shot_ablation.py rounding --seed 1

Each row replaces the committed one of the same settings and seed as soon as it is there; others stay. `recipes` takes
the bundles of one_shot_bundles.py, the other two the model and texts of the demo. The committed rows of seed 0 were
measured while the package was being written; today's code may give other digits.
"""

import argparse
import copy
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from common import conditions, merge
from one_shot_data import MODELS, load
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse24 import Sparse24Config, pack_, prune_, unpack_
from hf_sparse24.calibration import fitting, solve
from hf_sparse24.calibration.fitting import Schedule
from hf_sparse24.calibration.matching import Matching
from hf_sparse24.calibration.recipe import Recipe
from hf_sparse24.calibration.sequential import prune_sequentially_
from hf_sparse24.evaluation import perplexity
from hf_sparse24.selection import select

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import smollm2

STEPS = 300
ABSOLUTE, SHARES = "absolute", "shares of a parameter's root mean square"
SETTING = ("model", "method", "refit", "matching", "distillation")
DEMO = {"num_samples": 16, "sequence_length": 512, "batch_size": 4}
WINDOW = 512


def setting(model, matching=None, distillation=None, method="alps", refit="asymmetric", target="dense", rates=SHARES):
    """Return one row's settings; `matching` and `distillation` are learning rates."""
    row = {"model": model, "method": method, "refit": refit}
    if matching:
        row["matching"] = {"rate": matching, "rates_are": rates, "target": target, "steps": STEPS}
    if distillation:
        row["distillation"] = {"steps": STEPS, "rate": distillation}
    return row


def settings():
    """Return every setting once, in the order of the questions: mask and refit, target, rates, distillation."""
    rows = [setting("smollm2", method="sparsegpt", refit=None)]
    rows += [setting("smollm2", refit=refit) for refit in (None, "symmetric", "asymmetric")]
    rows += [setting("smollm2", 5e-4, method="sparsegpt", rates=ABSOLUTE)]
    rows += [setting("smollm2", rate, rates=ABSOLUTE) for rate in (1e-3, 2e-4, 1e-4, 5e-4)]
    rows += [
        setting("smollm2", 5e-4, refit=refit, target="sparse", rates=ABSOLUTE) for refit in ("asymmetric", "symmetric")
    ]
    rows += [setting("smollm2", 5e-4, distillation, rates=ABSOLUTE) for distillation in (3e-4, 1e-3)]
    rows += [setting("smollm2", matching) for matching in (2.5e-3, 5e-3, 1e-2)]
    rows += [setting("smollm2", *rates) for rates in ((2.5e-3, 2.5e-3), (5e-3, 5e-3), (1e-2, 5e-3))]
    distillations = (None, 2.5e-3, 5e-3, 1e-2)
    for model, matchings in (("minilm", (2.5e-3, 5e-3)), ("dinov2", (2.5e-3, 5e-3, 1e-2))):
        rows += [setting(model, matching, tail) for matching in matchings for tail in distillations]
    return [*rows, setting("whisper", 2.5e-3)]


SETTINGS = settings()


def recipe_of(row, seed):
    """Return the recipe of a row's settings."""
    matching, tail = row.get("matching"), row.get("distillation")
    return Recipe(
        method=row["method"],
        refit=row["refit"],
        matching=matching
        and Matching(steps=matching["steps"], learning_rate=matching["rate"], target=matching["target"]),
        distillation=tail and Schedule(steps=tail["steps"], learning_rate=tail["rate"]),
        seed=seed,
    )


@contextmanager
def rates_as(kind):
    """Let learning rates be what a row says: shares of each parameter's size, as the package does, or absolute."""
    by_size = fitting._by_size
    if kind == ABSOLUTE:
        fitting._by_size = lambda parameters, rate: [{"params": list(parameters), "lr": rate}]
    try:
        yield
    finally:
        fitting._by_size = by_size


def measure_recipe(row, seed, folder, steps=None):
    """Prune with one row's settings and return the row with its figures.

    MiniLM is calibrated on the first 256 of its sequences. `steps` shortens all training.
    """
    bundle = load(row["model"], folder)
    batches = next(iter(bundle["calibration"].values()))
    batches = batches[:8] if row["model"] == "minilm" else batches
    model = bundle["model"]().to("cuda" if torch.cuda.is_available() else "cpu")
    shortened = {key: {**row[key], "steps": steps} for key in ("matching", "distillation") if steps and row.get(key)}
    row = row | shortened
    with rates_as((row.get("matching") or {}).get("rates_are", SHARES)):
        walked = prune_sequentially_(model, select(model), batches, recipe_of(row, seed))
    fit = {"held_out": [round(value, 4) for value in asdict(walked.distilled).values()]} if walked.distilled else {}
    figures = {name: round(float(evaluate(model)), 4) for name, evaluate in bundle["evaluations"].items()}
    return row | fit | figures


def demo_model(seed, **request):
    """Prune the demo's model with the default recipe, as `make demo` does, and return it dense-masked in bfloat16."""
    source = smollm2.model_folder()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    config = Sparse24Config(tokenizer=AutoTokenizer.from_pretrained(source), seed=seed, **DEMO, **request)
    prune_(model, config, smollm2.calibration_texts())
    return model


def smoothing(seed):
    """Yield perplexities with and without smoothing: as packed, with 8-bit activations, and of the weights alone."""
    text = smollm2.token_ids(8 * WINDOW)
    for smoothed in (False, True):
        pruned = demo_model(seed, smooth=smoothed)
        for stored in ("bf16", "int8", "fp8"):
            model = copy.deepcopy(pruned)
            pack_(model, None if stored == "bf16" else stored)
            row = {"model": "default recipe of examples/demo.py, bfloat16", "smoothed": smoothed, "stored": stored}
            row["perplexity"] = round(perplexity(model, text, WINDOW), 2)
            unpack_(model)
            yield row | {"perplexity_unpacked": round(perplexity(model, text, WINDOW), 2)}


@contextmanager
def no_feedback():
    """Leave the refitted weights as they are: packing then rounds each to the nearest FP8 value."""
    feedback = solve.round_to_fp8
    solve.round_to_fp8 = lambda objective, mask, weight: weight
    try:
        yield
    finally:
        solve.round_to_fp8 = feedback


def rounding(seed):
    """Yield perplexities before and after packing in FP8: not knowing of it, knowing, and without error feedback."""
    text = smollm2.token_ids(24 * WINDOW)
    for quantization in (None, "fp8", "nearest"):
        if quantization == "nearest":
            with no_feedback():
                model = demo_model(seed, quantization="fp8")
        else:
            model = demo_model(seed, quantization=quantization)
        row = {"quantization": "fp8" if quantization else None}
        if quantization == "nearest":
            row["note"] = "rounded to the nearest at the end (no feedback)"
        row["dense_masked"] = round(perplexity(model, text, WINDOW), 3)
        pack_(model, "fp8")
        yield row | {"packed_fp8": round(perplexity(model, text, WINDOW), 3)}


def keep(name, row, same, seed):
    """Add one row to a file of results."""
    row = row | ({"seed": seed} if seed else {})
    print(row, flush=True)
    merge(name, [row | {"conditions": conditions()}], [*same, "seed"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("recipes", "smoothing", "rounding"))
    parser.add_argument("--model", choices=("smollm2", "minilm", "whisper", "dinov2"), help="of recipes: one alone")
    parser.add_argument("--only", type=int, nargs="*", help="of recipes: numbers of settings")
    parser.add_argument("--steps", type=int, help="of recipes: train shorter than the rows did")
    parser.add_argument("--seed", type=int, default=0, help="of the order of batches in training, and of the text")
    parser.add_argument("--folder", type=Path, default=MODELS, help="of recipes: the bundles")
    arguments = parser.parse_args()
    if arguments.what == "smoothing":
        for row in smoothing(arguments.seed):
            keep("smoothing", row, ("model", "smoothed", "stored"), arguments.seed)
    elif arguments.what == "rounding":
        for row in rounding(arguments.seed):
            keep("rounding", row, ("quantization", "note"), arguments.seed)
    else:
        for number, row in enumerate(SETTINGS):
            if arguments.only is not None and number not in arguments.only:
                continue
            if arguments.model in (None, row["model"]):
                found = measure_recipe(row, arguments.seed, arguments.folder, arguments.steps)
                keep("one_shot_ablation", found, SETTING, arguments.seed)


if __name__ == "__main__":
    main()
