"""Stacks of packed experts on a GPU: their form, and `experts_linear` for CUDA.

While an expert has few tokens, or little work, on average, one launch runs them all (`grouped`), without a word to the
host about who has how many. Else each expert that has tokens is a projection of its own, which `dispatch.choose` gives
to a kernel by the number of its tokens.
"""

import torch
from torch import Tensor

from hf_sparse24.kernels import dispatch, grouped, ops, reference
from hf_sparse24.kernels.decode import aligned
from hf_sparse24.kernels.dispatch import Prepared
from hf_sparse24.packing import PackedWeight

_PITCH = 128  # bytes: what an expert takes of a library's buffer is a multiple of it
_ALL_ROWS = 2**31 - 1

# How many multiplications of an expert, tokens * N * K by the dtype of the values, the package's own kernel does at
# most while the host makes a library's calls for one. Estimated from `benchmarks/results`: 50 us of the host for an
# expert and projection (`performance_experts.csv` of the commit 855f51c, 128 experts at 4096 tokens), 130 and 300
# million multiplications a microsecond with activations in 16 and in 8 bits (`performance_kernels.csv`, 256 tokens).
GROUPED_MULTIPLICATIONS = {
    torch.float16: 6_500_000_000,
    torch.bfloat16: 6_500_000_000,
    torch.int8: 15_000_000_000,
    torch.float8_e4m3fn: 6_500_000_000,
}


def prepare(packed: PackedWeight, backend: str = "auto") -> Prepared:
    """Make the form of a stack that a library reads, as `dispatch.prepare` does of a weight, one expert at a time.

    `weight[e]` and `metadata[e]` of the result are those of an expert. Where a library wants both in one buffer, the
    buffers of the experts lie one behind the other and the values are a view of them: nothing is stored twice. The few
    tokens of the result are rows of all experts together (`most_grouped_rows`).

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
            break
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
    return Prepared(stack, metadata, most_grouped_rows(stack, metadata, backend), 0)


def most_grouped_rows(weight: Tensor, metadata: Tensor | None, backend: str = "auto") -> int:
    """Return up to how many rows of all experts together one launch runs them: the crossover.

    Args:
        weight, metadata (`Tensor`): as `prepare` returned them.
        backend (`str`): "auto", or what was asked for.
    """
    experts, outputs, half = weight.shape
    own = backend in ("auto", "nvrtc") and dispatch.takes_weight(weight.dtype, outputs, 2 * half, "nvrtc").ok
    if not own or metadata is None:
        return _ALL_ROWS if own else 0
    tokens = GROUPED_MULTIPLICATIONS[weight.dtype] // (outputs * 2 * half)
    return experts * max(tokens, dispatch.FEW_TOKENS[weight.dtype])


def offsets_on_host(offsets: Tensor) -> Tensor:
    """Return offsets on the CPU, for which the host waits where they are on a GPU.

    Raises:
        `RuntimeError`: a CUDA graph is being captured.
    """
    if offsets.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Packed experts that are run one by one need to know on the host how many tokens each has, which a CUDA "
            "graph cannot tell while it is captured. Capture fewer tokens, with activations in 16 bits, or run "
            "without a graph."
        )
    return offsets.cpu()


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
        offsets = offsets_on_host(offsets)
        return reference.experts_linear(input, offsets, weight, weight_indices, weight_scale, bias)
    stack = PackedWeight(weight, weight_indices, weight_scale)
    if len(input) <= most_grouped_rows(weight, weight_metadata, backend):
        return _grouped(input, offsets, stack, bias)
    return _one_by_one(input, offsets_on_host(offsets), stack, bias, weight_metadata, backend)


def _grouped(input: Tensor, offsets: Tensor, stack: PackedWeight, bias: Tensor | None) -> Tensor:
    """Run all experts in one launch, on the activations that the average expert's kernel takes."""
    tokens = -(-len(input) // len(stack.weight))
    offsets = offsets.to(input.device, torch.int32)
    bias = None if bias is None else bias.to(input.dtype)
    values, scale = input, None
    if not dispatch.keeps_16_bits(tokens, stack.weight[0]):
        values, scale = dispatch.quantize_per_token(input, stack.weight.dtype)
    return grouped.grouped_linear(values, scale, offsets, stack, bias, input.dtype)


def _one_by_one(
    input: Tensor,
    offsets: Tensor,
    stack: PackedWeight,
    bias: Tensor | None,
    weight_metadata: Tensor | None,
    backend: str,
) -> Tensor:
    """Run a product for each expert that has rows."""
    quantized, products, done = None, [], 0
    for expert, rows in reference.rows_of_experts(offsets):
        done, one = rows.stop, stack.of_expert(expert)
        bias_of_expert = None if bias is None else bias[expert]
        metadata = None if weight_metadata is None else weight_metadata[expert]
        tokens = rows.stop - rows.start
        kernel = dispatch.choose(tokens, input.dtype, one.weight, metadata, backend)
        if kernel == "nvrtc":
            one = PackedWeight(*(None if part is None else aligned(part) for part in one))
        if kernel == "nvrtc" and dispatch.keeps_16_bits(tokens, one.weight):
            products.append(dispatch.few_tokens_linear(input[rows], *one, bias_of_expert))
        elif one.weight_scale is None:
            products.append(dispatch.linear(input[rows], *one, bias_of_expert, metadata, backend))
        else:
            quantized = quantized or dispatch.quantize_per_token(input, one.weight.dtype)
            values, scale = quantized[0][rows], aligned(quantized[1][rows])
            how = (bias_of_expert, input.dtype, metadata, backend)
            products.append(dispatch.scaled_linear(values, scale, *one, *how))
    if len(products) == 1 and done == len(input):
        return products[0]
    return torch.cat([*products, input.new_zeros(len(input) - done, stack.weight.shape[1])])


torch.library.register_kernel("hf_sparse24::experts_linear", "cuda", experts_linear)
