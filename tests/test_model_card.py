"""A card says what was recorded and measured, and nothing else."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_sparse24 import prune_
from hf_sparse24.benchmark.results import ModelRow, ProjectionRow, read_csv, run_environment, write_csv
from hf_sparse24.evaluation import Evaluation
from hf_sparse24.model_card import CardSubject, model_card
from tests.test_cli import cli, text, tokenizer  # noqa: F401

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PERPLEXITY = Evaluation("perplexity", 12.5, 32, "windows of 1024 tokens", dense=10.0, dataset="book.txt")
RECALL = Evaluation("recall_at_1", 0.7, 1000, "headlines")
CONDITIONS = {"device": "NVIDIA H100", "torch": "2.11.0", "date": "2026-11-24", "command": "hf-sparse24 bench model x"}


@pytest.fixture
def packed(tiny_llama_folder, magnitude):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, quantization_config=magnitude(quantization="int8"))


@pytest.fixture
def masked(tiny_llama, magnitude):
    prune_(tiny_llama, magnitude(seed=3, modules_to_not_convert=["k_proj"]))
    return tiny_llama


def row(candidate, **values):
    shared = {
        "benchmark": "decode",
        "precision": "bf16",
        "status": "ok",
        "model": "tiny",
        "layers": 2,
        "mode": "eager",
    }
    return ModelRow(**{**shared, "batch": 1, "tokens": 512, "candidate": candidate, **values})


def section(card, title):
    return card.content.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_metadata_is_what_the_hub_reads(packed):
    card = model_card(
        packed, "user/model", base_model="org/dense", license="apache-2.0", evaluations=[PERPLEXITY, RECALL]
    )
    data = ModelCard(card.content).data
    assert (data.base_model, data.library_name, data.license) == ("org/dense", "transformers", "apache-2.0")
    assert (data.tags, data.pipeline_tag) == (["2:4", "sparsity", "int8"], "text-generation")
    assert data.base_model_relation == "quantized"
    (result,) = data.eval_results  # the other figure does not say what it was measured on
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 12.5, "book.txt")


def test_evaluations_stand_beside_the_dense_model(packed):
    card = model_card(packed, "user/model", evaluations=[PERPLEXITY, RECALL])
    assert "**Perplexity 12.5, dense 10: recovery 80.0 % on book.txt, 32 windows of 1024 tokens.**" in card.text
    lines = section(card, "Evaluation").splitlines()
    assert "| Perplexity (lower is better) | book.txt, 32 windows of 1024 tokens | 10 | 12.5 | 80.0 % |" in lines
    assert "| Recall at 1 (higher is better) | 1000 headlines |  | 0.7 |  |" in lines


def test_speed_has_its_conditions_and_the_slower_rows_but_none_without_a_time(packed):
    rows = [
        row("dense-bf16", ms=2.0, tokens_s=500.0, over_dense_bf16=1.0),
        row("2:4-int8", ms=4.0, tokens_s=250.0, over_dense_bf16=0.5, precision="int8"),
        row("2:4-fp8", status="cannot run: no FP8", precision="fp8"),
    ]
    speed = section(model_card(packed, "m", benchmark=rows, conditions=CONDITIONS), "Speed")
    assert "| tiny, 2 layers: decode 1 x 512, eager | 2:4-int8 | 4 | 250 | 0.5 |" in speed
    assert "dense-bf16" in speed
    assert "fp8" not in speed
    assert "weights" not in speed  # no row has them
    assert "NVIDIA H100, torch 2.11.0, 2026-11-24; `hf-sparse24 bench model x`." in speed


def test_a_note_on_the_rows_stands_below_them(packed):
    facts = CONDITIONS | {"note": "2:4 rows run dense"}
    speed = section(model_card(packed, "m", benchmark=[row("dense-bf16", ms=2.0)], conditions=facts), "Speed")
    assert "2026-11-24; `hf-sparse24 bench model x`. Note: 2:4 rows run dense." in speed


def test_rows_of_a_cpu_are_no_speed(packed, caplog):
    facts = run_environment(torch.device("cpu"), "hf-sparse24 bench model x")
    card = model_card(packed, "m", benchmark=[row("2:4-int8", ms=2.0)], conditions=facts)
    assert "## Speed" not in card.content
    assert caplog.messages == ["The card leaves out the speed, which was measured on a CPU: it emulates the kernels."]


@pytest.mark.parametrize("name", ["performance_gemm.csv", "performance_model.csv"])
def test_rows_that_were_committed_render(packed, name):
    rows, facts = read_csv(RESULTS / name)
    speed = section(model_card(packed, "m", benchmark=rows, conditions=facts), "Speed")
    timed = [row for row in rows if row.status == "ok"]
    assert len([line for line in speed.splitlines() if line.startswith("|")]) == len(timed) + 2
    kind = ProjectionRow if "gemm" in name else ModelRow
    assert all(isinstance(row, kind) for row in rows)


def test_what_was_not_measured_is_absent(masked):
    card = model_card(masked, "model")
    assert "## Evaluation" not in card.content
    assert "## Speed" not in card.content
    assert not re.search(r"None|nan|More Information|recovery|\|", card.content)
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}


def test_how_it_was_made(masked):
    made = section(model_card(masked, "model"), "How it was made")
    assert "Method: `magnitude`; seed 3." in made
    assert "`modules_to_not_convert=['k_proj']`" in made
    assert "Kept dense: 1 (embedding), 2 (modules_to_not_convert)." in made
    assert f"torch {torch.__version__}" in made


def test_a_model_may_be_described_instead_of_given(packed, masked):
    for model in (packed, masked):
        given = model_card(model, "model", base_model="org/dense", evaluations=[PERPLEXITY])
        described = model_card(CardSubject.of(model), "model", base_model="org/dense", evaluations=[PERPLEXITY])
        assert described.content == given.content


def test_sentences_of_your_own_stand_where_they_belong(masked):
    plain = model_card(masked, "model").content
    assert "```bash" not in plain
    card = model_card(masked, "model", notes=["It rained."], commands=["make a", "make b"], limits=["No chess."])
    made, limits = section(card, "How it was made"), section(card, "Limits")
    assert made.endswith("\n- It rained.\n\n```bash\nmake a\nmake b\n```\n")
    assert limits.endswith("\n- No chess.")
    without = card.content.replace("\n- It rained.", "").replace("\n```bash\nmake a\nmake b\n```\n", "")
    assert without.replace("\n- No chess.", "") == plain


def test_the_data_are_named_without_the_folders_of_a_machine(masked):
    calibration = {"dataset": [["/home/me/secret/book.txt", 2], ["self", 1]], "num_samples": 8, "sequence_length": 512}
    calibration["refit"] = "asymmetric"
    masked.config.sparse24 |= {"calibration": calibration, "training": {"mask_policy": "frozen"}}
    card = model_card(masked, "model")
    assert "Method: `magnitude`, then asymmetric refit; seed 3." in card.text
    assert "Calibration: 2 x `book.txt` + 1 x `self`." in card.text
    assert "Calibrated on 8 windows of 512 tokens." in card.text
    assert "Retrained with mask policy `frozen`." in card.text
    assert "secret" not in card.content


def test_its_code_runs(packed, masked, tmp_path):
    tokens = torch.arange(9)[None]
    for name, model in (("packed", packed), ("masked", masked)):
        model.save_pretrained(tmp_path / name)
        expected = model(tokens).logits
        scope = {}
        codes = re.findall(r"```python\n(.*?)```", model_card(model, str(tmp_path / name)).text, re.DOTALL)
        exec(codes[0], scope)
        assert torch.equal(scope["model"](tokens).logits, expected)
        for code in codes[1:]:
            exec(code, scope)
    assert type(scope["model"].model.layers[0].mlp.up_proj).__name__ == "Sparse24Linear"


def test_bad_input_is_refused(packed, tiny_llama, masked):
    with pytest.raises(ValueError, match="no record of it"):
        model_card(tiny_llama.__class__(tiny_llama.config.__class__(num_hidden_layers=1, hidden_size=64)), "m")
    with pytest.raises(ValueError, match=r"must be the Hub id of the dense model.*\./dense"):
        model_card(packed, "m", base_model="./dense")
    with pytest.raises(ValueError, match="need their conditions"):
        model_card(packed, "m", benchmark=[row("dense-bf16", ms=1.0)])
    masked.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    with pytest.raises(ValueError, match="violating groups: 512"):
        model_card(masked, "m")


def test_the_command_writes_it_from_files(cli, tiny_llama_folder, tokenizer, text, tmp_path):  # noqa: F811
    packed = tmp_path / "packed"
    cli("prune", tiny_llama_folder, packed, "--method", "magnitude")
    _, out, _ = cli("evaluate", packed, "--text", text, "--dense", tiny_llama_folder, "--window", 16, "--json")
    (tmp_path / "quality.json").write_text(out)
    write_csv(tmp_path / "speed.csv", [row("dense-bf16", ms=2.0)], CONDITIONS)
    arguments = ("card", packed, "user/model", "--base-model", "org/dense", "--evaluation", tmp_path / "quality.json")
    code, out, err = cli(*arguments, "--benchmark", tmp_path / "speed.csv")
    assert code == 0, err
    card = ModelCard.load(packed / "README.md")
    assert card.data.eval_results[0].dataset_name == "text.txt"
    assert "recovery" in card.text
    assert "NVIDIA H100" in card.text
    before = (packed / "README.md").read_text()
    code, _, err = cli("card", packed, "user/model")
    assert code == 1
    assert "--force" in err
    assert (packed / "README.md").read_text() == before
    assert cli("card", packed, "user/model", "--force")[0] == 0
    assert "## Evaluation" not in (packed / "README.md").read_text()
    (tmp_path / "quality.json").write_text('{"metric": "perplexity"}')
    code, _, err = cli(*arguments, "--force")
    assert code == 1
    assert "An evaluation needs 'value'" in err
