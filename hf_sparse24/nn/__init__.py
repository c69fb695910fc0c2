from hf_sparse24.nn.linear import Sparse24Linear

__all__ = ["Sparse24Linear"]
