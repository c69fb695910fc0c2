"""`Sparse24Experts`: one projection of all experts of a mixture, as one stack of packed 2:4 weights."""

import torch
from torch import Tensor, nn

from hf_sparse24.kernels import experts
from hf_sparse24.kernels.dispatch import Prepared, nobody_traces
from hf_sparse24.nn.packed import PackedModule, initialized
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import check_finite, check_present


class Sparse24Experts(PackedModule):
    """y = x W_e^T + b_e with the weights W_e of all experts packed 2:4, optionally with W and x in 8 bits (W8A8).

    Args:
        num_experts (`int`): E.
        in_features (`int`): K, divisible by 4.
        out_features (`int`): N.
        quantization, backend, device, dtype: as in `Sparse24Linear`.

    The state: `weight` (E, N, K/2), `weight_indices` (E, N, ceil(K/8)) uint8, `weight_scale` (E, N) float32 with
    quantization, all frozen; gradients reach the input. Biases stay where the model has them.

    Raises:
        `ValueError`: in_features is not divisible by four, or the quantization or backend is unknown or cannot run.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        quantization: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_experts, out_features, in_features), quantization, backend, device, dtype)
        self.num_experts = num_experts
        self.input_dim = -1

    @classmethod
    def like(
        cls,
        stack: Tensor,
        input_dim: int = -1,
        quantization: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> "Sparse24Experts":
        """Return uninitialized packed experts shaped and, by default, placed like a dense stack (see `from_stack`)."""
        num_experts, out_features, in_features = stack.movedim(input_dim, -1).shape
        packed = cls(
            num_experts, in_features, out_features, quantization, backend, device or stack.device, stack.dtype
        )
        packed.input_dim = input_dim
        return packed

    @classmethod
    @torch.no_grad()
    def from_stack(
        cls,
        stack: Tensor,
        input_dim: int = -1,
        quantization: str | None = None,
        backend: str = "auto",
        name: str = "the experts",
    ) -> "Sparse24Experts":
        """Pack a stack that is already 2:4, one expert at a time. The stack itself is left as it is.

        Args:
            stack (`Tensor`): (E, N, K), or (E, K, N) with `input_dim=-2`.
            input_dim (`int`): where K is, -1 or -2.
            quantization (`str`, *optional*): `"int8"` or `"fp8"`.
            backend (`str`): as in `Sparse24Linear`.
            name (`str`): how the stack is called in a message.

        Raises:
            `ValueError`: an expert is not 2:4, not finite, or of a dtype that has no packed form.
        """
        check_present(stack, name)
        check_finite(stack, name)
        with torch.inference_mode(False):  # tensors of inference mode could not be unpacked once
            result = cls.like(stack, input_dim, quantization, backend)
            for expert, weight in enumerate(stack.detach().movedim(input_dim, -1)):
                packed = pack_weight(weight, quantization, f"{name}[{expert}]")
                for whole, part in zip(result.packed, packed, strict=True):
                    if whole is not None:
                        whole[expert] = part
        result.hold_(result.packed)
        result.prepare_()
        return result

    @torch.no_grad()
    def to_stack(self) -> nn.Parameter:
        """Return the dense stack with explicit zeros, its inputs where they were."""
        num_experts, out_features, in_features = self.dense_shape
        shape = (num_experts, *((out_features, in_features) if self.input_dim == -1 else (in_features, out_features)))
        stack = self.weight.new_empty(shape, dtype=self.dense_dtype)
        for expert, weight in enumerate(stack.movedim(self.input_dim, -1)):
            weight.copy_(unpack_weight(self.packed.of_expert(expert), self.dense_dtype))
        return initialized(nn.Parameter(stack))

    def forward(self, input: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply each expert to its rows.

        Args:
            input (`Tensor`): (S, K) in float32, float16 or bfloat16: the tokens of expert 0, those of expert 1 ...
            offsets (`Tensor`): (E,) int32 or int64: before which row the tokens of each expert end. Best where
                `reads_offsets_on_host` says.
            bias (`Tensor`, *optional*): (E, N).

        Returns:
            `Tensor`: (S, N) in the dtype of `input`; zeros in rows behind the last offset.
        """
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = self.weight.dtype if self.quantization is None else torch.get_autocast_dtype(device_type)
            with torch.autocast(device_type, enabled=False):
                return self.forward(input.to(dtype), offsets, bias)
        weight = (self.weight, self.weight_indices, self.weight_scale)
        how = (self._current_metadata(), self.backend)
        needs_gradient = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
        if input.is_cuda and not needs_gradient and not torch.compiler.is_compiling() and nobody_traces(input):
            return experts.experts_linear(input, offsets, *weight, bias, *how)
        return torch.ops.hf_sparse24.experts_linear(input, offsets, *weight, bias, *how)

    def reads_offsets_on_host(self, rows: int) -> bool:
        """Tell whether for so many rows the host reads the offsets, as on a CPU and for many tokens on a GPU."""
        return rows > self._few_tokens

    def _prepare(self) -> Prepared:
        return experts.prepare(self.packed, self.backend)

    def extra_repr(self) -> str:
        """Describe the stack as nn.Linear does a layer."""
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, quantization={self.quantization}"
