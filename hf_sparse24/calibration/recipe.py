"""How a model is pruned on calibration data, and what is to be said of it afterwards."""

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_sparse24.calibration.blocks import block_of
from hf_sparse24.calibration.fitting import Fit, Schedule
from hf_sparse24.calibration.matching import Matching


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is pruned on calibration data.

    Attributes:
        method (`str`): what chooses the mask: "magnitude", "wanda", "ria", "sparsegpt" or "alps".
        refit (`str`, *optional*): "asymmetric" or "symmetric": refit the weights that stay, against the dense model's
            output or the layer's own; None leaves what the method gives.
        dampening (`float`): share of the Hessian's mean diagonal.
        matching (`Matching`, *optional*): train each block against the dense one.
        distillation (`Schedule`, *optional*): train the whole model against the dense one at the end.
        quantization (`str`, *optional*): "int8" or "fp8", what the model will be packed in: later blocks, matching and
            distillation see the rounding of linear projections, and a refit for "fp8" ends on its values.
        smooth (`bool`): even out what projections read, for 8-bit activations, without changing any output.
        seed (`int`): of the order of batches in training.
    """

    method: str = "alps"
    refit: str | None = "asymmetric"
    dampening: float = 0.01
    matching: Matching | None = None
    distillation: Schedule | None = None
    quantization: str | None = None
    smooth: bool = False
    seed: int = 0

    @property
    def follows_dense(self) -> bool:
        """Whether the hidden states of the dense model are needed along the way."""
        matches_dense = self.matching is not None and self.matching.target == "dense"
        return self.refit == "asymmetric" or matches_dense or self.distillation is not None

    def facts(self) -> dict[str, Any]:
        """Return what the record of a model says of it, in plain JSON values."""
        return {key: value for key, value in asdict(self).items() if key not in ("method", "seed")}


@dataclass
class Walked:
    """What was done.

    Attributes:
        raised_dampening (`dict`): the dampening of each projection whose Hessian needed more than was asked for.
        matched (`dict`): the held-out error of each matched block, before and after.
        distilled (`Fit`, *optional*): the held-out divergence from the dense model, before and after distillation.
        smoothed (`dict`): how many norms of each block were rescaled.
    """

    raised_dampening: dict[str, float] = field(default_factory=dict)
    matched: dict[str, Fit] = field(default_factory=dict)
    distilled: Fit | None = None
    smoothed: dict[str, int] = field(default_factory=dict)

    def of_block(self, name: str) -> dict[str, Any]:
        """Return what is to be said of one block, in plain JSON values."""
        raised = {key: value for key, value in self.raised_dampening.items() if block_of(key) == name}
        matched = asdict(self.matched[name]) if name in self.matched else None
        return {"raised_dampening": raised, "matched": matched, "smoothed": self.smoothed.get(name, 0)}

    def add(self, name: str, facts: dict[str, Any]) -> None:
        """Take over what `of_block` said of a block, in an earlier run."""
        self.raised_dampening |= facts["raised_dampening"]
        if facts["matched"]:
            self.matched[name] = Fit(**facts["matched"])
        if facts["smoothed"]:
            self.smoothed[name] = facts["smoothed"]

    def facts(self) -> dict[str, Any]:
        """Return what the record of a model says of it, in plain JSON values: nothing of what did not happen."""
        facts: dict[str, Any] = {
            "raised_dampening": self.raised_dampening,
            "distilled": self.distilled and asdict(self.distilled),
        }
        facts["smoothed_norms"] = sum(self.smoothed.values())
        fits = list(self.matched.values())
        if fits:
            facts["matched"] = {key: sum(getattr(fit, key) for fit in fits) / len(fits) for key in ("before", "after")}
        return {key: value for key, value in facts.items() if value}
