import copy
import json
from pathlib import Path

import pytest
import torch

from hf_sparse24 import Sparse24Config
from hf_sparse24.config import QUANT_METHOD
from hf_sparse24.packing import FORMAT_VERSION
from hf_sparse24.version import __version__

RECORD = {"method": "magnitude", "seed": 3, "roles": ["q", "k"], "versions": {"hf_sparse24": "9.9"}}


def test_defaults_are_those_of_the_documentation():
    config = Sparse24Config()
    assert (config.method, config.refit, config.quantization, config.pack, config.backend) == (
        "auto",
        None,
        None,
        True,
        "auto",
    )
    assert (config.num_samples, config.sequence_length, config.batch_size, config.seed, config.dampening) == (
        128,
        None,
        8,
        0,
        0.01,
    )


def test_a_deep_copy_shares_dataset_and_tokenizer_and_nothing_else():
    class Tokenizer:
        pass

    config = Sparse24Config(
        dataset=(batch for batch in [torch.zeros(1)]), tokenizer=Tokenizer(), modules_to_not_convert=["up_proj"]
    )
    copied = copy.deepcopy(config)
    assert copied.dataset is config.dataset
    assert copied.tokenizer is config.tokenizer
    assert copied.to_dict() == config.to_dict()
    copied.modules_to_not_convert.append("q_proj")
    copied.seed = 1
    assert (config.modules_to_not_convert, config.seed) == (["up_proj"], 0)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"quantization": "int8", "modules_to_not_convert": ["down_proj"]},
        {"pack": False, "target_modules": r".*q_proj", "seed": 7},
        {"method": "sparsegpt", "dataset": "wikitext", "tokenizer": "gpt2", "dampening": 0.1, "refit": True},
        {"method": "magnitude", "dataset": "wikitext", "refit": "symmetric"},
        {"match_blocks": False, "distill": True, "calibration_device": "cuda:1", "progress_folder": "blocks"},
        {"method": "alps"},  # the data may come later, as calibration=... of prune_
    ],
)
def test_a_request_survives_json(request_):
    config = Sparse24Config(**request_)
    again = Sparse24Config.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert all(getattr(again, key) == value for key, value in request_.items())


def test_a_described_checkpoint_survives_json_with_keys_it_does_not_know():
    config = Sparse24Config.of_checkpoint(RECORD | {"modules_to_not_convert": ["lm_head"]}, "int8")
    text = json.loads(config.to_json_string()) | {"from_the_future": {"a": 1}}
    again = Sparse24Config.from_dict(text)
    assert again.to_dict() == text
    assert again.to_dict()["format_version"] == FORMAT_VERSION
    assert again.record() == RECORD | {"modules_to_not_convert": ["lm_head"]}


def test_a_newer_method_does_not_stop_an_older_package_from_reading():
    assert Sparse24Config.of_checkpoint(RECORD | {"method": "invented-in-2028"}, None).method == "invented-in-2028"


def test_objects_never_end_in_the_file():
    class Tokenizer:
        name_or_path = "my/tokenizer"

    config = Sparse24Config(method="wanda", dataset=["one", "two"], tokenizer=Tokenizer())
    assert config.to_dict()["dataset"] == "list of 2 items"
    assert config.to_dict()["tokenizer"] == "my/tokenizer"
    assert Sparse24Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    record = config.record("wanda", ["q"], config.describe_data())
    assert record["calibration"]["dataset"] == "list of 2 items"
    assert record["calibration"]["tokenizer"] == "my/tokenizer"
    assert record["versions"]["hf_sparse24"] == __version__
    assert json.loads(json.dumps(record)) == record
    assert config.describe_data([torch.zeros(1)])["dataset"] == "list of 1 items"
    assert config.describe_data([("self", 2), ("book.txt", 1)])["dataset"] == [["self", 2], ["book.txt", 1]]
    assert "calibration" not in config.record("wanda", ["q"])


def test_a_folder_may_be_a_path_and_is_recorded_as_text():
    config = Sparse24Config(progress_folder=Path("some") / "where")
    assert config.to_dict()["progress_folder"] == str(Path("some/where"))
    json.dumps(config.to_dict())


def test_what_is_left_open_is_none():
    config = Sparse24Config()
    assert (config.match_blocks, config.distill, config.calibration_device, config.progress_folder) == (None,) * 4


def test_the_callers_lists_are_copied():
    names = ["down_proj"]
    config = Sparse24Config(modules_to_not_convert=names)
    names.append("up_proj")
    assert config.modules_to_not_convert == ["down_proj"]


BAD = {
    "method": ({"method": "wandaa"}, "method must be one of .* got 'wandaa'"),
    "quantization": ({"quantization": "int4"}, "quantization must be one of None, 'int8', 'fp8'; got 'int4'"),
    "backend": ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
    "pack": ({"pack": 1}, "pack must be one of True, False; got 1"),
    "refit": ({"refit": "yes"}, "refit must be one of None, True, False"),
    "samples": ({"num_samples": 0}, "num_samples must be an integer of at least 1; got 0"),
    "length": ({"sequence_length": 2.5}, "sequence_length must be an integer"),
    "batch": ({"batch_size": True}, "batch_size must be an integer"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0"),
    "dampening": ({"dampening": 0}, "dampening must be a positive number"),
    "targets": ({"target_modules": []}, "target_modules must be a non-empty list"),
    "regex": ({"target_modules": "(q_proj"}, "not a regular expression"),
    "names": ({"modules_to_not_convert": "down_proj"}, "modules_to_not_convert must be a non-empty list"),
    "name types": ({"modules_to_not_convert": [1]}, "non-empty list of module names"),
    "quantization without packing": ({"quantization": "int8", "pack": False}, "needs pack=True"),
    "refit by name": ({"refit": "both"}, "refit must be one of None, True, False, 'symmetric', 'asymmetric'"),
    "matching": ({"match_blocks": "yes"}, "match_blocks must be one of None, True, False; got 'yes'"),
    "distilling": ({"distill": 1}, "distill must be one of None, True, False; got 1"),
    "device": ({"calibration_device": "gpu"}, "calibration_device must be a device such as 'cuda' .* got 'gpu'"),
    "another quantizer": ({"quant_method": "gptq"}, "needs quant_method 'sparse24'; got 'gptq'"),
    "another format": ({"format_version": 2}, "has packed format 2; .* reads format 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_refused_in_one_sentence(kind):
    kwargs, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as error:
        Sparse24Config(**kwargs)
    assert "\n" not in str(error.value)


def test_a_misspelt_argument_is_refused_with_the_right_one():
    with pytest.raises(TypeError, match=r"unknown argument 'quantisation'; did you mean 'quantization'\?"):
        Sparse24Config(quantisation="int8")


def test_quant_method_is_a_plain_string():
    assert Sparse24Config().to_dict()["quant_method"] == QUANT_METHOD == "sparse24"
