"""`Sparse24Linear`: a linear layer whose state is a packed 2:4 weight (format 1, see `hf_sparse24.packing`).

A module with plain tensors as its state rather than a tensor subclass: saving, sharding, offload, `deepcopy`,
`torch.compile` and PEFT need nothing special. It is an `nn.Linear` so that code which looks for linear layers finds
it, but its `weight` holds the kept values only, at half the width.

On a GPU a library reads the weight in its own form (`kernels.dispatch.prepare`): `weight` becomes a view of the
library's buffer, and `weight_metadata`, which is never saved, stands in place of the indices.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse24.capability import check_backend
from hf_sparse24.kernels import dispatch
from hf_sparse24.nn.shared_input import SharedInput
from hf_sparse24.packing import (
    QUANTIZED_DTYPES,
    PackedWeight,
    check_packed,
    check_value_dtype,
    indices_width,
    pack_weight,
    quantize_tokens,
    unpack_weight,
)
from hf_sparse24.pattern import bits_of, check_finite, check_in_features, check_present


class Sparse24Linear(nn.Linear):
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
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        check_in_features(in_features, type(self).__name__)
        if quantization is not None and quantization not in QUANTIZED_DTYPES:
            raise ValueError(f"quantization must be None or one of {sorted(QUANTIZED_DTYPES)}; got {quantization!r}.")
        self.in_features, self.out_features = in_features, out_features
        self.quantization = quantization
        check_backend(backend)
        self.backend = backend
        self._model_dtype = dtype or torch.get_default_dtype()
        self.source_class: type[nn.Module] = nn.Linear
        value_dtype = QUANTIZED_DTYPES[quantization] if quantization else self._model_dtype
        self.weight = _frozen(torch.empty(out_features, in_features // 2, dtype=value_dtype, device=device))
        self.weight_indices = _frozen(
            torch.empty(out_features, indices_width(in_features), dtype=torch.uint8, device=device)
        )
        scale = torch.empty(out_features, dtype=torch.float32, device=device) if quantization else None
        self.register_parameter("weight_scale", None if scale is None else _frozen(scale))
        self.register_buffer("weight_metadata", None, persistent=False)
        self._prepared: tuple[int, ...] | None = None  # the state of the weight that the metadata belong to
        self._few_tokens = self._few_quantized_tokens = 0
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
            result.weight = _initialized(_frozen(packed.weight))
            result.weight_indices = _initialized(_frozen(packed.weight_indices))
            result.weight_scale = None if packed.weight_scale is None else _initialized(_frozen(packed.weight_scale))
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
            dense.weight = _initialized(nn.Parameter(weight.t().contiguous()))
        else:
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
            dense.weight = _initialized(nn.Parameter(weight))
        if self.bias is not None:
            dense.bias = _initialized(nn.Parameter(self.bias.detach()))
        return dense.train(self.training)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of the dense weight: that of the values, or with 8 bits that of the model."""
        return self.weight.dtype if self.quantization is None else self._model_dtype

    @property
    def packed(self) -> PackedWeight:
        """The weight as the three tensors of format 1."""
        return PackedWeight(self.weight, self.weight_indices, self.weight_scale)

    def check(self, name: str) -> None:
        """Raise `ValueError` when the state, as read from a file, is not format 1 (see `packing.check_packed`)."""
        check_packed(self.packed, (self.out_features, self.in_features), name)

    def reset_parameters(self) -> None:
        """Refuse: a packed layer is read from a checkpoint or made by `from_linear`, never initialized at random."""
        raise RuntimeError("Sparse24Linear has no random initialization; load a packed checkpoint or use from_linear.")

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

    @torch.no_grad()
    def prepare_(self) -> None:
        """Make what the kernels of the weight's device read in place of the indices; on a CPU that is nothing.

        Loading, packing and moving call it, and a forward where the weight was written to since.

        Raises:
            `ValueError`: the backend that was named does not take this weight.
        """
        self.weight_metadata, self._prepared = None, None
        if not self.weight.is_cuda:
            return
        with torch.inference_mode(False):
            prepared = dispatch.prepare(self.packed, self.backend)
        self.weight.data, self.weight_metadata = prepared.weight, prepared.metadata
        self._few_tokens, self._few_quantized_tokens = prepared.few_tokens, prepared.few_quantized_tokens
        self._prepared = self._state()

    def _current_metadata(self) -> Tensor | None:
        """Return the metadata, made anew where the weight is not the one that they were made from."""
        if torch.compiler.is_compiling() or not self._parameters["weight"].is_cuda:
            return self.weight_metadata
        if self._is_offloaded():  # the weight is here for this call only
            self.weight_metadata, self._prepared = None, None
            dispatch.check_without_metadata(self.backend)
        elif self._prepared != self._state():
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "A packed weight was replaced, and its metadata cannot be made while a CUDA graph is captured. "
                    "Run the model once before."
                )
            self.prepare_()
        return self._buffers["weight_metadata"]

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the weight for each call, by a hook or one of several."""
        hook = self.__dict__.get("_hf_hook")
        parts = () if hook is None else (hook, *getattr(hook, "hooks", ()))
        return any(getattr(part, "offload", False) for part in parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the metadata of a copy, or of what was unpickled: they have to follow the weight in memory."""
        super().__setstate__(state)
        self.prepare_()

    def _state(self) -> tuple[int, ...]:
        weight, indices = self._parameters["weight"], self._parameters["weight_indices"]
        return weight.data_ptr(), indices.data_ptr(), 0 if indices.is_inference() else indices._version

    def _load_from_state_dict(self, *args: Any) -> None:
        """Make the metadata of what was loaded at once: compiled code does not look."""
        super()._load_from_state_dict(*args)
        self.prepare_()

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, and its quantization."""
        return f"{super().extra_repr()}, quantization={self.quantization}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sparse24Linear":
        """Move, but never cast, 8-bit values and their scales: `.to(dtype)` sees their bits."""

        def moved(tensor: Tensor) -> Tensor:
            if self.quantization is not None and (tensor is self.weight or tensor is self.weight_scale):
                return fn(bits_of(tensor)).view(tensor.dtype)
            result = fn(tensor)
            if tensor is self.weight:
                check_value_dtype(result.dtype, "what this layer is cast to")
            return result

        self.weight_metadata, self._prepared = None, None
        super()._apply(moved, recurse)
        self._model_dtype = fn(torch.empty(0, dtype=self._model_dtype, device=self.weight.device)).dtype
        self.prepare_()
        return self


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight of an `nn.Linear` or `Conv1D` as (out, in), a view."""
    weight = linear.weight.detach()
    return weight.t() if isinstance(linear, Conv1D) else weight


def _check_linear(linear: nn.Module) -> None:
    if isinstance(linear, Sparse24Linear) or not isinstance(linear, nn.Linear | Conv1D):
        raise TypeError(f"Packing needs an nn.Linear or a transformers Conv1D; got {type(linear).__name__}.")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _initialized(parameter: nn.Parameter) -> nn.Parameter:
    """Tell transformers' weight initialization, which knows nn.Linear, that this one has its values."""
    parameter._is_hf_initialized = True
    return parameter
