"""Stacks of packed experts on a GPU: their form, and `experts_linear` for CUDA, one product an expert.

Each expert that has tokens is a projection of its own, which `dispatch.choose` gives to a kernel by the number of its
tokens. What a grouped kernel would do better (one launch, no offsets on the host) can be put behind the same operator:
it takes the whole stack.
"""

import torch
from torch import Tensor

from hf_sparse24.kernels import dispatch, ops, reference
from hf_sparse24.kernels.dispatch import Prepared
from hf_sparse24.packing import PackedWeight

_ALIGNMENT = 16  # bytes, of what kernels read
_PITCH = 128  # bytes: what an expert takes of a library's buffer is a multiple of it


def prepare(packed: PackedWeight, backend: str = "auto") -> Prepared:
    """Make the form of a stack that a library reads, as `dispatch.prepare` does of a weight, one expert at a time.

    `weight[e]` and `metadata[e]` of the result are those of an expert. Where a library wants both in one buffer, the
    buffers of the experts lie one behind the other and the values are a view of them: nothing is stored twice.

    Args:
        packed (`PackedWeight`): a stack (E, N, K/2), on a GPU.
        backend (`str`): as in `Sparse24Config`.

    Raises:
        `ValueError`: the named backend does not take these weights.
    """
    stack, metadata, buffer, size = packed.weight, None, None, 0
    for expert, weight in enumerate(stack):
        one = dispatch.prepare(packed.of_expert(expert), backend)
        if one.metadata is None:  # and so it is for all of them
            return one._replace(weight=stack)
        if one.weight.data_ptr() == weight.data_ptr():  # only the metadata are new
            metadata = one.metadata.new_empty(len(stack), *one.metadata.shape) if metadata is None else metadata
            metadata[expert] = one.metadata
            continue
        if buffer is None:
            size, used = one.weight.nbytes, one.weight.nbytes + one.metadata.nbytes
            buffer = torch.empty(len(stack), -(-used // _PITCH) * _PITCH, dtype=torch.uint8, device=stack.device)
            metadata = buffer[:, size:used]
        buffer[expert, :size] = one.weight.flatten().view(torch.uint8)
        buffer[expert, size : size + one.metadata.nbytes] = one.metadata
    if buffer is not None:
        stack = buffer[:, :size].view(stack.dtype).unflatten(-1, stack.shape[1:])
    return one._replace(weight=stack, metadata=metadata)


def experts_linear(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return `linear` for the rows of each expert that has some; the contract is in `kernels.ops`.

    With 8-bit weights all rows are quantized together, if an expert has so many that its product takes them quantized.
    """
    ops.check_experts(input, offsets, weight, weight_scale)
    first = None if weight_metadata is None else weight_metadata[0]
    if dispatch.choose(1, input.dtype, weight[0], first, backend) == "reference":  # then for any number of tokens
        return reference.experts_linear(input, offsets, weight, weight_indices, weight_scale, bias)
    stack, quantized, products, done = PackedWeight(weight, weight_indices, weight_scale), None, [], 0
    for expert, rows in reference.rows_of_experts(offsets):
        done, one = rows.stop, stack.of_expert(expert)
        bias_of_expert = None if bias is None else bias[expert]
        metadata = None if weight_metadata is None else weight_metadata[expert]
        tokens = rows.stop - rows.start
        kernel = dispatch.choose(tokens, input.dtype, one.weight, metadata, backend)
        if kernel == "nvrtc":
            one = PackedWeight(*(None if part is None else _aligned(part) for part in one))
        if kernel == "nvrtc" and dispatch.keeps_16_bits(tokens, one.weight):
            products.append(dispatch.few_tokens_linear(input[rows], *one, bias_of_expert))
        elif one.weight_scale is None:
            products.append(dispatch.linear(input[rows], *one, bias_of_expert, metadata, backend))
        else:
            quantized = quantized or dispatch.quantize_per_token(input, weight.dtype)
            values, scale = quantized[0][rows], _aligned(quantized[1][rows])
            how = (bias_of_expert, input.dtype, metadata, backend)
            products.append(dispatch.scaled_linear(values, scale, *one, *how))
    if len(products) == 1 and done == len(input):
        return products[0]
    return torch.cat([*products, input.new_zeros(len(input) - done, weight.shape[1])])


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins where kernels read: a copy of one that does not."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


torch.library.register_kernel("hf_sparse24::experts_linear", "cuda", experts_linear)
