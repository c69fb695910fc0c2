"""Retraining on a real model: from the default one-shot model back to what the dense one was, and the controls.

    python benchmarks/retrain.py smollm2                                  # all rows, one after another
    python benchmarks/retrain.py smollm2 --rows recovered --minutes 9     # stop in time; the same command goes on
    python benchmarks/retrain.py --collect                                # results/retrain_NAME.json from all runs

Each finished row is a line of results/retrain_NAME.jsonl, and is not run again; the curve of its training is in it.
Checkpoints lie in --work, from which a run that was stopped goes on. Data: `retrain_data.py`. One GPU, or a CPU for a
trial (`--tokens 32768`).

| rows | begin with | learn from |
|---|---|---|
| recovered | the one-shot model | the dense model's logits, temperature 1, no labels |
| labels / dense, labels | the one-shot / the dense model | labels, at several rates, with early stopping |
| policy ... | the dense model; frozen: the one-shot model | the dense model's logits, all for as many tokens |
| masked adapters | the one-shot model | the dense model's logits |
"""

import argparse
import copy
import importlib.util
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import retrain_data
import torch
from common import RESULTS, conditions
from one_shot_data import MODELS, WINDOW, load
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, pack_, prune_, sparsity_report
from hf_sparse24.training.masks import bare

QUANTIZATIONS = ("int8", "fp8")
LOGITS = {"label_weight": 0.0, "logit_weight": 1.0, "distill_temperature": 1.0}
BATCH = {"smollm2": 16, "minilm": 128}


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        start (`str`): "one-shot" or "dense".
        tokens (`float`): how many it sees.
        learning_rate (`float`): at the peak.
        distils (`bool`): from the dense model; else it learns from labels.
        sparse (`bool`): whether a mask is kept.
        stops_early (`bool`): at the best loss on the validation text, which is kept.
        adapters (`int`): rank of masked adapters, 0: all weights.
        arguments (`dict`): of `Sparse24TrainingArguments` beside.
    """

    start: str = "one-shot"
    tokens: float = 8e6
    learning_rate: float = 1e-3
    distils: bool = True
    sparse: bool = True
    stops_early: bool = False
    adapters: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)


def rows_of(name: str) -> dict[str, Row]:
    """Return all rows of a model."""
    if name == "minilm":
        return {f"recovered, {rate:g}": Row(tokens=60e6, learning_rate=rate) for rate in (1e-4, 3e-4, 1e-3)}
    rows = {"recovered": Row(tokens=120e6)}
    for rate in (3e-5, 1e-4, 3e-4, 1e-3):
        rows[f"labels, {rate:g}"] = Row(tokens=14e6, learning_rate=rate, distils=False, stops_early=True)
        rows[f"dense, labels, {rate:g}"] = Row("dense", 14e6, rate, distils=False, sparse=False, stops_early=True)
    rows["policy frozen"] = Row()
    for policy in ("frozen", "transposable"):
        rows[f"policy {policy}, from dense"] = Row(
            "magnitude" if policy == "frozen" else "dense", arguments=_of(policy)
        )
    for policy in ("srste", "masked_decay", "admm"):
        rows[f"policy {policy}"] = Row("dense", learning_rate=5e-4, arguments=_of(policy, until=0.6))
    rows["policy srste, from one-shot"] = Row(learning_rate=5e-4, arguments=_of("srste", until=0.6))
    rows["policy learned"] = Row("dense", learning_rate=1e-3, arguments=_of("learned"))
    rows["masked adapters, rank 16"] = Row(adapters=16)
    rows["masked adapters, rank 64"] = Row(adapters=64)
    rows["compact optimizer"] = Row(arguments={"compact_optimizer": True})
    for temperature in (1.0, 2.0):
        mixed = {"label_weight": 1 / 3, "logit_weight": 2 / 3, "distill_temperature": temperature}
        rows[f"labels and logits, temperature {temperature:g}"] = Row(arguments=mixed)
    return rows


def _of(policy: str, **arguments: Any) -> dict[str, Any]:
    return {"mask_policy": policy, "mask_policy_args": arguments or None}


class Rows(torch.utils.data.Dataset):
    """Token ids, as a trainer takes them; where nothing is to learn from labels there are none."""

    def __init__(self, ids: torch.Tensor, name: str) -> None:
        self.ids, self.name = ids, name

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row."""
        ids = self.ids[index]
        if self.name == "smollm2":
            return {"input_ids": ids, "labels": ids}
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class Deadline(TrainerCallback):
    """Save and stop in time, so that the next run can go on."""

    def __init__(self, seconds: float) -> None:
        self.end, self.passed = time.monotonic() + seconds, False

    def on_step_end(self, args, state, control, **kwargs):
        """Stop where time is up, unless this is the last step."""
        if time.monotonic() > self.end and state.global_step < state.max_steps:
            self.passed = control.should_save = control.should_training_stop = True


def starting_model(name, start, bundle, work, device):
    """Return a model to train: the dense one, or a pruned one, which is made once and kept."""
    if start == "dense":
        return bundle["model"]()
    folder = work / start
    kind = type(bundle["model"]())
    if not (folder / "config.json").exists():
        model = bundle["model"]().to(device)
        calibration = next(iter(bundle["calibration"].values()))
        if start == "magnitude":
            prune_(model, Sparse24Config(method="magnitude"))
        else:
            prune_(model, Sparse24Config(num_samples=4096), calibration)
        model.save_pretrained(folder)
        append(name, {"row": start} | scores(bundle, model))
    return kind.from_pretrained(folder, dtype=torch.float32)


def arguments_of(name, row, steps, folder, device, compiled):
    """Return the arguments of a row's training."""
    every = max(1, steps // 20)
    stopping = {
        "eval_strategy": "steps",
        "eval_steps": every,
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True,
    }
    given = {
        "per_device_train_batch_size": BATCH[name],
        "per_device_eval_batch_size": 8,
        "max_steps": steps,
        "learning_rate": row.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(100, max(1, steps // 20)),
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "logging_steps": max(1, steps // 50),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": every if row.stops_early else 5 * every,
        "save_total_limit": 2 if row.stops_early else 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "torch_compile": compiled,
        **(stopping if row.stops_early else {}),
        **(LOGITS if row.distils else {}),
        **row.arguments,
    }
    return Sparse24TrainingArguments(str(folder), **given)


def run(name, key, row, bundle, options, device):
    """Train one row, and append its figures; return False where time is up."""
    folder = options.work / name / key.replace(", ", "_").replace(" ", "_")
    train, validation = retrain_data.load(name, options.folder)
    tokens = row.tokens if options.tokens is None else options.tokens
    steps = max(2, round(tokens / (BATCH[name] * train.shape[1])))
    args = arguments_of(name, row, steps, folder, device, options.compile)
    model = starting_model(name, row.start, bundle, options.work / name, device)
    for module in model.modules():  # the teacher writes without dropout; so shall the student
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if row.adapters:
        from peft import LoraConfig

        from hf_sparse24.training.lora import add_masked_lora

        model = add_masked_lora(
            model, LoraConfig(r=row.adapters, lora_alpha=2 * row.adapters, target_modules="all-linear")
        )
    deadline = Deadline(options.minutes * 60)
    common = {
        "train_dataset": Rows(train, name),
        "eval_dataset": Rows(validation[:: max(1, len(validation) // 64)], name),
        "callbacks": [deadline, *([EarlyStoppingCallback(4)] if row.stops_early else [])],
    }
    if row.sparse:
        trainer = Sparse24Trainer(model, args, teacher_model=bundle["model"]() if row.distils else None, **common)
    else:
        trainer = Trainer(model, args, **common)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if deadline.passed:
        print(f"{key}: stopped at step {trainer.state.global_step} of {steps}; run again to go on", flush=True)
        return False
    seconds = time.perf_counter() - started
    done = trainer.state.global_step - (int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    model = bare(trainer.model)
    model = model.merge_and_unload() if row.adapters else model
    facts = {
        "row": key,
        "start": row.start,
        "learning_rate": row.learning_rate,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
        "tokens": trainer.state.global_step * BATCH[name] * train.shape[1],
        "tokens_per_second": round(done * BATCH[name] * train.shape[1] / seconds),
        "train_loss": round(result.training_loss, 5),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        "violating_groups": sparsity_report(model).totals["violating_groups"] if row.sparse else None,
        "arguments": {key: value for key, value in row.arguments.items() if value is not None},
        "curve": [slim(entry) for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    append(name, facts | scores(bundle, model))
    if row == rows_of(name).get("recovered") or name == "minilm":
        for quantization in QUANTIZATIONS:
            packed = copy.deepcopy(model)
            pack_(packed, quantization=quantization, backend="reference")
            append(name, {"row": f"{key}, then {quantization}"} | scores(bundle, packed))
    if options.save and row.sparse:
        model.save_pretrained(Path(options.save) / key.replace(", ", "_").replace(" ", "_"))
    return True


def slim(entry):
    """Keep of a log entry what a plot needs."""
    keys = (
        "step",
        "loss",
        "eval_loss",
        "learning_rate",
        "sparse24_flips",
        "sparse24_violations",
        "distill_logit_loss",
    )
    return {key: round(entry[key], 6) if isinstance(entry[key], float) else entry[key] for key in keys if key in entry}


def scores(bundle, model):
    return {key: round(float(evaluate(model)), 4) for key, evaluate in bundle["evaluations"].items()}


def lines_of(name):
    file = RESULTS / f"retrain_{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(name, facts):
    line = json.dumps(facts)
    print(json.dumps({key: value for key, value in facts.items() if key != "curve"}), flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"retrain_{name}.jsonl").open("a") as file:
        file.write(line + "\n")


def collect():
    """Turn the lines of all runs into one file a model, with the conditions."""
    for file in sorted(RESULTS.glob("retrain_*.jsonl")):
        rows = {line["row"]: line for line in lines_of(file.stem.removeprefix("retrain_"))}
        found = rows.pop("conditions", {})
        found.pop("row", None)
        file.with_suffix(".json").write_text(
            json.dumps({"conditions": found, "rows": list(rows.values())}, indent=1) + "\n"
        )
        file.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=tuple(BATCH))
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--folder", type=Path, default=MODELS, help="of the bundles")
    parser.add_argument("--work", type=Path, default=MODELS / "retrain", help="of checkpoints")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many, to go on later")
    parser.add_argument("--tokens", type=float, help="in place of what the rows say")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model; the first steps take longer")
    parser.add_argument("--save", help="folder for the trained models")
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args()
    if options.collect:
        collect()
        return
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, bundle = options.model, load(options.model, options.folder)
    done = {line["row"] for line in lines_of(name)}
    wanted = rows_of(name)
    for key in options.rows:
        if key not in wanted:
            parser.error(f"no row {key!r}; there are {', '.join(map(repr, wanted))}")
    if "conditions" not in done:
        gpu = torch.cuda.get_device_name() if device == "cuda" else None
        append(name, {"row": "conditions", "gpu": gpu, "window": WINDOW, **conditions()})
    if "dense" not in done:
        append(name, {"row": "dense"} | scores(bundle, bundle["model"]().to(device)))
    started = time.monotonic()
    for key in options.rows or wanted:
        if key in done:
            continue
        if wanted[key].adapters and importlib.util.find_spec("peft") is None:
            print(f"{key}: left out, peft is not installed here", flush=True)
            continue
        options.minutes -= (time.monotonic() - started) / 60
        started = time.monotonic()
        if options.minutes <= 0 or not run(name, key, wanted[key], bundle, options, device):
            break


if __name__ == "__main__":
    main()
