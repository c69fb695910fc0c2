"""Finished blocks in a folder, so that an interrupted walk goes on where it stopped.

One safetensors file a block, written whole or not at all, beside a description of the run. A run with another
description (model, data, recipe) refuses the folder: its blocks would not fit together. Under torch.distributed the
first process writes and all read, so that the folder has to be one that they share.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_DESCRIPTION = "run.json"
_PARTIAL = ".partial"
_FACTS = "facts"
_SAMPLE = 64  # values of each parameter, beside the sum of all
_NOT_OF_THE_MODEL = ("_name_or_path", "sparse24", "quantization_config", "transformers_version")


class Progress:
    """The finished blocks of one run.

    Args:
        folder (`Path` or `str`): made where it is missing.
        description (`dict`): what decides the result, in plain JSON values.

    Raises:
        `ValueError`: the folder holds the blocks of another run, or something else.
    """

    def __init__(self, folder: Path | str, description: dict[str, Any]) -> None:
        self.folder = Path(folder)
        file = self.folder / _DESCRIPTION
        if file.exists():
            found = json.loads(file.read_text())
            differing = sorted(key for key in {*found, *description} if found.get(key) != description.get(key))
            if differing:
                anew = (
                    "Load the dense model anew if it is that model, pruned in part; else remove the folder, or name "
                )
                remove = "Remove it, or name "
                raise ValueError(
                    f"{self.folder} holds the blocks of another run: {', '.join(differing)} differ. "
                    f"{anew if differing == ['model'] else remove}another progress_folder."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Another process of this run may be writing the same description at this moment.
        others = {entry.name for entry in self.folder.iterdir() if entry.suffix != _PARTIAL}
        if others and _DESCRIPTION not in others:
            raise ValueError(f"{self.folder} is not empty and holds no run of hf_sparse24; name another folder.")
        partial = self.folder / f"{os.getpid()}{_PARTIAL}"
        partial.write_text(json.dumps(description, indent=1))
        partial.replace(file)

    def has(self, name: str) -> bool:
        """Tell whether a block is finished."""
        return self._file(name).exists()

    def load_(self, block: nn.Module, name: str) -> dict[str, Any]:
        """Put a finished block's tensors into it, in memory of their own, and return what is to be said of it."""
        device = str(next(block.parameters()).device)
        with safe_open(self._file(name), "pt", device=device) as file:
            for key, tensor in block.state_dict(keep_vars=True).items():
                tensor.data = file.get_tensor(key)
            return json.loads(file.metadata()[_FACTS])

    def save(self, block: nn.Module, name: str, facts: dict[str, Any]) -> None:
        """Keep a finished block, and what is to be said of it, in plain JSON values."""
        partial = self._file(name).with_suffix(_PARTIAL)
        tensors = {key: tensor.contiguous() for key, tensor in block.state_dict().items()}
        save_file(tensors, partial, {_FACTS: json.dumps(facts)})
        partial.replace(self._file(name))

    @property
    def finished(self) -> int:
        """How many blocks are finished."""
        return len(list(self.folder.glob("*.safetensors")))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fingerprint_data(batches: Sequence[dict[str, Any]]) -> str:
    """Return a digest of calibration batches, to tell one set from another."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(_digest_of(batch))
    return digest.hexdigest()[:16]


def _digest_of(value: Any) -> bytes:
    """Return bytes that tell a value from any other: a tensor, containers of tensors, or what can be pickled."""
    if isinstance(value, Tensor):
        return _bytes(value)
    digest = hashlib.sha256(type(value).__name__.encode())
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(_digest_of(key) + _digest_of(value[key]))
    elif isinstance(value, list | tuple):
        for item in value:
            digest.update(hashlib.sha256(_digest_of(item)).digest())
    else:
        digest.update(pickle.dumps(value))
    return digest.digest()


def fingerprint_model(model: nn.Module) -> str:
    """Return a digest of the config and of values all over every parameter, to tell one model from another."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    facts = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_MODEL}
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        digest.update(f"{name}{tuple(parameter.shape)}{float(values.sum(dtype=torch.float64))}".encode())
        digest.update(_bytes(values[:: max(1, len(values) // _SAMPLE)]))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.cpu().contiguous()
    return f"{values.dtype}{tuple(values.shape)}".encode() + values.reshape(-1).view(torch.uint8).numpy().tobytes()
