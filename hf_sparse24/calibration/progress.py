"""Finished blocks in a folder, so that an interrupted walk goes on where it stopped.

One safetensors file a block, written whole or not at all, beside a description of the run. A run with another
description (model, data, recipe) refuses the folder: its blocks would not fit together.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_DESCRIPTION = "run.json"


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
                raise ValueError(
                    f"{self.folder} holds the blocks of another run: {', '.join(differing)} differ. "
                    "Remove it, or name another progress_folder."
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no run of hf_sparse24; name another folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(description, indent=1))

    def has(self, name: str) -> bool:
        """Tell whether a block is finished."""
        return self._file(name).exists()

    def load_(self, block: nn.Module, name: str) -> None:
        """Put a finished block's tensors into it."""
        device = next(block.parameters()).device
        block.load_state_dict(load_file(self._file(name), device=str(device)))

    def save(self, block: nn.Module, name: str) -> None:
        """Keep a finished block."""
        partial = self._file(name).with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in block.state_dict().items()}, partial)
        partial.rename(self._file(name))

    @property
    def finished(self) -> int:
        """How many blocks are finished."""
        return len(list(self.folder.glob("*.safetensors")))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fingerprint(batches: Sequence[dict[str, Any]]) -> str:
    """Return a digest of calibration batches, to tell one set from another."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().view(-1).numpy().tobytes() if isinstance(value, Tensor) else b"")
    return digest.hexdigest()[:16]
