"""Folders with models: read one with the class that it names, write one whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedModel

from hf_sparse24.model_name import check_model_name

# What a folder holds beside the weights and their description (tokenizer, templates, preprocessing) is kept with the
# pruned model; the card is not, since it describes the dense one.
_NOT_COMPANIONS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.index.json",
                   "README.md"]  # fmt: skip


def load_model(name: str, dtype: str = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a model with the class that its config names, as it was saved.

    Args:
        name (`str`): a folder, or a Hub id.
        dtype (`str`): as `from_pretrained` takes it.
        kwargs: for `from_pretrained`, with the request to prune among them; the model must then not be quantized yet.

    Raises:
        `ValueError`: there is no such folder, the model is quantized already, or transformers lacks its class.
    """
    check_model_name(name)
    config = AutoConfig.from_pretrained(name)
    if kwargs and getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method")
        raise ValueError(f"{name} is quantized already ({method}). Prune the dense model, or unpack this one first.")
    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", None)
    if model_class is None:
        raise ValueError(
            f"The config of {name} names the class {architecture!r}, which transformers lacks; use Python."
        )
    return model_class.from_pretrained(name, dtype=dtype, **kwargs)


def chosen_device(name: str | None) -> torch.device:
    """Return the device that was asked for, or the GPU where torch sees one.

    Raises:
        `ValueError`: cuda was asked for and torch sees none.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch sees no CUDA device; use --device cpu.")
    return device


def save_with_companions(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Write the model, and beside it the tokenizer and other small files of its source."""
    origin = Path(source)
    if not origin.is_dir():
        origin = Path(snapshot_download(source, ignore_patterns=_NOT_COMPANIONS))
    for file in origin.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _NOT_COMPANIONS):
            shutil.copy(file, folder)
    model.save_pretrained(folder)


@contextmanager
def new_folder(out: Path, source: str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` only when all went well.

    Args:
        out (`Path`): the folder to write.
        source (`str`): what is read meanwhile; never replaced.
        force (`bool`): replace `out` where it is the folder of a model.

    Raises:
        `ValueError`: `out` has something in it, and `force` is not set or does not reach so far.
    """
    _check_writable(out, source, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        _rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_writable(out: Path, source: str, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ValueError(f"{out} exists and is not an empty folder; replace it with --force, or write elsewhere.")
    if not (out / "config.json").is_file():
        raise ValueError(f"--force replaces the folder of a model, and {out} holds no config.json; write elsewhere.")
    if Path(source).exists() and out.samefile(source):
        raise ValueError(f"{out} is the model that is read; write elsewhere.")


def _rename(folder: Path, out: Path) -> None:
    """Put the new folder in the place of an old one, which goes last."""
    old = folder.with_name(f"{folder.name}.old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
