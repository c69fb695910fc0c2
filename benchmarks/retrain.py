"""Retraining on a real model: from the default one-shot model back to what the dense one was, and the controls.

    python benchmarks/retrain.py smollm2                                    # all rows, one after another
    python benchmarks/retrain.py smollm2 --rows recovered --minutes 8.5     # stop in time; the same command goes on
    python benchmarks/retrain.py --list                                     # the rows of each model
    python benchmarks/retrain.py --collect [FOLDER ...]                     # results/retrain_NAME.json from all runs

Each finished row is a line of NAME.jsonl in the folder --work, with its conditions and the curve of its training, and
is not run again. Checkpoints lie there too, until the row is done: from them a run that was stopped goes on.
`--collect` adds the lines of some folders to the results, in place of those of the same row. Data: `retrain_data.py`.
One GPU, or a CPU for a trial (`--tokens 32768`). The package datasets is not needed, peft for adapters only.

| rows | begin with | learn from |
|---|---|---|
| recovered | the one-shot model | the dense model's outputs: for smollm2 and whisper logits, without labels |
| labels / dense, labels | the one-shot / the dense model | labels, at several rates, with early stopping |
| policy ... | the dense model; frozen: the one-shot model | the dense model's logits, all for as many tokens |
| masked adapters | the one-shot model | the dense model's logits |
"""

import argparse
import copy
import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import retrain_data
import torch
from common import conditions, merge
from one_shot_data import MODELS, WINDOW, load
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, pack_, prune_, sparsity_report
from hf_sparse24.calibration.self_generated import sample_windows
from hf_sparse24.training.masks import bare

QUANTIZATIONS = ("int8", "fp8")
LOGITS = {"label_weight": 0.0, "logit_weight": 1.0, "distill_temperature": 1.0}
BATCH = {"smollm2": 16, "minilm": 128, "whisper": 32, "dinov2": 64}
OWN_TEXT_AT_ONCE = 1024  # windows


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
        own_text (`int`): windows that the dense model writes itself, beside the text that there is.
        quantized (`bool`): whether the result is packed in 8 bits as well.
        arguments (`dict`): of `Sparse24TrainingArguments` beside.
    """

    start: str = "one-shot"
    tokens: float = 8e6
    learning_rate: float = 1e-3
    distils: bool = True
    sparse: bool = True
    stops_early: bool = False
    adapters: int = 0
    own_text: int = 0
    quantized: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def rows_of(name: str) -> dict[str, Row]:
    """Return all rows of a model."""
    if name != "smollm2":
        tokens = {"minilm": 60e6, "whisper": 144e6, "dinov2": 82e6}[name]
        rows = {
            f"recovered, {rate:g}": Row(tokens=tokens, learning_rate=rate, quantized=True)
            for rate in (1e-4, 3e-4, 1e-3)
        }
        hidden = Row(tokens=tokens, learning_rate=3e-4, quantized=True, arguments={"hidden_weight": 1.0})
        return rows | {"recovered, hidden states as well, 0.0003": hidden}
    recovered = Row(tokens=120e6, quantized=True)
    rows = {"recovered": recovered, "recovered, with text of its own": replace(recovered, own_text=4096)}
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


class Deadline(TrainerCallback):
    """Save and stop in time, so that the next run can go on.

    Args:
        end (`float`): when, by `time.monotonic`.
    """

    def __init__(self, end: float) -> None:
        self.end, self.passed = end, False

    def on_step_end(self, args, state, control, **kwargs):
        """Stop where time is up, unless this is the last step."""
        if time.monotonic() > self.end and state.global_step < state.max_steps:
            self.passed = control.should_save = control.should_training_stop = True


def starting_model(name, start, bundle, options, device):
    """Return a model to train: the dense one, or a pruned one, which is made once and kept."""
    if start == "dense":
        return bundle["model"]()
    folder = options.work / name / start
    kind = type(bundle["model"]())
    if not (folder / "config.json").exists():
        model = bundle["model"]().to(device)
        calibration = next(iter(bundle["calibration"].values()))
        if start == "magnitude":
            prune_(model, Sparse24Config(method="magnitude"))
        else:
            prune_(model, Sparse24Config(num_samples=4096), calibration)
        append(options, {"row": start} | scores(bundle, model))
        model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


def own_text(bundle, count, folder, device, end):
    """Return windows that the dense model writes, made once and kept in parts; None where time is up."""
    parts = []
    for start in range(0, count, OWN_TEXT_AT_ONCE):
        file = folder / f"own_text_{start}.safetensors"
        if not file.exists():
            if time.monotonic() > end:
                return None
            model = bundle["model"]().to(device, torch.bfloat16)
            windows = min(OWN_TEXT_AT_ONCE, count - start)
            ids = sample_windows(model, windows, WINDOW, OWN_TEXT_AT_ONCE, seed=start)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"ids": ids}, file)
        parts.append(load_file(file)["ids"])
    return torch.cat(parts)


def arguments_of(name, row, steps, folder, device, options):
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
        "torch_compile": options.compile,
        "seed": options.seed,
        # Pictures and sounds are changed anew for every step.
        "dataloader_num_workers": min(8, os.cpu_count() - 1) if name in ("whisper", "dinov2") else 0,
        **(stopping if row.stops_early else {}),
        **(LOGITS if row.distils else {}),
        **row.arguments,
    }
    return Sparse24TrainingArguments(str(folder), **given)


def run(name, key, row, bundle, options, device):
    """Train one row, and append its figures; return False where time is up."""
    folder = options.work / name / label(key, options).replace(", ", "_").replace(" ", "_")
    train, validation, width = retrain_data.load(name, options.folder)
    tokens = row.tokens if options.tokens is None else options.tokens
    steps = max(2, round(tokens / (BATCH[name] * width)))
    if name in ("whisper", "dinov2"):
        train, validation, width = retrain_data.load(name, options.folder, steps * BATCH[name])
    if row.own_text:
        windows = min(row.own_text, max(1, round(tokens / WINDOW)))
        written = own_text(bundle, windows, options.work / name, device, options.end)
        if written is None:
            return False
        train.ids = torch.cat([train.ids.to(written.dtype), written])
    args = arguments_of(name, row, steps, folder, device, options)
    model = starting_model(name, row.start, bundle, options, device)
    for module in model.modules():  # the teacher writes without dropout; so shall the student
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if row.adapters:
        from peft import LoraConfig

        from hf_sparse24.training.lora import add_masked_lora

        model = add_masked_lora(
            model, LoraConfig(r=row.adapters, lora_alpha=2 * row.adapters, target_modules="all-linear")
        )
    deadline = Deadline(options.end)
    common = {
        "train_dataset": train,
        "eval_dataset": torch.utils.data.Subset(validation, range(0, len(validation), -(-len(validation) // 64))),
        "callbacks": [deadline, *([EarlyStoppingCallback(4)] if row.stops_early else [])],
    }
    if row.sparse:
        trainer = Sparse24Trainer(model, args, teacher_model=bundle["model"]() if row.distils else None, **common)
    else:
        trainer = Trainer(model, args, **common)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None  # also where the row is trained to its end
    trainer.train(resume_from_checkpoint=checkpoint)
    if deadline.passed:
        print(f"{key}: stopped at step {trainer.state.global_step} of {steps}; run again to go on", flush=True)
        return False
    seconds = time.perf_counter() - started
    done = trainer.state.global_step - (int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    model = bare(trainer.model)
    model = model.merge_and_unload() if row.adapters else model
    facts = {
        "row": key,
        "seed": options.seed,
        "start": row.start,
        "learning_rate": row.learning_rate,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
        "tokens": trainer.state.global_step * BATCH[name] * width,
        "tokens_per_second": round(done * BATCH[name] * width / seconds),
        "validation_loss": trainer.state.best_metric,  # with early stopping: the best
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        "violating_groups": sparsity_report(model).totals["violating_groups"] if row.sparse else None,
        "arguments": {key: value for key, value in row.arguments.items() if value is not None},
        "curve": [slim(entry) for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    for quantization in QUANTIZATIONS if row.quantized else ():
        packed = copy.deepcopy(model)
        pack_(packed, quantization=quantization, backend="reference")
        append(options, {"row": f"{key}, then {quantization}", "seed": options.seed} | scores(bundle, packed))
    append(options, facts | scores(bundle, model))  # last: where it is, the row is done
    shutil.rmtree(folder)
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


def label(key, options):
    """Return what a row is called in the results."""
    return f"{key}, seed {options.seed}" if options.seed else key


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(options, facts):
    """Add a row to those that are done, with its conditions."""
    facts = facts | {"row": label(facts["row"], options) if "seed" in facts else facts["row"]}
    print(json.dumps({key: value for key, value in facts.items() if key != "curve"}), flush=True)
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    with options.lines.open("a") as file:
        file.write(json.dumps(facts | {"conditions": conditions() | {"seed": options.seed}}) + "\n")


def collect(folders):
    """Add the lines of all runs to one file a model."""
    for name in BATCH:
        order = ["dense", "one-shot", "magnitude", *rows_of(name)]
        lines = [line for folder in folders for line in lines_of(Path(folder) / f"{name}.jsonl")]
        if lines:
            merge(f"retrain_{name}", lines, ["row"], lambda line: place(line["row"], order))  # noqa: B023


def place(row, order):
    """Return where a row stands: beside the one that it belongs to, which is the longest that begins its name."""
    own = max((key for key in order if row == key or row.startswith(f"{key}, ")), key=len, default=order[-1])
    return order.index(own), row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=tuple(BATCH))
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--folder", type=Path, default=MODELS, help="of the bundles")
    parser.add_argument("--work", type=Path, default=MODELS / "retrain", help="of checkpoints and finished rows")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many, to go on later")
    parser.add_argument("--tokens", type=float, help="in place of what the rows say")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data, and of adapters")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model; the first steps take longer")
    parser.add_argument("--save", help="folder for the trained models")
    parser.add_argument("--list", action="store_true", help="print the rows of each model")
    parser.add_argument(
        "--collect", nargs="*", metavar="FOLDER", help="add finished rows to the results; default: --work"
    )
    options = parser.parse_args()
    options.end = time.monotonic() + 60 * options.minutes
    if options.collect is not None:
        collect(options.collect or [options.work])
        return
    if options.list or options.model is None:
        for name in BATCH:
            for key, row in rows_of(name).items():
                print(f"{name}: {key!r} ({row.tokens / 1e6:g} million tokens)")
        return
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, bundle = options.model, load(options.model, options.folder)
    options.lines = options.work / f"{name}.jsonl"
    done = {line["row"] for line in lines_of(options.lines)}
    wanted = rows_of(name)
    for key in options.rows:
        if key not in wanted:
            parser.error(f"no row {key!r}; there are {', '.join(map(repr, wanted))}")
    if "dense" not in done:
        append(options, {"row": "dense"} | scores(bundle, bundle["model"]().to(device)))
    for key in options.rows or wanted:
        if label(key, options) in done:
            continue
        if wanted[key].adapters and importlib.util.find_spec("peft") is None:
            print(f"{key}: left out, peft is not installed here", flush=True)
            continue
        if time.monotonic() > options.end or not run(name, key, wanted[key], bundle, options, device):
            print("Time is up; run again to go on.", flush=True)
            break


if __name__ == "__main__":
    main()
