"""Attention for whole-model benchmarks: none of it builds a mask, so that the projections are what is compared.

A static cache with transformers' boolean mask has no fast kernel: at batch 64 the mask costs more than all projections
of a layer. These two go through transformers' own `AttentionInterface`; a name for which no mask function is
registered gets no mask (`masking_utils`), and no model code is changed.

- `PREFILL`: transformers' SDPA function, causal, which takes its fused kernel when there is no mask.
- `DECODE`: one new token for each sequence, over a static cache of exactly the context's length: its key and value are
  written to the last position, and SDPA with grouped heads attends to all of them. Sliding windows and soft caps are
  left out. The cache is a pair of buffers of each attention module, so that every layer is the same code with other
  tensors and compiles once.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PREFILL = "sparse24_prefill"
DECODE = "sparse24_decode"
_ATTACH = "sparse24_attach"
_KEYS, _VALUES, _POSITION = "sparse24_keys", "sparse24_values", "sparse24_position"


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend from one new token to the cache that `attach_caches` gave to the module.

    Args:
        module (`nn.Module`): the attention module.
        query (`Tensor`): (batch, heads, 1, width); `key`, `value`: (batch, key-value heads, 1, width).
        attention_mask: ignored.
        scaling (`float`, *optional*): of the scores; default: the root of the width.

    Returns:
        `tuple`: (batch, 1, heads, width), and None for the weights.
    """
    keys, values, position = (getattr(module, name) for name in (_KEYS, _VALUES, _POSITION))
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    grouped = query.shape[1] != keys.shape[1]
    output = F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous(), None


def attach_caches(model: PreTrainedModel, step: Callable[[], object], context: int) -> None:
    """Give every attention module a random cache for what `step` decodes, and make the model use it.

    Args:
        model (`PreTrainedModel`): on its device.
        step (`Callable`): runs the model on one token for each sequence.
        context (`int`): tokens in the cache, the new one included.

    Raises:
        `ValueError`: the model does not generate, or has no attention that can be replaced.
    """
    if not model.can_generate():
        raise ValueError(f"decoding: {type(model).__name__} does not generate")
    detach_caches(model)
    AttentionInterface.register(_ATTACH, partial(_attach, context=context))
    model.set_attn_implementation(_ATTACH)
    step()
    if not any(hasattr(module, _KEYS) for module in model.modules()):
        raise ValueError(f"decoding: {type(model).__name__} does not use transformers' AttentionInterface")
    model.set_attn_implementation(DECODE)


def detach_caches(model: PreTrainedModel) -> None:
    """Free what `attach_caches` made."""
    for module in model.modules():
        if hasattr(module, _KEYS):
            for name in (_KEYS, _VALUES, _POSITION):
                delattr(module, name)


def _attach(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, context: int, **kwargs: object
) -> tuple[Tensor, None]:
    for name, new in ((_KEYS, key), (_VALUES, value)):
        batch, heads, _, width = new.shape
        module.register_buffer(name, new.new_empty(batch, heads, context, width).normal_(), persistent=False)
    position = torch.tensor([context - 1], device=key.device)
    module.register_buffer(_POSITION, position, persistent=False)
    kwargs.pop("attention_mask", None)
    return decode_attention(module, query, key, value, None, **kwargs)


AttentionInterface.register(PREFILL, sdpa_attention_forward)
AttentionInterface.register(DECODE, decode_attention)
