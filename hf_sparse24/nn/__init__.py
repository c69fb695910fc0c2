from hf_sparse24.nn.linear import Sparse24Linear
from hf_sparse24.nn.shared_input import SharedInput

__all__ = ["SharedInput", "Sparse24Linear"]
