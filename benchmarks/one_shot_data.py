"""Four models and their data for the one-shot benchmark, on a machine that may have no network.

`fetch_models.py` and then `one_shot_bundles.py` make a *bundle* of each, a folder `.models/NAME` with `model/` and
`data.safetensors`. It holds tokens, features and pixels, so that `load` needs no tokenizers, audio or image libraries:
torch, transformers and safetensors do, and once, for SmolLM2, gguf, whose wheel is in the bundle.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_sparse24 import evaluation

MODELS = Path(__file__).parent.parent / ".models"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 1024
Batch = dict[str, Tensor]


def load(name: str, root: Path = MODELS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return what a benchmark of one model needs.

    Args:
        name (`str`): "smollm2", "minilm", "whisper" or "dinov2".
        root (`Path`): the folder that holds the bundles.
        dtype (`torch.dtype`): of the model and of its float inputs.

    Returns:
        `dict`: "model", a function that returns the dense model, new on every call, on the CPU; "calibration", a dict
        of lists of batches, the usual one first; "evaluations", a dict of functions from a model, on any device, to a
        figure.
    """
    folder = Path(root) / name
    data = load_file(folder / "data.safetensors")
    data = {key: value.to(dtype if value.is_floating_point() else torch.int64) for key, value in data.items()}
    kinds = {"smollm2": "AutoModelForCausalLM", "whisper": "WhisperForConditionalGeneration"}
    kind = getattr(transformers, kinds.get(name, "AutoModel"))

    def model() -> nn.Module:
        if name == "smollm2" and not (folder / "model" / "config.json").exists():
            dequantize(folder / "model")
        return kind.from_pretrained(folder / "model", dtype=dtype).eval()

    calibration, evaluations = LOADERS[name](data, model)
    return {"model": model, "calibration": calibration, "evaluations": evaluations}


def load_smollm2(data: Batch, _: Callable) -> tuple[dict, dict]:
    """Windows of text, 8 a batch; perplexity of three kinds of text in the mixture, and of one that is not."""
    calibration = {key: _batches(8, input_ids=data[f"calibration_{key}"]) for key in ("mix", "bbc", "mix_512")}

    def perplexity(key: str) -> Callable[[nn.Module], float]:
        ids = data[f"test_{key}"].flatten()
        return lambda model: evaluation.perplexity(model, ids, window=WINDOW, batch_size=4)

    return calibration, {f"perplexity_{key}": perplexity(key) for key in ("bbc", "sotu", "foldoc", "austen")}


def load_minilm(data: Batch, _: Callable) -> tuple[dict, dict]:
    """Articles, 32 a batch; recall at 1 of a headline's article."""
    queries, documents, calibration = (
        _batches(32, input_ids=data[key], attention_mask=data[f"{key}_mask"])
        for key in ("queries", "documents", "calibration")
    )
    return {"bbc": calibration}, {
        "recall_at_1": lambda model: evaluation.retrieval_recall(model, queries, documents).recall_at_1
    }


def load_whisper(data: Batch, _: Callable) -> tuple[dict, dict]:
    """Clips and their texts, 8 a batch; loss per token of synthetic speech and of pytest-audioeval's three clips."""
    parts = {
        key: _batches(
            8,
            input_features=data[f"{key}_features"],
            decoder_input_ids=data[f"{key}_inputs"],
            decoder_attention_mask=data[f"{key}_mask"],
            labels=data[f"{key}_labels"],
        )
        for key in ("calibration", "audioeval", "synthetic")
    }
    return {"synthetic": parts["calibration"]}, {
        f"nll_{key}": lambda model, key=key: evaluation.nll(model, parts[key]) for key in ("synthetic", "audioeval")
    }


def load_dinov2(data: Batch, model: Callable[[], nn.Module]) -> tuple[dict, dict]:
    """Crops of photos, 16 a batch; cosine of the class token to the dense model's."""
    test = _batches(16, pixel_values=data["test"])
    dense = cache(lambda: evaluation.features(model(), test))
    return {"photos": _batches(16, pixel_values=data["calibration"])}, {
        "feature_cosine": lambda pruned: evaluation.feature_cosine(pruned, dense(), test)
    }


LOADERS = {"smollm2": load_smollm2, "minilm": load_minilm, "whisper": load_whisper, "dinov2": load_dinov2}


def dequantize(folder: Path) -> None:
    """Make the float32 model beside the GGUF file, half a minute; float32 holds the 4-bit values exactly.

    A package gguf that is not installed is taken from a wheel in the same folder.
    """
    sys.path.extend(str(wheel) for wheel in folder.glob("gguf-*.whl"))
    quantized = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # with them a model refuses to be saved
        config.pop(key, None)
    plain = transformers.AutoModelForCausalLM.from_config(type(quantized.config)(**config), dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)


def _batches(size: int, **tensors: Tensor) -> list[Batch]:
    parts = zip(*(tensor.split(size) for tensor in tensors.values()), strict=True)
    return [dict(zip(tensors, part, strict=True)) for part in parts]
