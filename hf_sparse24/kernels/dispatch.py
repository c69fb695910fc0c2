"""Which kernel runs a packed projection on a GPU, and the operators of `kernels.ops` for CUDA.

`choose` decides, by what was measured (`benchmarks/results`):

- up to `FEW_TOKENS` a projection takes as long as its weights take to read: the package's own kernel reads them once
  and takes 16-bit activations, so that weights in 8 bits need no quantization of activations (W8A16);
- with 8-bit weights from there to `FEW_QUANTIZED_TOKENS` its form for quantized activations (W8A8), where the GPU has
  the products for it;
- from there on a library: torchao's kernel for FP8 on Hopper, else cuSPARSELt. With 8-bit weights the activations are
  quantized before (W8A8);
- what neither takes, and float32, runs as `kernels.reference` does, dense.

A library reads a weight in a form of its own, made once by `prepare`: the values of format 1 as they are, and metadata
in place of the indices.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers.utils import logging

from hf_sparse24.capability import Capability, backend_capability, gpu_capability
from hf_sparse24.kernels import cusparselt, decode, float8, quantize_activations, reference
from hf_sparse24.packing import PackedWeight, dtype_name

logger = logging.get_logger(__name__)

# Up to how many tokens the package's own kernel runs, by the dtype of the values: on 16-bit activations; on quantized
# ones. From `benchmarks/results/performance_kernels.csv`, the sum over the projections of a layer from 16 tokens on;
# with fewer the two forms for INT8 were not compared. FP8 on quantized ones, which no H100 runs, was not timed.
FEW_TOKENS = {torch.float16: 64, torch.bfloat16: 64, torch.int8: 8, torch.float8_e4m3fn: 16}
FEW_QUANTIZED_TOKENS = {torch.int8: 32, torch.float8_e4m3fn: 64}
_ALL_TOKENS = 2**31 - 1
ACTIVATIONS = (torch.float16, torch.bfloat16)
Quantize = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
_ALIGNMENT = 16  # bytes, of what kernels read


class Prepared(NamedTuple):
    """A packed weight as GPU kernels want it.

    The values are as they were, or a view of a library's buffer; up to how many tokens the package's own kernel runs,
    which reads the indices instead of the metadata: with 16-bit activations, and with quantized ones.
    """

    weight: Tensor
    metadata: Tensor | None
    few_tokens: int
    few_quantized_tokens: int


@functools.cache
def takes_weight(value_dtype: torch.dtype, out_features: int, in_features: int, backend: str) -> Capability:
    """Tell whether a backend takes a packed weight on a GPU here.

    Args:
        value_dtype (`torch.dtype`): of the packed values.
        out_features, in_features (`int`): N and K.
        backend (`str`): a name, or "auto", which takes every weight.
    """
    if backend in ("auto", "reference"):
        return Capability(True, "")
    capability = backend_capability(backend)
    if not capability.ok:
        return capability
    if backend == "cutlass":
        return float8.cutlass_capability(value_dtype, out_features, in_features)
    if backend == "cusparselt":
        return cusparselt.cusparselt_capability(value_dtype, out_features, in_features)
    dtype = value_dtype if value_dtype.itemsize == 2 else torch.bfloat16
    return decode.decode_capability(dtype, value_dtype, in_features)


@functools.cache
def takes_quantized(value_dtype: torch.dtype, in_features: int) -> bool:
    """Tell whether the package's own kernel takes activations quantized as packed values of this dtype here."""
    if not backend_capability("nvrtc").ok:
        return False
    return decode.scaled_capability(value_dtype, in_features, torch.bfloat16, gpu_capability()).ok


def prepare(packed: PackedWeight, backend: str = "auto") -> Prepared:
    """Make the form of a packed weight that a library on its device reads; nothing is made where none takes it.

    Args:
        packed (`PackedWeight`): two-dimensional, on a GPU.
        backend (`str`): as in `Sparse24Config`.

    Raises:
        `ValueError`: the named backend does not take this weight.
    """
    weight, shape = packed.weight, (packed.weight.shape[0], 2 * packed.weight.shape[1])

    def takes(name: str) -> Capability:
        return takes_weight(weight.dtype, *shape, name)

    if not takes(backend).ok:
        raise ValueError(
            f"backend={backend!r} does not take a {shape[0]} x {shape[1]} weight of {dtype_name(weight.dtype)}: "
            f"{takes(backend).reason}."
        )
    own = backend in ("auto", "nvrtc") and takes("nvrtc").ok
    few_tokens = FEW_TOKENS[weight.dtype] if own else 0
    quantized = own and takes_quantized(weight.dtype, shape[1])
    few_quantized_tokens = FEW_QUANTIZED_TOKENS[weight.dtype] if quantized else 0
    if backend == "cutlass" or (backend == "auto" and takes("cutlass").ok):
        return Prepared(weight, float8.metadata_of(packed), few_tokens, few_quantized_tokens)
    if backend == "cusparselt" or (backend == "auto" and takes("cusparselt").ok):
        return Prepared(*cusparselt.compress(packed), few_tokens, few_quantized_tokens)
    if backend == "auto":
        _say_what_runs(weight, shape, takes("nvrtc").ok, takes("cusparselt").reason)
    return Prepared(weight, None, few_tokens, _ALL_TOKENS if quantized else 0)  # no library takes over


def _say_what_runs(weight: Tensor, shape: tuple[int, int], has_kernel: bool, reason: str) -> None:
    what = "the kernel for few tokens, which is slow for many" if has_kernel else "a dense product"
    logger.warning_once(
        f"2:4 weights of {shape[0]} x {shape[1]} in {dtype_name(weight.dtype)} run through {what}: {reason}."
    )


def check_without_metadata(backend: str) -> None:
    """Say that an offloaded weight has no library's form, or raise `ValueError` where a library was asked for."""
    if backend in ("cutlass", "cusparselt"):
        raise ValueError(f"backend={backend!r} needs weights that stay on the GPU; these are offloaded. Use 'auto'.")
    logger.warning_once("Offloaded 2:4 weights run through the kernel for few tokens, which is slow for many.")


def nobody_traces(input: Tensor) -> bool:
    """Tell whether a kernel may be called past torch's dispatcher: no subclass, mode, transform or tracer is there."""
    return (
        type(input) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def few_tokens_linear(
    input: Tensor, weight: Tensor, weight_indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return `kernels.decode.few_tokens_linear`, with a bias as the kernel takes it."""
    return decode.few_tokens_linear(input, weight, weight_indices, weight_scale, _bias_as_read(bias, input.dtype))


def _bias_as_read(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bias in the dtype of the result, contiguous and aligned: a copy where it is not so."""
    if bias is None or (bias.dtype == dtype and bias.is_contiguous() and bias.data_ptr() % _ALIGNMENT == 0):
        return bias
    return bias.to(dtype, copy=True).contiguous()


def choose(tokens: int, dtype: torch.dtype, weight: Tensor, metadata: Tensor | None, backend: str = "auto") -> str:
    """Return the backend that runs a product: "nvrtc", "cutlass", "cusparselt" or "reference".

    Args:
        tokens (`int`): M.
        dtype (`torch.dtype`): of the activations.
        weight, metadata (`Tensor`): as `prepare` returned them.
        backend (`str`): "auto", or what was asked for.
    """
    if backend == "reference" or dtype not in ACTIVATIONS:
        return "reference"
    few = metadata is None or tokens <= _most_own_tokens(weight)
    if few and backend in ("auto", "nvrtc") and takes_weight(weight.dtype, *_shape(weight), "nvrtc").ok:
        return "nvrtc"
    if metadata is not None:
        return "cutlass" if metadata.ndim == 2 else "cusparselt"
    return "reference"


def keeps_16_bits(tokens: int, weight: Tensor) -> bool:
    """Tell whether the package's own kernel, where it runs a product, takes the activations as they are."""
    return tokens <= FEW_TOKENS[weight.dtype] or not takes_quantized(weight.dtype, 2 * weight.shape[1])


def _most_own_tokens(weight: Tensor) -> int:
    """Return up to how many tokens the package's own kernel runs where a library could."""
    few = FEW_TOKENS[weight.dtype]
    if weight.itemsize == 1 and takes_quantized(weight.dtype, 2 * weight.shape[1]):
        return max(few, FEW_QUANTIZED_TOKENS[weight.dtype])
    return few


def routes() -> dict[str, str]:
    """Say for each kind of weight which kernels run it here with backend="auto", by the number of tokens.

    ```python
    >>> set(routes()) == {"16-bit", "int8", "fp8"}
    True

    ```
    """
    found = {}
    for name, dtype in (("16-bit", torch.bfloat16), ("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        few, shape = FEW_TOKENS[dtype], (4096, 4096)  # which every kernel takes
        quantized = FEW_QUANTIZED_TOKENS[dtype] if takes_quantized(dtype, shape[1]) else 0
        many = next((b for b in ("cutlass", "cusparselt") if takes_weight(dtype, *shape, b).ok), "reference")
        if takes_weight(dtype, *shape, "nvrtc").ok:
            own = f"nvrtc up to {max(few, quantized)} tokens"
            own += f" (16-bit activations up to {few})" if quantized > few else ""
            found[name] = "nvrtc" if many == "reference" else f"{own}, then {many}"
        else:
            found[name] = many
    return found


def _check_features(input: Tensor, weight: Tensor) -> None:
    if input.shape[-1] != 2 * weight.shape[1] or input.get_device() != weight.get_device():
        raise ValueError(
            f"The input is {tuple(input.shape)} on {input.device}; the weight takes {2 * weight.shape[1]} features on "
            f"{weight.device}."
        )


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], 2 * weight.shape[1]


def linear(
    input: Tensor,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
    quantize: Quantize | None = None,
) -> Tensor:
    """Return input @ unpacked(weight).T + bias; the contract is in `kernels.ops`.

    `quantize` stands in for `quantize_per_token`, as where siblings share its result.
    """
    _check_features(input, weight)
    tokens = input.numel() // input.shape[-1]
    kernel = choose(tokens, input.dtype, weight, weight_metadata, backend)
    if kernel == "nvrtc" and keeps_16_bits(tokens, weight):
        return few_tokens_linear(input, weight, weight_indices, weight_scale, bias)
    if kernel == "reference":
        return reference.linear(input, weight, weight_indices, weight_scale, bias)
    if weight_scale is not None:
        values, scale = (quantize or quantize_per_token)(input, weight.dtype)
        return scaled_linear(
            values, scale, weight, weight_indices, weight_scale, bias, input.dtype, weight_metadata, backend
        )
    if input.dtype != weight.dtype:
        raise TypeError(f"the input is {dtype_name(input.dtype)}, the weight {dtype_name(weight.dtype)}")
    return cusparselt.matmul(input, weight, weight_metadata, None, bias, input.dtype)


def quantize_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `input` (..., K) in int8 or float8_e4m3fn and its scale (..., 1) in float32."""
    if not backend_capability("nvrtc").ok:
        return reference.quantize_per_token(input, dtype)
    return quantize_activations.quantize_per_token(input, dtype)


def scaled_linear(
    input: Tensor,
    input_scale: Tensor | None,
    weight: Tensor,
    weight_indices: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_metadata: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return (input @ unpacked(weight).T) * weight_scale * input_scale + bias; the contract is in `kernels.ops`."""
    _check_features(input, weight)
    kernel = choose(input.numel() // input.shape[-1], out_dtype, weight, weight_metadata, backend)
    if kernel == "nvrtc" and takes_quantized(weight.dtype, input.shape[-1]):
        bias = _bias_as_read(bias, out_dtype)
        return decode.scaled_linear(input, input_scale, weight, weight_indices, weight_scale, bias, out_dtype)
    if weight_metadata is None or kernel == "reference":
        return reference.scaled_linear(input, input_scale, weight, weight_indices, weight_scale, bias, out_dtype)
    run = _through_cutlass if weight_metadata.ndim == 2 else _through_cusparselt
    return run(input, input_scale, weight, weight_metadata, weight_scale, _bias_as_read(bias, out_dtype), out_dtype)


def _through_cutlass(
    input: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    leading, tokens = input.shape[:-1], input.numel() // input.shape[-1]
    if not tokens:
        return input.new_empty((*leading, weight.shape[0]), dtype=dtype)
    if scale is None:
        scale = torch.ones(tokens, device=input.device)
    rows = input.view(tokens, -1) if input.is_contiguous() else input.reshape(tokens, -1).contiguous()
    out = float8.scaled_linear(rows, scale, weight, metadata, weight_scale, bias, dtype)
    return out.view(*leading, -1) if len(leading) != 1 else out


def _through_cusparselt(
    input: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """INT8 has the weight's scales in the product; the other scales and the bias are a second pass."""
    in_product = weight_scale if weight.dtype == torch.int8 else None
    # In bfloat16 whatever the result: without the token's scale a sum can be beyond float16.
    product = cusparselt.matmul(input, weight, metadata, in_product, None, torch.bfloat16)
    if scale is None and in_product is not None and bias is None and dtype == torch.bfloat16:
        return product
    if scale is None:
        scale = torch.ones(input.numel() // input.shape[-1], device=input.device)
    return quantize_activations.scale_product_(
        product, scale, None if in_product is not None else weight_scale, bias, dtype
    )


for _operator in (linear, quantize_per_token, scaled_linear):
    torch.library.register_kernel(f"hf_sparse24::{_operator.__name__}", "cuda", _operator)
