"""The examples run: a few steps on a tiny model, in a process of their own, as a user would start them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast

from hf_sparse24 import Sparse24Callback, Sparse24Config, prune_, sparsity_report

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMON = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}


def save_tokenizer(folder):
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2").save_pretrained(
        folder
    )


@pytest.fixture
def folder(tiny_llama_folder):
    save_tokenizer(tiny_llama_folder)
    return tiny_llama_folder


@pytest.fixture
def text(tmp_path):
    numbers = torch.randint(3, 96, (40, 20)).tolist()
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(f"w{number}" for number in line) for line in numbers))
    return path


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def flags(**kwargs):
    return [part for key, value in (COMMON | kwargs).items() for part in (f"--{key}", value)]


def test_a_language_model_by_yaml_and_again(folder, text, tmp_path):
    request = yaml.safe_load((EXAMPLES / "retrain_lm.yaml").read_text())
    request |= {**COMMON, "model_name_or_path": str(folder), "train_file": str(text), "sequence_length": 16}
    request |= {"output_dir": str(tmp_path / "out"), "save_steps": 1, "bf16": False, "method": "magnitude"}
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(request))
    output = run("retrain_lm.py", tmp_path / "request.yaml")
    assert "perplexity of the held-out text" in output
    assert "2:4: 14 of 15 matrices" in output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sparsity_report(model).totals["violating_groups"] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "- '2:4'" in card or "- 2:4" in card
    assert "14 of 15 matrices hold at most two nonzeros" in card
    assert "Divergence from the teacher" in card
    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert "distill_logit_loss" in history[0]
    (tmp_path / "request.yaml").write_text(yaml.safe_dump({**request, "max_steps": 3}))
    assert "'epoch'" in run("retrain_lm.py", tmp_path / "request.yaml")
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_an_encoder(text, tmp_path):
    folder = tmp_path / "bert"
    BertModel(
        BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    ).save_pretrained(folder)
    save_tokenizer(folder)
    arguments = flags(model_name_or_path=folder, train_file=text, output_dir=tmp_path / "out", method="magnitude")
    output = run("retrain_encoder.py", *arguments, "--calibration_texts", 32)
    assert "cosine to the dense encoder" in output
    assert sparsity_report(AutoModel.from_pretrained(tmp_path / "out")).totals["violating_groups"] == 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("extra", [[], ["--lora_rank", 4], ["--teacher_model"]], ids=["full", "lora", "distilled"])
def test_instructions_with_trl(extra, folder, tiny_llama, tmp_path):
    prune_(tiny_llama, Sparse24Config(method="magnitude"))
    pruned = tmp_path / "pruned"
    tiny_llama.save_pretrained(pruned)
    save_tokenizer(pruned)
    rows = [{"prompt": f"w{number} w4 w5", "completion": f" w6 w{number + 1}"} for number in range(10, 30)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extra = [*extra, folder] if extra == ["--teacher_model"] else extra
    arguments = flags(model_name_or_path=pruned, train_file=tmp_path / "data.jsonl", output_dir=tmp_path / "out")
    output = run("sft_trl.py", *arguments, *extra, "--bf16", "False")
    assert "violating groups: 0" in output
    assert "sparse24_violations" in output
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sparsity_report(trained).totals["matrices_2to4"] == 14
    weights = tiny_llama.state_dict()
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_with_the_callback_alone(tiny_llama, tmp_path):
    import datasets
    from trl import SFTConfig, SFTTrainer

    prune_(tiny_llama, Sparse24Config(method="magnitude"))
    save_tokenizer(tmp_path)
    trainer = SFTTrainer(
        model=tiny_llama,
        args=SFTConfig(str(tmp_path / "out"), bf16=False, save_strategy="no", disable_tqdm=True, **COMMON),
        train_dataset=datasets.Dataset.from_dict({"text": [f"w{number} w4 w5 w6" for number in range(10, 30)]}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path),
        callbacks=[Sparse24Callback()],
    )
    trainer.train()
    assert sparsity_report(tiny_llama).totals["violating_groups"] == 0
    assert trainer.state.log_history[0]["sparse24_violations"] == 0
