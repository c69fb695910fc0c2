"""Quality through each GPU kernel: SmolLM2 is pruned and packed on the CPU, then scored there and by every backend.

    python benchmarks/kernel_quality.py     # needs the bundle smollm2, see one_shot_bundles.py

Wanda without a refit, which is quick. Perplexity of 8 windows of 1024 tokens of three kinds of text, bfloat16, and of
the first window of the first kind, which a CPU too has time for. A backend that does not take all of the layers
is left out with the reason; "auto" is what a user gets. Seconds are those of `from_pretrained` to the GPU.
"""

import statistics
import tempfile
import time

import torch
from common import write
from one_shot_data import MODELS, load
from transformers import AutoModelForCausalLM

from hf_sparse24 import Sparse24Config, pack_, prune_, set_backend_
from hf_sparse24.evaluation import perplexity

WINDOWS, TOKENS = 8, 1024


def main():
    bundle = load("smollm2", MODELS, torch.bfloat16)
    texts = {key: ids[: WINDOWS * TOKENS] for key, ids in test_tokens().items()}
    dense = bundle["model"]()
    rows = [{"model": "dense", "backend": "torch", **scores(dense.cuda(), texts)}]
    dense.cpu()
    pruned = bundle["model"]().float()
    prune_(
        pruned, Sparse24Config(method="sparsegpt", refit=True, match_blocks=False), bundle["calibration"]["mix"][:2]
    )
    pruned.bfloat16()
    for quantization in (None, "int8", "fp8"):
        with tempfile.TemporaryDirectory() as folder:
            packed = bundle["model"]()
            packed.load_state_dict(pruned.state_dict())
            packed.config.sparse24 = pruned.config.sparse24
            pack_(packed, quantization=quantization)
            packed.save_pretrained(folder)
            del packed
            rows += [{"quantization": quantization, **row} for row in through_every_backend(folder, texts)]
    write("kernel_quality", rows)


def test_tokens():
    from safetensors.torch import load_file

    data = load_file(MODELS / "smollm2" / "data.safetensors")
    return {key.removeprefix("test_"): ids.long().flatten() for key, ids in data.items() if key.startswith("test_")}


def scores(model, texts):
    return {**first_window(model, texts), **{key: perplexity(model, ids, TOKENS) for key, ids in texts.items()}}


def first_window(model, texts):
    key, ids = next(iter(texts.items()))
    return {f"{key}, first window": perplexity(model, ids[:TOKENS], TOKENS)}


def through_every_backend(folder, texts):
    """Return a row for the CPU and for each backend."""
    on_cpu = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"model": "2:4", "backend": "reference on the CPU", **first_window(on_cpu, texts)}]
    del on_cpu
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    for backend in ("reference", "auto", "cusparselt", "cutlass", "nvrtc"):
        try:
            set_backend_(model, backend)
        except ValueError as error:
            rows.append({"model": "2:4", "backend": backend, "refused": str(error)})
            continue
        rows.append({"model": "2:4", "backend": backend, **scores(model, texts)})
    rows[1]["seconds_to_load"] = round(statistics.median(seconds), 3)
    return rows


if __name__ == "__main__":
    main()
