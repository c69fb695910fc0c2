"""Tasks of lm-eval, offline, on a few lines of its own: what it scores is compared with log-likelihoods by hand."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_sparse24.evaluation import check_tasks, evaluate_tasks
from hf_sparse24.evaluation.harness import _evaluations
from tests import families
from tests.test_cli import cli  # noqa: F401

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENTS = [
    {"question": f"w{5 * n + 3} w{n + 7}", "choices": [f"w{n + 20}", f"w{3 * n + 2}"], "answer": n % 2}
    for n in range(24)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tiny_llama_folder):
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0")
    fast.save_pretrained(tiny_llama_folder)
    return fast


@pytest.fixture
def task(tmp_path):
    """Write a task of 24 questions with two answers; return its YAML file."""

    def write(name):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
        path = tmp_path / f"{name}.yaml"
        path.write_text(TASK.format(name=name, data=data))
        return str(path)

    return write


def accuracy(model, tokenizer, documents):
    """Count the questions whose right answer is the likelier one."""
    right = 0
    for document in documents:
        ids = torch.tensor([tokenizer(document["question"])["input_ids"]])
        with torch.inference_mode():
            logits = model(ids).logits[0, -1]
        answers = [logits[tokenizer(choice)["input_ids"][0]] for choice in document["choices"]]
        right += int(max(range(2), key=answers.__getitem__) == document["answer"])
    return right / len(documents)


def test_the_accuracy_is_that_of_the_likelier_answer(tiny_llama, tokenizer, task):
    (found,) = evaluate_tasks(tiny_llama, tokenizer, [task("choice")], batch_size=5)
    assert (found.metric, found.better, found.dataset, found.dense) == ("acc", "higher", "choice", None)
    assert found.value == pytest.approx(accuracy(tiny_llama, tokenizer, DOCUMENTS))
    assert 0 < found.value < 1
    # of a mean of zeros and ones, the sample's
    assert found.stderr == pytest.approx((found.value * (1 - found.value) / 23) ** 0.5)
    assert found.measured_on.startswith("choice, 24 documents, 0-shot, lm-eval 0.4")


def test_a_limit_is_said(tiny_llama, tokenizer, task):
    (found,) = evaluate_tasks(tiny_llama, tokenizer, [task("choice")], limit=7)
    assert found.value == pytest.approx(accuracy(tiny_llama, tokenizer, DOCUMENTS[:7]))
    assert found.measured_on.startswith("choice, 7 of 24 documents, ")


def test_the_command_compares_with_the_dense_model_and_the_card_takes_it(
    cli,  # noqa: F811
    tiny_llama_folder,
    tiny_llama,
    tokenizer,
    task,
    tmp_path,
):
    packed = tmp_path / "packed"
    cli("prune", tiny_llama_folder, packed, "--method", "magnitude", "--quantization", "int8")
    tasks = f"{task('first')},{task('second')}"
    arguments = ("evaluate", packed, "--tasks", tasks, "--limit", 20, "--dense", tiny_llama_folder)
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert [figure["dataset"] for figure in figures] == ["first", "second"]
    model = AutoModelForCausalLM.from_pretrained(packed)
    for figure in figures:
        assert figure["value"] == pytest.approx(accuracy(model, tokenizer, DOCUMENTS[:20]))
        assert figure["dense"] == pytest.approx(accuracy(tiny_llama, tokenizer, DOCUMENTS[:20]))
        assert figure["recovery"] == pytest.approx(100 * figure["value"] / figure["dense"])

    (tmp_path / "quality.json").write_text(out)
    code, _, err = cli("card", packed, "user/model", "--evaluation", tmp_path / "quality.json")
    assert code == 0, err
    card = ModelCard.load(packed / "README.md")
    assert [result.dataset_name for result in card.data.eval_results] == ["first", "second"]
    first = figures[0]
    line = next(
        line for line in card.text.splitlines() if line.startswith("| Acc (higher is better) | first, 20 of 24")
    )
    assert line.endswith(
        f"| {first['dense']:.4g} | {first['value']:.4g} ± {first['stderr']:.2g} | {first['recovery']:.1f} % |"
    )
    code, out, _ = cli(*arguments)
    assert f"{first['value']:.4f} ± {first['stderr']:.4f}" in out
    assert f"{first['recovery']:.1f} %" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_text_and_tasks_in_one_run(cli, tiny_llama_folder, tokenizer, task, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * 7 % 90}" for number in range(900)))
    code, out, err = cli(
        "evaluate", tiny_llama_folder, "--text", text, "--window", 16, "--tasks", task("choice"), "--json"
    )
    assert code == 0, err
    assert [figure["metric"] for figure in json.loads(out)] == ["perplexity", "acc"]


def test_unknown_tasks_are_named_before_anything_is_loaded(cli, tiny_llama_folder):  # noqa: F811
    (tiny_llama_folder / "model.safetensors").write_bytes(b"")  # could not be read
    code, _, err = cli("evaluate", tiny_llama_folder, "--tasks", "arc_esay")
    assert code == 1
    line = next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
    assert "has no task 'arc_esay'" in line
    assert "arc_easy" in line
    with pytest.raises(ValueError, match="There is no task to measure"):
        check_tasks([])


def test_what_cannot_be_measured_is_refused(cli, tiny_llama, tiny_llama_folder, tokenizer, task):  # noqa: F811
    with pytest.raises(ValueError, match="BertForMaskedLM does not"):
        evaluate_tasks(families.build("bert_mlm"), tokenizer, [task("choice")])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="this one has neither"):
        evaluate_tasks(tiny_llama, tokenizer, [task("choice")])
    code, _, err = cli("evaluate", tiny_llama_folder)
    assert code == 1
    assert "give --text FILE or --tasks" in err


def test_without_lm_eval_it_says_what_to_install(cli, tiny_llama_folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = cli("evaluate", tiny_llama_folder, "--tasks", "arc_easy")
    assert code == 1
    assert err.endswith("hf-sparse24: Tasks need lm-eval; install it: pip install 'hf_sparse24[eval]'\n")


def test_a_group_that_averages_stands_for_its_tasks_and_filters_keep_their_names():
    """The form is that of lm-eval 0.4.13 for mmlu, gsm8k and a tag."""
    counts = {"original": 100, "effective": 10}
    results = {
        "results": {
            "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.01, "alias": "mmlu", "sample_len": 20},
            "mmlu_stem": {"acc,none": 0.2, "acc_stderr,none": "N/A", "alias": " - stem"},
            "mmlu_physics": {"acc,none": 0.2, "acc_stderr,none": 0.02},
            "mmlu_law": {"acc,none": 0.4, "acc_stderr,none": 0.02},
            "gsm8k": {
                "exact_match,strict-match": 0.5,
                "exact_match_stderr,strict-match": float("nan"),
                "odd,none": 1.0,
            },
            "loose": {"alias": "loose"},
            "part": {"word_perplexity,none": 9.0},
        },
        "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_law"], "mmlu_stem": ["mmlu_physics"], "loose": ["part"]},
        "n-samples": dict.fromkeys(("mmlu_physics", "mmlu_law", "gsm8k", "part"), counts),
        "n-shot": {"mmlu_physics": 5, "mmlu_law": 5, "gsm8k": 8, "part": 0},
        "higher_is_better": {
            "mmlu": {"acc": True},
            "gsm8k": {"exact_match": True},
            "part": {"word_perplexity": False},
        },
        "lm_eval_version": "0.4.13",
    }
    found = {(figure.dataset, figure.metric): figure for figure in _evaluations(results)}
    assert found.keys() == {("mmlu", "acc"), ("gsm8k", "exact_match,strict-match"), ("part", "word_perplexity")}
    assert found["mmlu", "acc"].measured_on == "mmlu, 20 of 200 documents, 5-shot, lm-eval 0.4.13"
    assert found["gsm8k", "exact_match,strict-match"].stderr is None
    assert found["part", "word_perplexity"].better == "lower"
