"""The cards in `model_cards/` are what the script renders from the committed rows, and nothing else."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from hf_sparse24 import prune_
from hf_sparse24.evaluation import read_evaluations
from hf_sparse24.model_card import CardSubject

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = ROOT / "model_cards"
SCRIPTS = ("common", "fetch_models", "model_card_bases", "model_card_rows", "model_cards", "one_shot", "one_shot_data")
SCRIPTS += ("retrain", "retrain_data", "one_shot_bundles")
SMOLLM2 = "SmolLM2-135M-Instruct-2of4"


@pytest.fixture(scope="module")
def scripts():
    """Import a script of the benchmarks by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        for name in SCRIPTS:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cards(scripts):
    return scripts("model_cards")


@pytest.fixture
def results(tmp_path):
    """Return a copy of the committed rows without those of retraining, to change."""
    folder = tmp_path / "results"
    folder.mkdir()
    for file in RESULTS.glob("one_shot_*.json"):
        shutil.copy(file, folder)
    return folder


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def rows_of_retraining(names):
    """Return made-up rows in the form that `retrain.py` collects."""
    run = {"date": "2026-11-25", "command": "python benchmarks/retrain.py smollm2", "cpu": "a CPU", "gpu": "a GPU"}
    figures = ("perplexity_bbc", "perplexity_sotu", "perplexity_foldoc", "perplexity_austen")
    trained = {
        "seed": 0,
        "start": "one-shot",
        "learning_rate": 0.001,
        "steps": 7324,
        "tokens": 119996416,
        "violating_groups": 0,
        "arguments": {},
        "curve": [
            {"step": 146, "loss": 0.75, "distill_logit_loss": 0.75},
            {"step": 7324, "loss": 0.125, "distill_logit_loss": 0.125},
        ],
    }
    rows = []
    for place, name in enumerate(["dense", "one-shot", *names]):
        facts = trained if name in ("recovered", "recovered, seed 1") else {}
        rows.append({"row": name, **facts, **dict.fromkeys(figures, 20.5 + place), "run": 0})
    return {"conditions": [run | {"torch": "2.11.0", "transformers": "5.17.0"}], "rows": rows}


def on_disk(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rendered(cards, results):
    files, _ = cards.render_all(results)
    return {path: text.encode() for path, text in files.items()}


def test_the_committed_cards_are_those_of_the_committed_rows(cards):
    assert rendered(cards, RESULTS) == on_disk(COMMITTED)
    assert len(on_disk(COMMITTED)) >= 2 * 4 + 1


@pytest.mark.parametrize("drift", ["figure", "recipe", "conditions", "card", "extra"])
def test_drift_is_seen(cards, results, tmp_path, drift):
    for file in RESULTS.glob("retrain_*.json"):
        shutil.copy(file, results)
    folder, path = tmp_path / "cards", results / "one_shot_smollm2.json"
    shutil.copytree(COMMITTED, folder)
    assert rendered(cards, results) == on_disk(folder)
    default = [row["row"] for row in json.loads(path.read_text())["rows"]].index("default")
    if drift == "figure":
        edit(path, lambda rows: rows["rows"][default].update(perplexity_foldoc=26.9))
    elif drift == "recipe":
        edit(path, lambda rows: rows["rows"][default]["recipe"].update(refit="symmetric"))
    elif drift == "conditions":
        edit(path, lambda rows: rows["conditions"][rows["rows"][default]["run"]].update(torch="2.12.0"))
    elif drift == "card":
        with (folder / SMOLLM2 / "README.md").open("a") as file:
            file.write("\n")
    else:
        (folder / SMOLLM2 / "another.md").touch()
    assert rendered(cards, results) != on_disk(folder)


def test_a_card_without_its_row_is_not_there_and_the_script_says_why(cards, results, tmp_path, capsys):
    folder = tmp_path / "cards"
    cards.main(results, folder)
    assert (folder / SMOLLM2 / "README.md").exists()
    capsys.readouterr()
    edit(results / "one_shot_smollm2.json", lambda found: found.update(rows=found["rows"][:1]))
    cards.main(results, folder)
    said = capsys.readouterr().out
    assert f"{SMOLLM2}: not rendered, no row 'default' in one_shot_smollm2.json" in said
    assert f"{SMOLLM2}-retrained: not rendered, no row 'recovered' in retrain_smollm2.json, which is not there" in said
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "all-MiniLM-L6-v2-2of4",
        "dinov2-small-2of4",
        "whisper-tiny.en-2of4",
    ]
    assert "SmolLM2" not in (folder / "README.md").read_text()


def test_a_figure_that_was_not_measured_is_an_absent_row(cards, results):
    path = results / "one_shot_smollm2.json"
    whole = cards.render(cards.Card("smollm2"), results)["README.md"]
    edit(path, lambda found: [row.pop("perplexity_austen", None) for row in found["rows"]])
    card = cards.render(cards.Card("smollm2"), results)["README.md"]
    lost = [line for line in whole.splitlines() if line not in card.splitlines()]
    (figure,) = (line for line in lost if "|" in line)
    assert figure.startswith("| Perplexity (lower is better) | Jane Austen's novels")
    assert not re.search(r"\bNone\b|\bnan\b", card)
    edit(path, lambda found: found.update(rows=[row for row in found["rows"] if row["row"] != "dense"]))
    card = cards.render(cards.Card("smollm2"), results)["README.md"]
    assert "| FOLDOC, 32 windows of 1024 tokens |  | 26.98 |  |" in card
    assert "recovery 7" not in card
    keys = [f"perplexity_{kind}" for kind in ("bbc", "sotu", "foldoc")]
    edit(path, lambda found: [row.pop(key, None) for row in found["rows"] for key in keys])
    with pytest.raises(LookupError, match="no figure in row 'default'"):
        cards.render(cards.Card("smollm2"), results)


def test_the_cards_of_retraining(cards, results):
    names = ["recovered", "recovered, then int8", "recovered, then fp8", "recovered, seed 1"]
    (results / "retrain_smollm2.json").write_text(json.dumps(rows_of_retraining(names)))
    files, missing = cards.render_all(results)
    card = files[f"{SMOLLM2}-retrained/README.md"]
    assert "**Perplexity 22.5, dense 20.5: recovery 91.1 % on BBC News, 32 windows of 1024 tokens.**" in card
    assert "- Retrained with mask policy `frozen`." in card
    assert "7,324 steps, 120 million tokens, learning rate 0.001 at the peak, seed 0." in card
    assert "- Divergence from the teacher: 0.75 at first, 0.125 at the end." in card
    assert "- Before it: perplexity 21.5 on BBC News, " in card
    assert "- With seed 1: perplexity 25.5 on BBC News, " in card
    assert "Block matching took" not in card  # that of another run
    assert "mv .models/saved/recovered SmolLM2-135M-Instruct-2of4-retrained" in card
    for quantization, value in (("int8", 23.5), ("fp8", 24.5)):
        packed = files[f"{SMOLLM2}-retrained-{quantization}/README.md"]
        data = ModelCard(packed).data
        assert (data.base_model_relation, data.tags[-1]) == ("quantized", quantization)
        assert {result.metric_value for result in data.eval_results} == {value}
        assert f"packed, weights and activations in {quantization.upper()}." in packed
        assert "import hf_sparse24" in packed
        assert f"hf-sparse24 prune .models/saved/recovered {SMOLLM2}-retrained-{quantization} --quantiz" in packed
    assert f"{SMOLLM2}-retrained-int8" in files["README.md"]
    assert not any(name.startswith("SmolLM2") for name in missing)


def test_a_packed_card_needs_the_row_of_its_training_too(cards, results):
    (results / "retrain_smollm2.json").write_text(json.dumps(rows_of_retraining(["recovered, then int8"])))
    _, missing = cards.render_all(results)
    assert missing[f"{SMOLLM2}-retrained-int8"] == "no row 'recovered' in retrain_smollm2.json"


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_the_metadata_is_what_the_hub_reads(path, cards):
    card = ModelCard.load(path)
    base = next(base for base in cards.BASES.values() if base.hub_id == card.data.base_model)
    assert (card.data.library_name, card.data.license) == ("transformers", base.license)
    assert card.data.tags[:2] == ["2:4", "sparsity"]
    figures = read_evaluations((path.parent / "evaluation.json").read_text())
    assert [(result.metric_type, result.metric_value, result.dataset_name) for result in card.data.eval_results] == [
        (figure.metric, figure.value, figure.dataset) for figure in figures
    ]
    # As the Hub reads it: parsed and written again it is the same.
    assert ModelCard(f"---\n{card.data.to_yaml()}\n---\n{card.text}").data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("name", ["minilm", "whisper", "dinov2"])
def test_the_matrices_are_those_of_a_model_that_was_pruned(cards, name):
    base = cards.BASES[name]
    model = getattr(transformers, base.model_class)(base.config).to(torch.bfloat16)
    prune_(model)
    read = CardSubject.of(model)
    made = {"seed": 0, "violating_groups": 0}
    run = {"torch": "2.11.0", "transformers": "5.17.0"}
    counted = cards.subject_of(cards.Card(name), made, {}, run)
    assert (counted.model_class, counted.kept_dense) == (read.model_class, read.kept_dense)
    assert counted.totals == {key: read.totals[key] for key in counted.totals}
    assert (counted.packed, counted.quantization) == (read.packed, read.quantization)


def test_the_commands_name_rows_and_scripts_that_there_are(cards, scripts):
    requests = scripts("one_shot").requests(["first"])
    assert cards.ONE_SHOT in requests
    for card in cards.CARDS:
        if card.retrained:
            row = scripts("retrain").rows_of(card.base)[card.made_by]
            assert (row.start, row.distils, row.sparse, row.quantized) == ("one-shot", True, True, True)
            assert row.arguments.get("mask_policy", "frozen") == "frozen"
        for command in cards.commands(card):
            for script in re.findall(r"benchmarks/\w+\.py", command):
                assert (ROOT / script).exists()
