"""2:4 structured sparsity for transformers: prune, quantize, pack, retrain and publish.

Importing the package registers `quant_method: "sparse24"` with transformers. What trains is imported when it is first
named, since transformers' Trainer takes seconds.
"""

import importlib
from typing import Any

import hf_sparse24.torchao_import  # noqa: F401  first, before anything else imports torchao
from hf_sparse24.capability import Capability, backend_capability
from hf_sparse24.config import Sparse24Config
from hf_sparse24.nn import Sparse24Experts, Sparse24Linear
from hf_sparse24.pack import pack_, set_backend_, unpack_
from hf_sparse24.prune import prune_
from hf_sparse24.quantizer import Sparse24HfQuantizer
from hf_sparse24.report import SparsityReport, SparsityRow, print_sparsity_report, sparsity_report
from hf_sparse24.version import __version__

__all__ = [
    "Capability",
    "Sparse24Callback",
    "Sparse24Config",
    "Sparse24Experts",
    "Sparse24HfQuantizer",
    "Sparse24Linear",
    "Sparse24Trainer",
    "Sparse24TrainingArguments",
    "SparsityReport",
    "SparsityRow",
    "__version__",
    "backend_capability",
    "pack_",
    "print_sparsity_report",
    "prune_",
    "set_backend_",
    "sparsity_report",
    "unpack_",
]

_TRAINING = {
    "Sparse24Callback": "callback",
    "Sparse24Trainer": "trainer",
    "Sparse24TrainingArguments": "arguments",
}


def __getattr__(name: str) -> Any:
    """Import what trains when it is first asked for."""
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.training.{_TRAINING[name]}"), name)
