"""What variants of the one-shot methods bring in one layer: relative output error on calibration and held-out tokens.

    python benchmarks/layer_errors.py        # SmolLM2's bundle (one_shot_bundles.py), a CPU, two minutes

Channel permutations reorder a layer's inputs before the groups of four are cut. In down_proj that is free, the rows of
gate_proj and up_proj take the same order; elsewhere it is shown as a bound only.
"""

import torch
from common import write
from one_shot_data import load

from hf_sparse24.criteria import alps as alps_module
from hf_sparse24.criteria.alps import alps
from hf_sparse24.criteria.objective import layer_objective
from hf_sparse24.criteria.refit import refit
from hf_sparse24.criteria.rounding import round_to_fp8
from hf_sparse24.criteria.sparsegpt import sparsegpt
from hf_sparse24.packing import quantize_rows
from hf_sparse24.pattern import mask_2to4, prune_2to4
from hf_sparse24.statistics import InputStatistics

BLOCKS = (2, 12, 22)
PROJECTIONS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def collect(model, batches, names):
    """Return the statistics of what some projections of the dense model read."""
    statistics = {name: InputStatistics(model.get_submodule(name).in_features) for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: statistics[name].add(args[0]))
        for name in names
    ]
    for batch in batches:
        model.base_model(batch)
    for handle in handles:
        handle.remove()
    return {name: statistic.hessian for name, statistic in statistics.items()}


def slow_alps(objective):
    """Run ALPS with a pull that grows a third as fast, up to 300 iterations."""
    growth = alps_module._GROWTH
    alps_module._GROWTH = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.02))
    try:
        return alps(objective, iterations=300)
    finally:
        alps_module._GROWTH = growth


def refitted(objective):
    """Run ALPS, then conjugate gradients on its support."""
    weight = alps(objective)
    return refit(objective, mask_2to4(weight.abs()), weight)


def in_fp8(objective):
    """Round what `refitted` returns to the nearest FP8 values."""
    values, scale = quantize_rows(refitted(objective), "fp8")
    return values.float() * scale[:, None]


def in_fp8_with_feedback(objective):
    """Round what `refitted` returns to FP8 with the errors of the other weights in view."""
    weight = refitted(objective)
    return round_to_fp8(objective, weight != 0, weight)


def by_curvature(weight, hessian):
    """Order whole groups by their share of the Hessian's diagonal, largest first."""
    groups = hessian.diagonal().view(-1, 4).sum(1).argsort(descending=True)
    return (groups[:, None] * 4 + torch.arange(4)).flatten()


def dealt_out(weight, hessian):
    """Sort inputs by their summed saliency and deal them out to the groups back and forth."""
    ranked = (weight.abs() * hessian.diagonal().sqrt()).sum(0).argsort(descending=True).view(4, -1).clone()
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().flatten()


def in_order(order, method):
    """Wrap a method so that it sees the inputs in another order."""

    def solve(weight, hessian):
        order_of = order(weight, hessian)
        pruned = method(layer_objective(weight[:, order_of], hessian[order_of][:, order_of]))
        return pruned[:, order_of.argsort()]

    return solve


def plain(method):
    return lambda weight, hessian: method(layer_objective(weight, hessian))


VARIANTS = {
    "magnitude": lambda weight, hessian: prune_2to4(weight),
    "sparsegpt": plain(sparsegpt),
    "sparsegpt, groups by curvature": in_order(by_curvature, sparsegpt),
    "sparsegpt, permuted": in_order(dealt_out, sparsegpt),
    "alps": plain(alps),
    "alps + refit": plain(refitted),
    "alps + refit, fp8": plain(in_fp8),
    "alps + refit, fp8 with feedback": plain(in_fp8_with_feedback),
    "alps, 300 slow iterations": plain(slow_alps),
    "alps, permuted": in_order(dealt_out, alps),
}


@torch.no_grad()
def main():
    bundle = load("smollm2")
    model = bundle["model"]()
    windows = torch.cat([batch["input_ids"] for batch in bundle["calibration"]["mix"]])
    names = [f"model.layers.{block}.{projection}" for block in BLOCKS for projection in PROJECTIONS]
    seen, held_out = collect(model, windows[:12].split(2), names), collect(model, windows[-4:].split(2), names)
    rows = []
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        for variant, solve in VARIANTS.items():
            difference = solve(weight, seen[name]) - weight
            errors = {
                key: float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())
                for key, hessian in (("calibration", seen[name]), ("held_out", held_out[name]))
            }
            rows.append({"layer": name, "variant": variant, **{key: round(value, 5) for key, value in errors.items()}})
    write("layer_errors", rows)


if __name__ == "__main__":
    main()
