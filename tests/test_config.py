import json

import pytest

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
        1024,
        8,
        0,
        0.01,
    )


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"quantization": "int8", "modules_to_not_convert": ["down_proj"]},
        {"pack": False, "target_modules": r".*q_proj", "seed": 7},
        {"method": "sparsegpt", "dataset": "wikitext", "tokenizer": "gpt2", "dampening": 0.1, "refit": True},
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
    record = config.record("wanda", ["q"])
    assert record["calibration"]["dataset"] == "list of 2 items"
    assert record["calibration"]["tokenizer"] == "my/tokenizer"
    assert record["versions"]["hf_sparse24"] == __version__
    json.dumps(record)


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
    "no data": ({"method": "alps"}, "method='alps' needs calibration data"),
    "data for magnitude": ({"method": "magnitude", "dataset": "c4"}, "uses no calibration data"),
    "refit without data": ({"refit": True}, "refit=True needs calibration data"),
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
