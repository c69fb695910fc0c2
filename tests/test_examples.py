"""The examples that need no training run on a tiny model, as a user would start them."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse24 import Sparse24Linear
from hf_sparse24.cli import main
from tests.training.test_examples import EXAMPLES, run, save_tokenizer


@pytest.fixture
def folder(tiny_llama_folder):
    save_tokenizer(tiny_llama_folder)
    return tiny_llama_folder


@pytest.fixture
def text(tmp_path):
    numbers = torch.randint(3, 96, (120, 20)).tolist()
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{number}" for number in line) for line in numbers))
    return path


def test_quickstart(folder, tmp_path):
    output = run("quickstart.py", folder, tmp_path / "out")
    assert "2:4: 14 of 15 matrices" in output
    assert "logits equal to the last bit" in output
    assert isinstance(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj, Sparse24Linear
    )


def test_prune_with_calibration(folder, text, tmp_path):
    out = tmp_path / "out"
    output = run("prune_with_calibration.py", folder, out, text, "--num_samples", 8, "--sequence_length", 16)
    assert "perplexity" in output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["method"], config["quantization"]) == ("alps", "int8")
    found = json.loads((out / "quality.json").read_text())
    assert found["dense"] != found["value"]
    assert found["dataset"] == "text.txt"


def test_serve_generate(folder, tmp_path):
    run("quickstart.py", folder, tmp_path / "packed")
    options = ("--prompt_tokens", 8, "--new_tokens", 4, "--repeats", 1, "--no_compile")
    output = run("serve_generate.py", folder, tmp_path / "packed", *options)
    rates = dict(re.findall(r"(\w+): +([\d.]+) tokens/s", output))
    assert rates.keys() == {"dense", "packed"}
    assert all(float(rate) > 0 for rate in rates.values())


def test_the_export_that_is_described(folder, tmp_path, monkeypatch):
    run("quickstart.py", folder, tmp_path / "packed")
    command = re.search(r"^hf-sparse24 (.*)$", (EXAMPLES / "export_for_vllm.md").read_text(), re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").rename(tmp_path / "source")
    monkeypatch.setattr("sys.argv", ["hf-sparse24", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    tokens = torch.arange(9)[None]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(dense(tokens).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(tokens).logits)
