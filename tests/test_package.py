"""What holds for the package as a whole."""

import ast
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_sparse24
from hf_sparse24 import capability, torchao_import

PACKAGE = Path(hf_sparse24.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_everything_named_public_is_there():
    assert all(hasattr(hf_sparse24, name) for name in hf_sparse24.__all__)
    assert hf_sparse24.__all__ == sorted(hf_sparse24.__all__)


PACKAGE_WITHOUT = "import sys; sys.modules[{!r}] = None; import hf_sparse24, hf_sparse24.cli"
TRAINING_WITHOUT = (
    "from transformers import Trainer; import sys; sys.modules[{!r}] = None; from hf_sparse24 import Sparse24Trainer"
)
IMPORTS = {
    **{f"package without {name}": PACKAGE_WITHOUT.format(name) for name in ("datasets", "torchao", "nvmath", "cuda")},
    **{f"training without {name}": TRAINING_WITHOUT.format(name) for name in ("datasets", "trl")},
    "package without the trainer": "import sys, hf_sparse24; assert 'transformers.trainer' not in sys.modules",
    "nothing of this": "import no_such_module",
}

# Each in a copy of a process that has torch and transformers, which have then found what they look for themselves.
FORKING = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoModel, LlamaForCausalLM

assert not [name for name in sys.modules if name.startswith("hf_sparse24")]
failed = {}
for name, code in json.loads(sys.argv[1]).items():
    reading, writing = os.pipe()
    if not os.fork():
        error = ""
        try:
            exec(code, {})
        except BaseException:
            error = traceback.format_exc()
        os.write(writing, error.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        failed[name] = told.read()
    os.wait()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed_imports():
    command = [sys.executable, "-c", FORKING, json.dumps(IMPORTS)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


@pytest.mark.parametrize("what", list(IMPORTS)[:-1])
def test_the_package_imports_without_what_it_uses_rarely(failed_imports, what):
    assert failed_imports[what] == ""


def test_an_import_that_fails_is_noticed(failed_imports):
    assert "No module named 'no_such_module'" in failed_imports["nothing of this"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="with CUDA a library that does not load is news")
def test_importing_the_package_prints_nothing():
    """torchao, which transformers imports, would print of each library for GPUs that it cannot load."""
    code = "from transformers import AutoModelForCausalLM; import hf_sparse24.cli, sys"
    if importlib.util.find_spec("torchao"):
        code += "; assert 'torchao' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_only_the_lines_that_say_nothing_are_held_back(caplog, monkeypatch):
    def said(name, message, *arguments):
        caplog.clear()
        with torchao_import.without_noise():
            logging.getLogger(name).warning(message, *arguments)
        return caplog.messages

    failed = "Failed to load /lib/torchao/_C_cutlass_90a.abi3.so: no such symbol"
    enumerated = "%s is an Enum subclass and is now natively supported by torch.compile"
    theirs = type("Preference", (), {"__module__": "torchao.quantization"})
    monkeypatch.setattr("torch.version.cuda", None)
    assert said("torchao", failed) == []
    assert said("torch.utils._pytree", enumerated, theirs) == []
    assert len(said("torchao", "Skipping import of cpp extensions due to incompatible torch version.")) == 1
    assert len(said("torch.utils._pytree", enumerated, Path)) == 1
    assert len(said("torch.utils._pytree", "another %s", theirs)) == 1
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert said("torchao", failed) == [failed]
    logging.getLogger("torchao").warning(failed)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short_and_check_their_input_with_errors(path):
    source = path.read_text(encoding="utf8")
    assert source.count("\n") <= 350
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_a_backend_that_is_asked_for_and_missing_is_an_error():
    capability.check_backend("auto")
    capability.check_backend("reference")
    for backend in ("cusparselt", "cutlass", "nvrtc"):
        answer = capability.backend_capability(backend)
        if answer.ok:
            continue
        with pytest.raises(ValueError, match="cannot run here") as error:
            capability.check_backend(backend)
        assert answer.reason in str(error.value)
    with pytest.raises(ValueError, match="backend must be one of"):
        capability.check_backend("cuda")


def test_torchao_whose_library_does_not_load_has_no_kernel(monkeypatch):
    """Beside a CPU build of torch torchao imports, declares its operators, and has no kernel for a GPU."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    if torch.version.cuda is not None:
        pytest.skip("a CPU build of torch is needed")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for cached in (capability.backend_capability, capability.gpu_capability):
        monkeypatch.setattr(capability, cached.__name__, cached.__wrapped__)
    assert hasattr(torch.ops.torchao, "rowwise_scaled_linear_sparse_cutlass_f8f8")
    assert capability.backend_capability("cutlass") == (
        False,
        "torchao has no FP8 2:4 kernel here: one before 0.18, or built for another torch or CUDA",
    )
    monkeypatch.setattr("torch._C._dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "CUDA")
    assert capability.backend_capability("cutlass").ok


def test_the_environment_names_versions_and_backends():
    facts = capability.environment()
    assert facts["hf_sparse24"] == hf_sparse24.__version__
    assert {f"backend {name}" for name in capability.BACKENDS} <= facts.keys()
