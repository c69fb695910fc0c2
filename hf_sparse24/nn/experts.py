"""Packed experts: one projection of all experts of a mixture as one module, and the forward of a mixture of them.

transformers keeps the experts of a layer in one module, with a 3-D parameter for each projection (`gate_up_proj` or
`up_proj`, and `down_proj`), whichever model they belong to. Packed, a `Sparse24Experts` stands in the place of each
parameter, under its name, and the module gets `forward_routed` as its forward; activation, gating and biases stay
those of the model. So what is packed in the checkpoint of any of these models is `<experts>.gate_up_proj.weight` ...
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
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
            offsets (`Tensor`): (E,) int32 or int64: before which row the tokens of each expert end. Best on the CPU
                (see `kernels.ops`).
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

    def _prepare(self) -> Prepared:
        return experts.prepare(self.packed, self.backend)

    def extra_repr(self) -> str:
        """Describe the stack as nn.Linear does a layer."""
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, quantization={self.quantization}"


def forward_routed(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return what the experts make of tokens: transformers' `grouped_mm_experts_forward` with packed stacks.

    The tokens are sorted by expert once, and how many each expert has is read on the host once: on a GPU the host
    waits for it, as it does in transformers' eager forward, and a CUDA graph cannot be captured.

    Args:
        module (`nn.Module`): the experts, with a `Sparse24Experts` in the place of each parameter.
        hidden_states (`Tensor`): (tokens, hidden).
        top_k_index, top_k_weights (`Tensor`): (tokens, k): the experts of each token, and how much each counts. An
            index that is no expert's counts nothing.

    Raises:
        `RuntimeError`: a CUDA graph is being captured.
    """
    tokens, top_k = top_k_index.shape
    expert, order = top_k_index.flatten().sort()
    first, _ = (getattr(module, name) for name in stacks_of(module))
    numbers = torch.arange(first.num_experts, device=expert.device, dtype=expert.dtype)
    offsets = _on_host(torch.searchsorted(expert, numbers, right=True))
    output = _apply_experts(module, hidden_states[order // top_k], offsets)
    output = output * top_k_weights.flatten()[order, None]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    # A sum over k in place of index_add_, whose order is another in every run on a GPU.
    return output[place].unflatten(0, (tokens, top_k)).sum(1).to(hidden_states.dtype)


def forward_batched(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Return what Llama 4's experts make of a copy of all tokens each, (E * tokens, hidden), one after the other."""
    first, second = (getattr(module, name) for name in stacks_of(module))
    rows = hidden_states.reshape(-1, first.in_features)
    offsets = torch.arange(1, first.num_experts + 1, device="cpu") * (len(rows) // first.num_experts)
    gate, up = first(rows, offsets).chunk(2, dim=-1)
    return second(up * module.act_fn(gate), offsets)


def _apply_experts(module: nn.Module, rows: Tensor, offsets: Tensor) -> Tensor:
    """Run both projections on rows that are sorted by expert, with what the model has between and behind them."""
    first, second = stacks_of(module)

    def project(name: str, rows: Tensor) -> Tensor:
        return getattr(module, name)(rows, offsets, getattr(module, f"{name}_bias") if module.has_bias else None)

    rows = project(first, rows)
    rows = project(second, module._apply_gate(rows) if module.has_gate else module.act_fn(rows))
    return module.post_expert_norm(rows) if getattr(module, "has_post_expert_norm", False) else rows


def _on_host(offsets: Tensor) -> Tensor:
    if offsets.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Packed experts need to know on the host how many tokens each has, which a CUDA graph cannot tell "
            "while it is captured. Run mixtures of packed experts without CUDA graphs."
        )
    return offsets.cpu()


_OWN_FORWARDS = {"Llama4TextExperts": forward_batched}


def forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return the forward that a module of experts gets when it is packed; None where there is none for it."""
    own = _OWN_FORWARDS.get(type(module).__name__)
    if own is not None:
        return own
    # What transformers' decorator of experts sets: such a module may be run by any forward that follows its contract.
    follows = all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return forward_routed if follows else None


def stacks_of(module: nn.Module) -> tuple[str, str]:
    """Return the names of the two 3-D parameters of a module of experts, in the order in which they are applied."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def why_not_packed(module: nn.Module) -> str | None:
    """Say why the experts in a module cannot be packed, whatever is selected; None where they can."""
    if forward_of(module) is None:
        return f"{type(module).__name__} has a forward of its own, which reads the weights of its experts"
    if not all(isinstance(getattr(module, name, None), Tensor | Sparse24Experts) for name in stacks_of(module)):
        return f"{type(module).__name__} has other projections than {' and '.join(stacks_of(module))}"
    return None


def pack_experts_(module: nn.Module, make: Callable[[str], Sparse24Experts]) -> None:
    """Put packed stacks in the place of the parameters of a module of experts, in place.

    Args:
        module (`nn.Module`): dense experts; `why_not_packed` has nothing against them.
        make (`Callable`): from the name of a parameter to its packed form. Each dense stack is freed before the next.
    """
    with _bare(module):
        for name in stacks_of(module):
            packed = make(name)
            delattr(module, name)
            setattr(module, name, packed)
        module.forward = functools.partial(forward_of(module), module)
        module._is_hf_initialized = True  # else transformers would initialize it by the names of its parameters


def unpack_experts_(module: nn.Module) -> None:
    """Put dense stacks in the place of packed ones, one at a time, and the module's own forward."""
    with _bare(module):
        for name in stacks_of(module):
            stack = getattr(module, name).to_stack()
            delattr(module, name)
            setattr(module, name, stack)
        del module.forward


@contextmanager
def _bare(module: nn.Module) -> Iterator[None]:
    """Take accelerate's hook off, which keeps the forward of a module, and put it on again."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
    yield
    if hook is not None:
        add_hook_to_module(module, hook)
