"""`Sparse24Linear`: a linear layer whose state is a packed 2:4 weight.

It is an `nn.Linear` so that code which looks for linear layers finds it, but its `weight` holds the kept values only,
at half the width.
"""

import functools

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse24.kernels import dispatch
from hf_sparse24.nn.packed import PackedModule, initialized
from hf_sparse24.nn.shared_input import SharedInput
from hf_sparse24.packing import pack_weight, quantize_tokens, unpack_weight
from hf_sparse24.pattern import check_finite, check_present


class Sparse24Linear(PackedModule, nn.Linear):
    """y = x W^T + b with W packed 2:4, optionally with W and x in 8 bits (W8A8).

    Args:
        in_features (`int`): K, divisible by 4.
        out_features (`int`): N.
        bias (`bool`): whether there is a bias.
        quantization (`str`, *optional*): `"int8"` or `"fp8"`: 8-bit values with a scale per output channel, inputs
            quantized per token at run time.
        backend (`str`): `"auto"`, the fastest for each number of tokens (`kernels.dispatch.choose`), or one that must
            be able to run here (`capability.backend_capability`).
        device, dtype: of the parameters; with quantization `dtype` is that of the bias and of the dense weight.

    The state: `weight` (N, K/2), `weight_indices` (N, ceil(K/8)) uint8, `weight_scale` (N,) float32 with quantization,
    `bias` (N,). All but the bias are frozen; gradients reach the input.

    Raises:
        `ValueError`: in_features is not divisible by four, or the quantization or backend is unknown or cannot run.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quantization: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), quantization, backend, device, dtype)
        self.source_class: type[nn.Module] = nn.Linear
        self._quantize: dispatch.Quantize | None = None
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=self._model_dtype, device=device))

    @classmethod
    def like(
        cls,
        linear: nn.Module,
        quantization: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> "Sparse24Linear":
        """Return an uninitialized packed layer shaped and, by default, placed like an `nn.Linear` or `Conv1D`."""
        _check_linear(linear)
        out_features, in_features = dense_weight(linear).shape
        packed = cls(
            in_features,
            out_features,
            linear.bias is not None,
            quantization,
            backend,
            device or linear.weight.device,
            linear.weight.dtype,
        )
        packed.source_class = Conv1D if isinstance(linear, Conv1D) else nn.Linear
        return packed.train(linear.training)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, quantization: str | None = None, backend: str = "auto", name: str = "the layer"
    ) -> "Sparse24Linear":
        """Pack a layer that is already 2:4. The layer itself is left as it is; its bias is shared.

        Args:
            linear (`nn.Linear` or `Conv1D`): the layer.
            quantization (`str`, *optional*): `"int8"` or `"fp8"`.
            backend (`str`): as in the class.
            name (`str`): how the layer is called in a message.

        Raises:
            `ValueError`: the weight is not 2:4, not finite, or of a dtype that has no packed form.
            `TypeError`: `linear` is neither an `nn.Linear` nor a `Conv1D`.
        """
        _check_linear(linear)
        weight = dense_weight(linear)
        check_present(weight, name)
        check_finite(weight, name)
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be unpacked once
            packed = pack_weight(weight, quantization, name)
            result = cls.like(linear, quantization, backend, device="meta")
            result.hold_(packed)
        if linear.bias is not None:
            result.bias = linear.bias
        result.prepare_()
        return result

    def to_linear(self) -> nn.Module:
        """Return the dense layer, an `nn.Linear` or a `Conv1D` as it was, with explicit zeros."""
        weight = unpack_weight(self.packed, self.dense_dtype)
        if self.source_class is Conv1D:
            with torch.device("meta"):
                dense: nn.Module = Conv1D(self.out_features, self.in_features)
            dense.weight = initialized(nn.Parameter(weight.t().contiguous()))
        else:
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
            dense.weight = initialized(nn.Parameter(weight))
        if self.bias is not None:
            dense.bias = initialized(nn.Parameter(self.bias.detach()))
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `input` (..., K) in float32, float16 or bfloat16, and return (..., N) in that dtype."""
        if input.element_size() == 1:
            raise TypeError(
                f"Sparse24Linear takes float32, float16 or bfloat16 inputs and got {input.dtype}: this model casts "
                "to the dtype of the weight. Keep it dense with modules_to_not_convert, or use quantization='int8'."
            )
        if input.shape[-1] != self.in_features:
            raise ValueError(f"This layer takes inputs (..., {self.in_features}); got {tuple(input.shape)}.")
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = self.weight.dtype if self.quantization is None else torch.get_autocast_dtype(device_type)
            with torch.autocast(device_type, enabled=False):
                return self.forward(input.to(dtype))
        compiling = torch.compiler.is_compiling()
        if input.is_cuda and not compiling and dispatch.nobody_traces(input) and not self._differentiates(input):
            return self._directly(input)
        how = (self._current_metadata(), self.backend)
        weight = (self.weight, self.weight_indices, self.weight_scale)
        if compiling and input.is_cuda and self._quantizes(input) and not self._differentiates(input):
            return self._in_compiled_code(input, *weight, *how)
        return torch.ops.hf_sparse24.linear(input, *weight, self.bias, *how)

    def _differentiates(self, input: Tensor) -> bool:
        bias = self._parameters["bias"]
        return torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))

    def _directly(self, input: Tensor) -> Tensor:
        """Run on a GPU past torch's dispatcher, which costs as much as a launch, as do attributes of a module."""
        parameters = self._parameters
        weight, indices, scale = parameters["weight"], parameters["weight_indices"], parameters["weight_scale"]
        how = (self._current_metadata(), self.backend, self._quantize)
        return dispatch.linear(input, weight, indices, scale, parameters["bias"], *how)

    def _quantizes(self, input: Tensor) -> bool:
        """Whether an input on a GPU is quantized. Asked only where it decides: compiled code is guarded by it."""
        if self.quantization is None or input.dtype not in dispatch.ACTIVATIONS:
            return False
        if input.numel() <= self._few_tokens * self.in_features:
            return False
        return self.weight_metadata is not None or self._own_kernel_takes_quantized(input)

    def _own_kernel_takes_quantized(self, input: Tensor) -> bool:
        return input.numel() <= self._few_quantized_tokens * self.in_features

    def _in_compiled_code(
        self,
        input: Tensor,
        weight: Tensor,
        weight_indices: Tensor,
        weight_scale: Tensor,
        metadata: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Quantize in plain torch.

        So the compiler fuses the quantization with what made the input, makes that of siblings one, and applies the
        token's scale, where the kernel cannot, in what reads the result.
        """
        values, scale = quantize_tokens(input, weight.dtype)
        run, weight_tensors = torch.ops.hf_sparse24.scaled_linear, (weight, weight_indices, weight_scale)
        if self.quantization != "int8" or self._own_kernel_takes_quantized(input):
            return run(values, scale, *weight_tensors, self.bias, input.dtype, metadata, backend)
        product = run(values, None, *weight_tensors, None, torch.bfloat16, metadata, backend) * scale
        return (product if self.bias is None else product + self.bias).to(input.dtype)

    def share_input(self, shared: SharedInput, number: int) -> None:
        """Quantize inputs together with siblings that are called with the same tensor, as one of them by number."""
        self._quantize = functools.partial(shared.quantize, number)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, and its quantization."""
        return f"{super().extra_repr()}, quantization={self.quantization}"


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight of an `nn.Linear` or `Conv1D` as (out, in), a view."""
    weight = linear.weight.detach()
    return weight.t() if isinstance(linear, Conv1D) else weight


def _check_linear(linear: nn.Module) -> None:
    if isinstance(linear, Sparse24Linear) or not isinstance(linear, nn.Linear | Conv1D):
        raise TypeError(f"Packing needs an nn.Linear or a transformers Conv1D; got {type(linear).__name__}.")
