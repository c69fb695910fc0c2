"""Masks that are learned while the weights stay as they are: MaskLLM (arXiv:2409.17481).

Each group of four has six logits, one a pattern. Forward passes take a mask of probabilities, sampled by a Gumbel
softmax that grows harder from step to step; the gradient of the masked weight gives that of the logits in closed form.
What is deployed is the likeliest pattern with the original weights.
"""

import zlib
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from hf_sparse24.pattern import GROUP_SIZE
from hf_sparse24.training.policies.base import Moving, Weight

PATTERNS = [[float(column in pair) for column in range(GROUP_SIZE)] for pair in combinations(range(GROUP_SIZE), 2)]
_BETAS = (0.9, 0.999)
_FIXED_BY = {"temperature": (4.0, 0.05), "scale": (100.0, 500.0)}  # from the first step to the last


class Learned(Moving):
    """Learn which weights stay; nothing else of the model is trained. Begin with the dense model.

    The masks at the start are the prior: those of a pruned model, or by magnitude. AdamW updates the logits, at the
    learning rate of the training: 5e-4 in the paper, with 2000 steps of 256 sequences. Takes 22 bytes a weight.

    Args:
        prior_strength (`float`): how far the logits of the first mask are ahead, in their standard deviations.
        weight_decay (`float`): of the logits.
        sparse_weight_reward (`float`): for the squared sum of what stays, which keeps gradients from vanishing.
        seed (`int`): of the logits and of the samples.
    """

    name = "learned"
    trains_weights = False
    shards = False

    def __init__(
        self,
        prior_strength: float = 3.0,
        weight_decay: float = 0.1,
        sparse_weight_reward: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__(refresh_steps=1)
        self.prior_strength = prior_strength
        self.weight_decay = weight_decay
        self.sparse_weight_reward = sparse_weight_reward
        self.seed = seed

    def start(self, weight: Weight) -> None:
        """Keep the dense weights, and give each pattern a logit by how well it agrees with the mask."""
        weight.state["dense"] = weight.values.clone()
        agreement = _grouped(~weight.pruned, weight.dim).float() @ _patterns(weight.values.device).T - 1
        logits = torch.randn(agreement.shape, generator=self._generator(weight, 0), device=agreement.device) * 0.01
        weight.state["logits"] = logits + agreement * logits.std() * self.prior_strength
        weight.state["first_moment"] = torch.zeros_like(logits)
        weight.state["second_moment"] = torch.zeros_like(logits)
        weight.values.masked_fill_(weight.pruned, 0)

    def before_forward_(self, weight: Weight, step: int) -> None:
        """Mask the dense weights by a sample."""
        mask = self._sample(weight, step) @ _patterns(weight.values.device)
        weight.values.copy_(weight.state["dense"] * _as_weight(mask, weight))

    def before_step_(self, weight: Weight, step: int, learning_rate: float) -> None:
        """Update the logits by the gradient of the masked weights."""
        dense = _grouped(weight.state["dense"], weight.dim).float()
        patterns = _patterns(dense.device)
        sample = self._sample(weight, step)
        of_mask = _grouped(weight.gradient, weight.dim).float() * dense
        of_mask -= 2 * self.sparse_weight_reward * dense.square() * (sample @ patterns)
        of_sample = of_mask @ patterns.T
        temperature, scale = (self._at(key, step) for key in ("temperature", "scale"))
        gradient = sample * (of_sample - (sample * of_sample).sum(-1, keepdim=True)) * (scale / temperature)
        self._update_(weight.state, gradient, step, learning_rate)

    def after_step_(self, weight: Weight, step: int) -> Tensor | None:
        """Leave the dense weights under the likeliest mask."""
        kept = _as_weight(_patterns(weight.values.device)[weight.state["logits"].argmax(-1)].bool(), weight)
        weight.pruned = ~kept
        weight.values.copy_(weight.state["dense"].masked_fill(weight.pruned, 0))
        return kept

    def _sample(self, weight: Weight, step: int) -> Tensor:
        """Return probabilities of the patterns: (groups..., 6) float32, the same whenever a step asks for them."""
        logits = weight.state["logits"]
        uniform = torch.rand(logits.shape, generator=self._generator(weight, step), device=logits.device)
        gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        return ((self._at("scale", step) * logits + gumbel) / self._at("temperature", step)).softmax(-1)

    def _generator(self, weight: Weight, step: int) -> torch.Generator:
        generator = torch.Generator(weight.values.device)
        return generator.manual_seed(zlib.crc32(f"{self.seed} {step} {weight.name}".encode()))

    def _update_(self, state: dict[str, Tensor], gradient: Tensor, step: int, learning_rate: float) -> None:
        """Take a step of AdamW."""
        logits, first, second = (state[key] for key in ("logits", "first_moment", "second_moment"))
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-8)
        logits.mul_(1 - learning_rate * self.weight_decay)
        logits.addcdiv_(first, scale, value=-learning_rate / (1 - _BETAS[0] ** step))

    def _at(self, key: str, step: int) -> float:
        first, last = _FIXED_BY[key]
        return first + (last - first) * min(1.0, (step - 1) / max(1, self.total_steps - 1))


def _grouped(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, -1).unflatten(-1, (-1, GROUP_SIZE))


def _as_weight(groups: Tensor, weight: Weight) -> Tensor:
    return groups.flatten(-2).movedim(-1, weight.dim)


@cache
def _patterns(device: torch.device) -> Tensor:
    return torch.tensor(PATTERNS, device=device)
