"""The script behind the ablation rows: its settings are those of the rows, and it runs, on tiny models."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_sparse24.calibration import fitting, solve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, with copies of the committed rows to write to."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT / "examples"), *sys.path])
    for name in ("common", "one_shot_data", "one_shot_ablation", "smollm2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("one_shot_ablation")
    results = tmp_path / "results"
    results.mkdir()
    for name in ("one_shot_ablation", "smoothing", "rounding"):
        (results / f"{name}.json").write_bytes((RESULTS / f"{name}.json").read_bytes())
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", results)
    monkeypatch.setattr(module, "results", results, raising=False)
    yield module
    for name in ("common", "one_shot_data", "one_shot_ablation", "smollm2"):
        sys.modules.pop(name, None)


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["one_shot_ablation.py", *map(str, arguments)])
    script.main()


def rows_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


def without_run(rows):
    return [{key: value for key, value in row.items() if key != "run"} for row in rows]


def test_the_settings_are_those_of_the_committed_rows(script):
    rows = [{key: row[key] for key in script.SETTING if key in row} for row in rows_of(RESULTS, "one_shot_ablation")]
    assert sorted(map(json.dumps, script.SETTINGS)) == sorted({json.dumps(row) for row in rows})


def test_a_recipe_is_what_its_row_says(script):
    row = script.setting("minilm", 5e-3, 1e-2, target="sparse", refit="symmetric")
    recipe = script.recipe_of(row, seed=3)
    assert (recipe.method, recipe.refit, recipe.seed) == ("alps", "symmetric", 3)
    assert (recipe.matching.learning_rate, recipe.matching.target, recipe.matching.steps) == (5e-3, "sparse", 300)
    assert (recipe.distillation.learning_rate, recipe.distillation.steps) == (1e-2, 300)
    plain = script.recipe_of(script.setting("minilm", method="sparsegpt", refit=None), seed=0)
    assert (plain.method, plain.refit, plain.matching, plain.distillation) == ("sparsegpt", None, None, None)


def test_absolute_rates_hold_for_parameters_of_all_sizes_and_only_inside(script):
    parameters = [torch.nn.Parameter(torch.full((4,), size)) for size in (1.0, 0.01)]
    with script.rates_as(script.ABSOLUTE):
        assert [group["lr"] for group in fitting._by_size(parameters, 0.5)] == [0.5]
    assert [group["lr"] for group in fitting._by_size(parameters, 0.5)] == [0.5, 0.5 * 2**-7]


@pytest.fixture
def minilm(tmp_path):
    """A bundle with a tiny encoder in place of MiniLM."""
    folder = tmp_path / "bundles" / "minilm"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=96)).save_pretrained(folder / "model")
    data = {
        name: torch.randint(0, 96, (count, 12), dtype=torch.int32)
        for name, count in (("queries", 40), ("documents", 40), ("calibration", 320))
    }
    data |= {f"{name}_mask": torch.ones_like(ids) for name, ids in data.items()}
    save_file(data, folder / "data.safetensors")
    return tmp_path / "bundles"


@pytest.mark.parametrize("seed", [0, 1])
def test_recipes_replace_the_row_of_the_same_settings_and_seed_alone(script, minilm, monkeypatch, seed):
    committed = rows_of(script.results, "one_shot_ablation")
    chosen = script.setting("minilm", 5e-3, 2.5e-3)
    number = script.SETTINGS.index(chosen)
    arguments = ("--only", number, "--steps", 2, "--seed", seed, "--folder", minilm)
    run(script, monkeypatch, "recipes", *arguments)
    rows = without_run(rows_of(script.results, "one_shot_ablation"))
    assert rows[: len(committed)] == committed  # it was trained for fewer steps, which is another setting
    (row,) = rows[len(committed) :]
    assert (row["matching"]["steps"], row["distillation"]["steps"], row.get("seed", 0)) == (2, 2, seed)
    assert len(row["held_out"]) == 2
    assert 0 <= row["recall_at_1"] <= 1
    run(script, monkeypatch, "recipes", *arguments)
    assert without_run(rows_of(script.results, "one_shot_ablation")) == rows
    assert fitting._by_size.__module__ == fitting.__name__


def test_one_model_alone_is_measured(script, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "measure_recipe", lambda row, *_: seen.append(row) or {**row, "figure": 1.0})
    run(script, monkeypatch, "recipes", "--model", "minilm")
    assert {row["model"] for row in seen} == {"minilm"}
    assert len(seen) == 8
    rows = rows_of(script.results, "one_shot_ablation")
    assert len(rows) == len(rows_of(RESULTS, "one_shot_ablation"))  # in place
    assert sum("figure" in row for row in rows) == 8


@pytest.fixture
def demo(script, tiny_llama, tmp_path, monkeypatch):
    """A tiny model and texts in place of the demo's."""
    folder = tmp_path / "demo"
    tiny_llama.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(90)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    texts = [" ".join(f"w{(7 * row + k) % 90}" for k in range(40)) for row in range(40)]
    monkeypatch.setattr(script.smollm2, "model_folder", lambda: folder)
    monkeypatch.setattr(script.smollm2, "calibration_texts", lambda: texts)
    monkeypatch.setattr(script.smollm2, "token_ids", lambda count: torch.arange(count) * 11 % 90)
    monkeypatch.setattr(script, "DEMO", {"num_samples": 8, "sequence_length": 16, "batch_size": 4})
    monkeypatch.setattr(script, "WINDOW", 16)


def test_smoothing_measures_what_the_committed_rows_hold(script, demo, monkeypatch):
    committed = rows_of(RESULTS, "smoothing")
    run(script, monkeypatch, "smoothing")
    rows = rows_of(script.results, "smoothing")
    same = ("model", "smoothed", "stored")
    assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in committed]
    assert all(row.keys() - {"run"} == committed[0].keys() for row in rows)
    bf16, int8 = rows[0], rows[1]
    assert bf16["perplexity"] == bf16["perplexity_unpacked"]
    assert int8["perplexity"] != committed[1]["perplexity"]


def test_rounding_measures_what_the_committed_rows_hold(script, demo, monkeypatch):
    committed = rows_of(RESULTS, "rounding")
    used = []
    feedback = solve.round_to_fp8
    monkeypatch.setattr(solve, "round_to_fp8", lambda *args: used.append(1) or feedback(*args))
    counts = []
    demo_model = script.demo_model

    def counted(*args, **kwargs):
        model = demo_model(*args, **kwargs)
        counts.append(len(used))
        return copy.deepcopy(model)

    monkeypatch.setattr(script, "demo_model", counted)
    run(script, monkeypatch, "rounding", "--seed", 2)
    rows = without_run(rows_of(script.results, "rounding"))
    assert rows[:3] == committed  # another seed is another row
    assert [(row["quantization"], row.get("note"), row["seed"]) for row in rows[3:]] == [
        (row["quantization"], row.get("note"), 2) for row in committed
    ]
    assert counts[0] == 0  # only the second of the three feeds errors back
    assert counts[1] > 0
    assert counts[2] == counts[1]


def test_what_was_measured_twice_stays_twice(script):
    import common

    path = common.RESULTS / "twice.json"
    rows = [{"row": {"a": 1}, "x": 1}, {"row": {"a": 1}, "x": 2}, {"row": {"a": 2}, "x": 3}]
    path.write_text(json.dumps({"conditions": {"date": "then"}, "rows": rows}))
    common.merge("twice", [{"row": {"a": 2}, "x": 4, "conditions": {"date": "now"}}], ["row"])
    assert [row["x"] for row in rows_of(common.RESULTS, "twice")] == [1, 2, 4]
    assert json.loads(path.read_text())["conditions"] == [{"date": "then"}, {"date": "now"}]
    common.merge("twice", [{"row": {"a": 1}, "x": 5, "conditions": {"date": "now"}}], ["row"])
    assert [row["x"] for row in rows_of(common.RESULTS, "twice")] == [5, 4]
