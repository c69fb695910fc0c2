"""Calibration text that the dense model writes itself, for users who have no data.

Sampled at temperature 1, a model writes what it has learned to expect, which is what one-shot pruning has to keep
(Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning", arXiv:2410.17170). A window
begins with the model's first token, then comes a token that no other window has there: drawn from the model's own
distribution, but without replacement, because many chat models begin almost every text with the same word. The rest is
plain sampling. An end-of-text token does not end a window: what the model writes after it is its next text.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

# Decoding holds one position of activations and no loss, so more windows fit than in a batch of calibration.
_WINDOWS_PER_STEP = 4


@torch.no_grad()
def sample_windows(model: PreTrainedModel, count: int, sequence_length: int, batch_size: int, seed: int) -> Tensor:
    """Let the model write `count` texts of exactly `sequence_length` tokens.

    The model's generation config, training mode and the global random state are afterwards what they were. The same
    seed gives the same text on the same device and for the same batch size.

    Args:
        model (`PreTrainedModel`): a decoder-only model that can generate.
        count (`int`): number of windows.
        sequence_length (`int`): tokens per window, the first token of the model included.
        batch_size (`int`): the batch size of calibration; four times as many windows are sampled at once.
        seed (`int`): of all that is random.

    Returns:
        `Tensor`: (count, sequence_length) int64 on the CPU.

    Raises:
        `ValueError`: the model is no decoder-only model that can generate.
    """
    check_writes_text(model)
    asked = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=sequence_length, use_cache=True
    )
    with (
        _generating(model, asked),
        torch.random.fork_rng(devices=range(torch.accelerator.device_count())),
        logging.tqdm(total=count * sequence_length, desc="Writing calibration text", unit="token") as bar,
    ):
        torch.manual_seed(seed)
        prompts = _prompts(model, count)[:, :sequence_length].split(_WINDOWS_PER_STEP * batch_size)
        return torch.cat([_continue(model, prompt, asked, bar) for prompt in prompts]).cpu()


def check_writes_text(model: Any) -> None:
    """Raise `ValueError` when a model cannot write calibration text itself."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(
            "'self' lets the model write its own calibration text, which takes a generative decoder-only model; "
            f"{type(model).__name__} is none. Give text or batches of model inputs instead."
        )


class _Progress(BaseStreamer):
    """Show on a bar, which all batches share, the tokens that `generate` hands out at every step."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def put(self, value: Tensor) -> None:
        self._bar.update(value.numel())

    def end(self) -> None:
        pass


@contextmanager
def _generating(model: PreTrainedModel, generation_config: GenerationConfig) -> Iterator[None]:
    """Sample as `generation_config` says: what it leaves open, `generate` would take from the model's own."""
    own, training = model.generation_config, [module for module in model.modules() if module.training]
    model.generation_config = generation_config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        for module in training:
            module.training = True


def _continue(model: PreTrainedModel, prompt: Tensor, asked: GenerationConfig, bar: Any) -> Tensor:
    if prompt.shape[1] == asked.max_length:
        return prompt
    whole = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=whole, generation_config=asked, streamer=_Progress(bar))


def _prompts(model: PreTrainedModel, count: int) -> Tensor:
    """Return how the windows begin: (count, 2) with a first token, (count, 1) for a model that has none."""
    embedding = model.get_input_embeddings().weight
    start = _first_token(model, len(embedding))
    if start is None:
        logits = torch.zeros(len(embedding), device=embedding.device)
    else:
        logits = model(torch.tensor([[start]], device=embedding.device)).logits[0, -1].float().to(embedding.device)
    # The largest of logits plus Gumbel noise are a sample without replacement, even where a softmax would underflow.
    order = (logits - torch.empty_like(logits).exponential_().log()).topk(min(count, len(logits))).indices
    second = order.repeat(math.ceil(count / len(order)))[:count, None]
    return second if start is None else torch.cat([torch.full_like(second, start), second], dim=1)


def _first_token(model: PreTrainedModel, vocabulary: int) -> int | None:
    """Return the token before every text: BOS, else EOS, which stands between texts; None if there is neither."""
    for key in ("bos_token_id", "eos_token_id"):
        token = getattr(model.config.get_text_config(), key, None)
        token = token[0] if isinstance(token, list | tuple) and token else token
        if isinstance(token, int) and 0 <= token < vocabulary:
            return token
    return None
