"""What pruning costs: perplexity of a causal language model on a text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging


@torch.inference_mode()
def perplexity(model: nn.Module, token_ids: Tensor, window: int = 512, batch_size: int = 2) -> float:
    """Return exp of the mean negative log-likelihood per predicted token, over windows that do not overlap.

    Each window is read on its own, so its first token predicts without context and is not scored itself. Compare
    figures of the same window length only. The loss is computed in float32.

    Args:
        model (`nn.Module`): a causal language model of transformers.
        token_ids (`Tensor`): (tokens,) int64; a rest shorter than `window` is dropped.
        window (`int`): tokens per window.
        batch_size (`int`): windows per forward pass.

    Raises:
        `ValueError`: there is less than one window of tokens.
    """
    windows = token_ids[: len(token_ids) // window * window].view(-1, window)
    if window < 2 or not len(windows):
        raise ValueError(
            f"perplexity needs a window of at least 2 tokens and one window of text; got {len(token_ids)}."
        )
    device = next(model.parameters()).device
    total = 0.0
    for batch in logging.tqdm(windows.split(batch_size), desc="Perplexity", unit="batch", leave=False):
        logits = model(batch.to(device)).logits[:, :-1].float()
        targets = batch[:, 1:].to(device)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (window - 1)))
