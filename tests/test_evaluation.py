import math

import pytest
import torch

from hf_sparse24.evaluation import perplexity


class UniformModel(torch.nn.Module):
    """Predicts every token of a vocabulary of 7 with the same probability."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(7))

    def forward(self, ids):
        return type("Output", (), {"logits": self.weight.expand(*ids.shape, 7)})


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    assert perplexity(UniformModel(), torch.randint(0, 7, (70,)), window=10) == pytest.approx(7)


def test_it_is_the_exponential_of_the_mean_loss(tiny_llama):
    ids = torch.randint(0, 96, (40,))
    losses = [tiny_llama(window[None], labels=window[None]).loss.item() for window in ids.view(4, 10)]
    assert perplexity(tiny_llama, ids, window=10, batch_size=3) == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_a_rest_shorter_than_a_window_is_dropped(tiny_llama):
    ids = torch.randint(0, 96, (25,))
    assert perplexity(tiny_llama, ids, window=10) == perplexity(tiny_llama, ids[:20], window=10)


def test_too_little_text_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="one window of text; got 5"):
        perplexity(tiny_llama, torch.zeros(5, dtype=torch.int64), window=10)
