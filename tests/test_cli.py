import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_sparse24 import Sparse24Linear, sparsity_report
from hf_sparse24.cli import main
from hf_sparse24.evaluation import held_out_tokens, perplexity
from tests import families


def run(*arguments, monkeypatch, capsys):
    """Run the command line in this process, as the console script does."""
    monkeypatch.setattr(sys, "argv", ["hf-sparse24", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr()
    return stopped.value.code or 0, output.out, output.err


@pytest.fixture
def cli(monkeypatch, capsys):
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def source(tiny_llama_folder):
    (tiny_llama_folder / "tokenizer.json").write_text("{}")
    return tiny_llama_folder


def test_prune_report_unpack(cli, source, tmp_path):
    code, out, _ = cli(
        "prune", source, tmp_path / "packed", "--method", "magnitude", "--quantization", "int8", "--json"
    )
    assert code == 0
    assert json.loads(out)["totals"]["matrices_2to4"] == 14
    assert (tmp_path / "packed" / "tokenizer.json").exists()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(packed.model.layers[0].mlp.up_proj, Sparse24Linear)

    code, out, _ = cli("report", tmp_path / "packed", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(sparsity_report(packed).to_json())
    code, out, _ = cli("report", tmp_path / "packed")
    assert "model.layers.*.mlp.up_proj" in out

    code, _, _ = cli("unpack", tmp_path / "packed", tmp_path / "unpacked")
    assert code == 0
    config = json.loads((tmp_path / "unpacked" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["sparse24"]["method"] == "magnitude"
    assert (tmp_path / "unpacked" / "tokenizer.json").exists()


def test_no_pack_and_exclusions(cli, source, tmp_path):
    code, out, _ = cli(
        "prune", source, tmp_path / "out", "--method", "magnitude", "--no-pack", "--modules-to-not-convert", "up_proj",
        "--modules-to-not-convert", "k_proj", "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows["model.layers.0.mlp.up_proj"]["reason"] == "modules_to_not_convert"
    assert rows["model.layers.0.mlp.down_proj"]["state"] == "pruned"
    assert rows["model.layers.0.mlp.down_proj"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "int4"], "quantization must be one of"),
        (["--target-modules", "up_porj"], "Near matches: up_proj"),
        (["--method", "sparsegpt"], "needs calibration data"),
        (["--quantization", "int8", "--no-pack"], "needs pack=True"),
        (["--match-blocks"], "match_blocks=True needs calibration data"),
        (["--dataset", "missing.txt"], "missing.txt"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_without_a_traceback_and_leaves_nothing(cli, source, tmp_path, arguments, message):
    out = tmp_path / "folder" / "out"
    code, _, err = cli("prune", source, out, *arguments)
    assert code == 1
    line = next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
    assert message in line
    assert "Traceback" not in err
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_an_existing_folder_is_not_overwritten(cli, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    code, _, err = cli("prune", source, out, "--method", "magnitude")
    assert code == 1
    assert "is not an empty folder; replace it with --force" in err
    assert (out / "precious").read_text() == "data"


def test_a_missing_model_is_one_line(cli, tmp_path):
    code, _, err = cli("report", tmp_path / "nothing")
    assert code == 1
    assert err.startswith("hf-sparse24: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "name", ["densse", "modles/dense", "models/densse", "a/b/c", "two words", "./densse", "/densse", "~/densse"]
)
def test_a_mistyped_folder_is_said_before_the_hub_is_waited_for(cli, source, monkeypatch, caplog, name):
    def ask(*arguments, **kwargs):
        raise OSError("the Hub was asked")

    (source.parent / "models").mkdir()
    (source.parent / "models" / "dense").mkdir()
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", ask)
    code, _, err = cli("report", name)
    assert code == 1
    if name in ("densse", "modles/dense"):  # a Hub id may look so
        near = "dense" if name == "densse" else "models/dense"
        assert caplog.messages == [f"There is no {name} (near: {near}) here; asking the Hub for it."]
        assert "the Hub was asked" in err
    else:
        assert err.splitlines()[-1].startswith(f"hf-sparse24: There is no {name}")
        assert (name == "models/densse") == ("(near: dense) in the folder models. Name one with a" in err)
        assert "the Hub was asked" not in err
    caplog.clear()
    cli("report", "user/name")
    assert not caplog.messages


def test_pruning_a_packed_model_says_so(cli, source, tmp_path):
    cli("prune", source, tmp_path / "packed", "--method", "magnitude")
    code, _, err = cli("prune", tmp_path / "packed", tmp_path / "again", "--quantization", "int8")
    assert code == 1
    assert "is quantized already (sparse24)" in err


def test_an_unknown_architecture_is_not_replaced(cli, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["MyLlama"]}))
    code, _, err = cli("prune", source, tmp_path / "out", "--method", "magnitude")
    assert code == 1
    assert "names the class 'MyLlama', which transformers lacks" in err


def test_unpacking_a_dense_model_says_so(cli, source, tmp_path):
    code, _, err = cli("unpack", source, tmp_path / "out")
    assert code == 1
    assert "nothing to unpack" in err


@pytest.fixture
def tokenizer(tiny_llama_folder):
    """A tokenizer of 90 words in the folder of the tiny model."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(90)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    fast.save_pretrained(tiny_llama_folder)
    return fast


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{(7 * line + word) % 90}" for word in range(20)) for line in range(100)))
    return path


def test_prune_on_a_text_file(cli, tiny_llama_folder, tokenizer, text, tmp_path):
    code, out, err = cli(
        "prune", tiny_llama_folder, tmp_path / "out", "--dataset", text, "--num-samples", 8, "--sequence-length", 16,
        "--no-match-blocks", "--device", "cpu", "--quantization", "int8", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["totals"]["matrices_2to4"] == 14
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["method"] == "alps"
    facts = described["produced_by"]["calibration"]
    assert (facts["dataset"], facts["num_samples"], facts["sequence_length"]) == (text.name, 8, 16)
    assert facts["matching"] is None
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_windows_are_as_long_as_the_context_where_nothing_was_asked(cli, tiny_llama, tokenizer, tmp_path):
    folder = tmp_path / "short"
    tiny_llama.config.max_position_embeddings = 24
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{7 * word % 90}" for word in range(500)))
    arguments = ("--dataset", text, "--num-samples", 8, "--device", "cpu", "--method", "wanda", "--no-pack")
    code, out, err = cli("prune", folder, tmp_path / "out", *arguments)
    assert code == 0, err
    assert "Calibrated on 8 windows of 24 tokens." in out
    code, out, err = cli("evaluate", tmp_path / "out", "--text", text, "--dense", folder, "--json")
    assert code == 0, err
    assert (json.loads(out)["samples"], json.loads(out)["unit"]) == (2, "windows of 24 tokens")
    code, _, err = cli("prune", folder, tmp_path / "again", *arguments, "--sequence-length", 25)
    assert code == 1
    assert "Sequences of 25 tokens were asked for; LlamaForCausalLM has a context of 24." in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "DENSE", "OUT", "--dataset", "missing.txt", "--sequence-length", 4096),
        ("evaluate", "DENSE", "--text", "missing.txt", "--window", 4096),
        ("evaluate", "DENSE", "--pairs", "missing.jsonl"),
        ("evaluate", "DENSE", "--text", "text.txt", "--dense", "./missing"),
    ],
)
def test_what_is_missing_is_said_before_a_weight_is_read(cli, source, text, monkeypatch, arguments):
    monkeypatch.chdir(text.parent)
    (source / "model.safetensors").write_bytes(b"")  # could not be read
    named = {"DENSE": source, "OUT": "out"}
    code, _, err = cli(*(named.get(argument, argument) for argument in arguments))
    assert code == 1
    assert "missing" in err.splitlines()[-1]


def test_prune_passes_what_was_asked_on(cli, tiny_llama_folder, tmp_path, monkeypatch):
    seen = []

    def load(name, dtype, **kwargs):
        seen.append(kwargs)
        raise ValueError("enough")

    monkeypatch.setattr("hf_sparse24.cli.load_model", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for arguments in (
        (),
        ("--match-blocks", "--no-distill", "--device", "cpu"),
        ("--no-match-blocks", "--distill", "--dataset", "self"),
    ):
        assert "enough" in cli("prune", tiny_llama_folder, tmp_path / "out", *arguments)[2]
    assert [kwargs["device_map"] for kwargs in seen] == ["cuda", "cpu", "cuda"]
    assert [kwargs["quantization_config"].match_blocks for kwargs in seen] == [None, True, False]
    assert [kwargs["quantization_config"].distill for kwargs in seen] == [None, False, True]
    assert [kwargs["quantization_config"].dataset for kwargs in seen] == [None, None, "self"]


def test_evaluate_says_in_a_sentence_that_the_tokenizer_is_missing(cli, tiny_llama_folder, text):
    code, _, err = cli("evaluate", tiny_llama_folder, "--text", text)
    assert code == 1
    line = next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
    assert f"{tiny_llama_folder} has none that transformers reads; save it there: AutoTokenizer" in line
    assert err.splitlines()[-1] == line


@pytest.fixture
def asked_of_prune(cli, source, tmp_path, monkeypatch):
    """Return the config that a command line makes, without any pruning."""

    def ask(*arguments):
        seen = []

        def load(name, dtype, **kwargs):
            seen.append(kwargs["quantization_config"])
            raise ValueError("enough")

        monkeypatch.setattr("hf_sparse24.cli.load_model", load)
        err = cli("prune", source, tmp_path / "out", *arguments)[2]
        return seen[0] if seen else err

    return ask


def test_every_setting_of_calibration_is_an_option(asked_of_prune):
    # What cannot be said on a command line, or belongs to what is loaded afterwards.
    without = {"quant_method", "format_version", "roles", "produced_by", "unknown_keys", "backend", "smooth"}
    default = vars(asked_of_prune())
    other = {
        "method": "wanda", "quantization": "int8", "dataset": "self", "tokenizer": "gpt2", "num_samples": 7,
        "sequence_length": 9, "batch_size": 2, "seed": 3, "dampening": 0.5, "calibration_device": "cpu",
        "progress_folder": "there",
    }  # fmt: skip
    said = [f"--{key.replace('_', '-')}={value}" for key, value in other.items()]
    switches = {"refit": False, "match_blocks": False, "distill": False}
    said += [f"--no-{key.replace('_', '-')}" for key in switches]
    found = vars(asked_of_prune(*said))
    assert {key: found[key] for key in other | switches} == other | switches
    assert default.keys() - without == other.keys() | switches.keys() | {
        "pack", "target_modules", "modules_to_not_convert"
    }  # fmt: skip
    assert asked_of_prune("--no-pack").pack is False


def test_several_datasets_are_a_mixture(asked_of_prune, tmp_path, monkeypatch):
    def dataset(*sources):
        return asked_of_prune(*(part for source in sources for part in ("--dataset", source))).dataset

    assert dataset("news.txt=2", "a/b:en", "self=.5") == [("news.txt", 2), ("a/b:en", 1), ("self", 0.5)]
    assert dataset("news.txt=2") == "news.txt"
    (tmp_path / "a=1").write_text("")
    monkeypatch.chdir(tmp_path)
    assert dataset("a=1") == "a=1"
    assert dataset("a=1=3", "self") == [("a=1", 3), ("self", 1)]
    message = "--dataset takes SOURCE or SOURCE=WEIGHT, such as news.txt=2; got 'news.txt=two'."
    assert message in asked_of_prune("--dataset", "news.txt=two")


def test_prune_on_a_mixture(cli, tiny_llama_folder, tokenizer, text, tmp_path):
    code, _, err = cli(
        "prune", tiny_llama_folder, tmp_path / "out", "--dataset", f"{text}=3", "--dataset", "self",
        "--num-samples", 8, "--sequence-length", 16, "--batch-size", 3, "--no-match-blocks", "--device", "cpu",
        "--method", "wanda",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["produced_by"]
    assert facts["calibration"]["dataset"] == [[text.name, 3], ["self", 1]]


def test_evaluate_measures_the_held_out_text(cli, tiny_llama_folder, tiny_llama, tokenizer, text):
    code, out, _ = cli("evaluate", tiny_llama_folder, "--text", text, "--window", 16, "--windows", 4, "--json")
    assert code == 0
    found = json.loads(out)
    token_ids = held_out_tokens(tokenizer, text.read_text(), window=16, windows=4)
    assert found["value"] == pytest.approx(perplexity(tiny_llama, token_ids, window=16), rel=1e-5)
    assert (found["samples"], found["unit"]) == (4, "windows of 16 tokens")
    assert (found["dense"], found["recovery"]) == (None, None)


def test_evaluate_scores_the_rows_that_are_held_out(cli, tiny_llama_folder, tiny_llama, tokenizer, datasets, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [" ".join(f"w{(7 * line + word) % 90}" for word in range(20)) for line in range(50)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    code, out, err = cli("evaluate", tiny_llama_folder, "--text", path, "--window", 16, "--json")
    assert code == 0, err
    token_ids = torch.tensor(tokenizer(" ".join(lines[45:]))["input_ids"])
    assert json.loads(out)["value"] == pytest.approx(perplexity(tiny_llama, token_ids, window=16), rel=1e-5)
    assert json.loads(out)["samples"] == 6


def test_evaluate_compares_a_packed_model_with_the_dense_one(cli, tiny_llama_folder, tokenizer, text, tmp_path):
    cli("prune", tiny_llama_folder, tmp_path / "packed", "--method", "magnitude", "--quantization", "int8")
    arguments = ("--text", text, "--dense", tiny_llama_folder, "--window", 16)
    code, out, _ = cli("evaluate", tmp_path / "packed", *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["dense"] != found["value"]
    assert found["recovery"] == pytest.approx(100 * found["dense"] / found["value"])
    assert found["samples"] < 32  # as many as there are

    code, out, _ = cli("evaluate", tmp_path / "packed", *arguments)
    assert code == 0
    assert f"{found['value']:.4f}" in out
    assert f"{found['dense']:.4f}" in out
    assert f"{found['recovery']:.1f} %" in out
    assert max(map(len, out.splitlines())) <= 100


def test_evaluate_names_what_measures_other_models(cli, text, tmp_path):
    families.build("bert_mlm").save_pretrained(tmp_path / "bert")
    code, _, err = cli("evaluate", tmp_path / "bert", "--text", text)
    assert code == 1
    line = next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
    assert "BertForMaskedLM" in line
    assert "retrieval_recall" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "1000"], "less than one window of 1000"),
        (["--window", "4096"], "less than one window of 4096"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_evaluate_refuses_bad_input_in_one_line(cli, tiny_llama_folder, tokenizer, text, arguments, message):
    code, _, err = cli("evaluate", tiny_llama_folder, "--text", text, "--window", 16, *arguments)
    assert code == 1
    assert message in next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
    assert "Traceback" not in err


def test_evaluate_refuses_a_missing_text_and_a_missing_gpu(cli, tiny_llama_folder, tokenizer, text, monkeypatch):
    code, _, err = cli("evaluate", tiny_llama_folder, "--text", text.with_name("missing.txt"))
    assert code == 1
    assert "missing.txt" in err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = cli("evaluate", tiny_llama_folder, "--text", text, "--device", "cuda")
    assert code == 1
    assert "torch sees no CUDA device" in err


def test_env(cli):
    code, out, _ = cli("env")
    assert code == 0
    assert "backend reference    yes" in out
    code, out, _ = cli("env", "--json")
    assert json.loads(out)["transformers"]


def test_help_has_examples(cli):
    for command in ("prune", "report", "unpack", "evaluate"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert f"hf-sparse24 {command}" in out


def test_an_unknown_option_exits_with_two(cli, source):
    assert cli("report", source, "--nonsense")[0] == 2


def test_the_console_script_is_installed():
    script = subprocess.run(
        [sys.executable, "-c", "from hf_sparse24.cli import main; main()", "--help"], capture_output=True, text=True
    )
    assert script.returncode == 0
    assert "prune" in script.stdout


def test_force_replaces_a_model_and_nothing_else(cli, source, tmp_path):
    out = tmp_path / "out"
    cli("prune", source, out, "--method", "magnitude", "--quantization", "int8")
    (out / "old").write_text("")
    code, _, err = cli("prune", source, out, "--method", "magnitude", "--no-pack", "--force")
    assert code == 0, err
    assert not (out / "old").exists()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("data")
    code, _, err = cli("prune", source, tmp_path / "home", "--method", "magnitude", "--force")
    assert code == 1
    assert "holds no config.json" in err
    assert (tmp_path / "home" / "precious").exists()
    code, _, err = cli("prune", source, source, "--method", "magnitude", "--force")
    assert code == 1
    assert "is the model that is read" in err
    assert (source / "model.safetensors").exists()


def test_a_failure_keeps_what_force_would_have_replaced(cli, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    cli("prune", source, out, "--method", "magnitude")
    before = (out / "model.safetensors").read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sparse24.folders._rename", interrupted)
    cli("prune", source, out, "--method", "magnitude", "--no-pack", "--force")
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


INTERRUPTED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had ignored
from transformers import PreTrainedModel
from hf_sparse24.cli import main

saved = PreTrainedModel.save_pretrained

def save_slowly(self, folder, **kwargs):
    saved(self, folder, **kwargs)
    print("half-way", flush=True)
    import time
    time.sleep(60)

PreTrainedModel.save_pretrained = save_slowly
main()
"""


def test_an_interrupt_leaves_no_folder(source, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, "prune", source, tmp_path / "a" / "out", "--method", "magnitude"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "half-way" in process.stdout.readline()
    assert len(list((tmp_path / "a").iterdir())) == 1  # the temporary folder
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"hf-sparse24: interrupted; nothing was written to {tmp_path / 'a' / 'out'}."
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("keeps", [True, False])
def test_an_interrupted_walk_says_what_is_kept(cli, tiny_llama_folder, tmp_path, monkeypatch, caplog, keeps):
    def interrupted(*arguments, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "blocks"
    monkeypatch.setattr("hf_sparse24.calibration.pruner.solve", interrupted)
    code, _, err = cli(
        "prune", tiny_llama_folder, tmp_path / "out", "--dataset", "self", "--num-samples", 4, "--sequence-length", 8,
        "--device", "cpu", *(("--progress-folder", folder) if keeps else ()),
    )  # fmt: skip
    assert code == 130
    assert err.splitlines()[-1] == f"hf-sparse24: interrupted; nothing was written to {tmp_path / 'out'}."
    assert not (tmp_path / "out").exists()
    kept = f"kept in {folder}; the same call" if keeps else "lost; with progress_folder (--progress-folder) the"
    assert f"in model.layers.0 (KeyboardInterrupt) with 0 of 2 blocks finished, which are {kept}" in caplog.text


def test_the_card_of_the_dense_model_is_not_the_pruned_ones(cli, source, tmp_path):
    (source / "README.md").write_text("the dense model")
    cli("prune", source, tmp_path / "out", "--method", "magnitude")
    assert not (tmp_path / "out" / "README.md").exists()


def test_help_teaches_the_work_in_its_order(cli):
    code, out, _ = cli("--help")
    assert code == 0
    lines = [line for line in out.splitlines() if re.match(r" \d\. ", line)]
    words = ["prune", "retrain", "prune", "evaluate", "bench", "card", "push"]
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
    assert len(out.splitlines()) <= 60
    listed = [word for word in re.findall(r"│ (\w+) ", out) if word in words]
    assert listed == ["prune", "evaluate", "card", "push", "bench"]  # typer lists groups of commands last
