"""2:4 structured sparsity for transformers: prune, quantize, pack, retrain and publish.

Importing the package registers `quant_method: "sparse24"` with transformers.
"""

from hf_sparse24.capability import Capability, backend_capability
from hf_sparse24.config import Sparse24Config
from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.pack import pack_, set_backend_, unpack_
from hf_sparse24.prune import prune_
from hf_sparse24.quantizer import Sparse24HfQuantizer
from hf_sparse24.report import SparsityReport, SparsityRow, print_sparsity_report, sparsity_report
from hf_sparse24.version import __version__

__all__ = [
    "Capability",
    "Sparse24Config",
    "Sparse24HfQuantizer",
    "Sparse24Linear",
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
