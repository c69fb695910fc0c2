"""The experts of a model, packed: which can be, what takes the place of what, and the forward that they get.

transformers keeps the experts of a layer in one module, with a 3-D parameter for each projection (`gate_up_proj` or
`up_proj`, and `down_proj`), whichever model they belong to. Packed, a `Sparse24Experts` stands in the place of each
parameter, under its name, and the module gets `forward_routed` as its forward; activation, gating and biases stay
those of the model.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from hf_sparse24.kernels.experts import offsets_on_host
from hf_sparse24.nn.experts import Sparse24Experts
from hf_sparse24.selection import Selection, Target


def forward_routed(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return what the experts make of tokens: transformers' `grouped_mm_experts_forward` with packed stacks.

    The tokens are sorted by expert once. How many each expert has is read on the host only where a projection needs to
    know it there (`Sparse24Experts.reads_offsets_on_host`), and then once: on a GPU the host waits for it, as it does
    in transformers' eager forward, and a CUDA graph cannot be captured.

    Args:
        module (`nn.Module`): the experts, with a `Sparse24Experts` in the place of each parameter.
        hidden_states (`Tensor`): (tokens, hidden).
        top_k_index, top_k_weights (`Tensor`): (tokens, k): the experts of each token, and how much each counts. An
            index that is no expert's counts nothing.

    Raises:
        `RuntimeError`: a CUDA graph is being captured of so many tokens that the host has to know.
    """
    tokens, top_k = top_k_index.shape
    expert, order = top_k_index.flatten().sort()
    first, _ = (getattr(module, name) for name in stacks_of(module))
    numbers = torch.arange(first.num_experts, device=expert.device, dtype=expert.dtype)
    offsets = torch.searchsorted(expert, numbers, right=True, out_int32=True)
    rows = hidden_states[order // top_k]
    output = _apply_experts(module, rows, offsets_on_host(offsets) if _are_read_on_host(module, rows) else offsets)
    output = output * top_k_weights.flatten()[order, None]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    # A sum over k in place of index_add_, whose order is another in every run on a GPU.
    return output[place].unflatten(0, (tokens, top_k)).sum(1).to(hidden_states.dtype)


def forward_batched(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Return what Llama 4's experts make of a copy of all tokens each, (E * tokens, hidden), one after the other."""
    first, second = (getattr(module, name) for name in stacks_of(module))
    rows = hidden_states.reshape(-1, first.in_features)
    device = "cpu" if _are_read_on_host(module, rows) else rows.device
    offsets = torch.arange(1, first.num_experts + 1, device=device) * (len(rows) // first.num_experts)
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


def _are_read_on_host(module: nn.Module, rows: Tensor) -> bool:
    return any(getattr(module, name).reads_offsets_on_host(len(rows)) for name in stacks_of(module))


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


def packable_experts(model: nn.Module, selection: Selection) -> tuple[dict[str, list[Target]], dict[str, str]]:
    """Tell which of the selected experts can be packed.

    Returns:
        `tuple[dict[str, list[Target]], dict[str, str]]`: the modules of experts that can, with their stacks; and for
        each other stack why it stays a dense tensor with zeros.
    """
    stacks: dict[str, list[Target]] = {}
    for target in selection.targets:
        if target.is_expert_stack:
            stacks.setdefault(target.module_name, []).append(target)
    left: dict[str, str] = {}
    for name, targets in list(stacks.items()):
        module = model.get_submodule(name)
        reason, found = why_not_packed(module), {target.parameter for target in targets}
        dense = [other for other in stacks_of(module) if other not in found]
        if reason is None and dense:
            reason = f"packs only together with {dense[0]}, which stays dense"
        if reason is not None:
            left |= {target.name: reason for target in stacks.pop(name)}
    return stacks, left


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
