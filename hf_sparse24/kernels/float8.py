"""FP8 2:4 products on Hopper through torchao's CUTLASS kernel, which has all scales and the bias in its epilogue.

The operators are called as they are, on two dimensions: torchao's tensor subclass fails on (B, S, K) inputs. The
values are those of format 1; only the kernel's metadata are made here.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hf_sparse24.capability import Capability, backend_capability
from hf_sparse24.packing import PackedWeight, ones_in_places

_OUTPUTS, _INPUTS = 64, 32  # features come in multiples of these


def cutlass_capability(value_dtype: torch.dtype, out_features: int, in_features: int) -> Capability:
    """Tell whether the kernel can run here and takes a weight of this dtype and shape."""
    if value_dtype != torch.float8_e4m3fn:
        return Capability(False, "torchao's kernel is for FP8 alone")
    capability = backend_capability("cutlass")
    if not capability.ok:
        return capability
    if out_features % _OUTPUTS or in_features % _INPUTS:
        return Capability(
            False, f"torchao's FP8 kernel takes out_features divisible by {_OUTPUTS} and in_features by {_INPUTS}"
        )
    return capability


def metadata_of(packed: PackedWeight) -> Tensor:
    """Return the kernel's metadata (N, K/8) of a packed FP8 weight on a GPU, bytes."""
    with _on(packed.weight):
        return torch.ops.torchao.to_sparse_semi_structured_cutlass_sm9x_f8(ones_in_places(packed))[1]


def scaled_linear(
    input: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (input @ unpacked(weight).T) * weight_scale * input_scale + bias.

    Args:
        input (`Tensor`): (M, K) float8_e4m3fn, with M scales in float32.
        weight, metadata, weight_scale: (N, K/2) float8_e4m3fn, (N, K/8) bytes, (N,) float32.
        bias (`Tensor`, *optional*): (N,) in `out_dtype`.
        out_dtype (`torch.dtype`): float16 or bfloat16.
    """
    with _on(input):
        return torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8(
            input, input_scale.view(-1), weight, metadata, weight_scale, bias, out_dtype
        )


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, whose stream and properties torchao's operators take."""
    device = tensor.get_device()
    return nullcontext() if torch._C._cuda_getDevice() == device else torch.cuda.device(device)
