"""Seconds to prune, check, pack and unpack one 4096 x 14336 weight, per dtype."""

import torch
from common import median_seconds, write

from hf_sparse24.packing import VALUE_DTYPES, pack_weight, unpack_weight
from hf_sparse24.pattern import apply_mask_, find_violations, mask_2to4

SHAPE = (4096, 14336)


def main():
    rows = []
    for dtype in VALUE_DTYPES:
        weight = (torch.randn(SHAPE) * 30).clamp(-127, 127).to(dtype)
        scores = weight.abs() if dtype != torch.float8_e4m3fn else weight.float().abs()
        mask = mask_2to4(scores)
        pruned = apply_mask_(weight.clone(), mask)
        packed = pack_weight(pruned)
        copy = weight.clone()
        calls = {
            "mask": lambda scores=scores: mask_2to4(scores),
            "apply_mask_": lambda weight=copy, mask=mask: apply_mask_(weight, mask),
            "find_violations": lambda pruned=pruned: find_violations(pruned),
            "pack": lambda pruned=pruned: pack_weight(pruned),
            "unpack": lambda packed=packed: unpack_weight(packed),
        }
        if dtype in (torch.bfloat16, torch.float16, torch.float32):
            for quantization in ("int8", "fp8"):
                calls[f"pack {quantization}"] = lambda pruned=pruned, q=quantization: pack_weight(pruned, q)
        rows += [
            {"shape": "4096x14336", "dtype": str(dtype), "what": what, "seconds": round(median_seconds(call), 3)}
            for what, call in calls.items()
        ]
    write("packing", rows)


if __name__ == "__main__":
    main()
