from hf_sparse24.nn.experts import Sparse24Experts
from hf_sparse24.nn.linear import Sparse24Linear
from hf_sparse24.nn.packed import PackedModule
from hf_sparse24.nn.shared_input import SharedInput

__all__ = ["PackedModule", "SharedInput", "Sparse24Experts", "Sparse24Linear"]
