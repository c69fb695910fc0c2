"""Prune a model to 2:4 as it is loaded, look at it, save it packed, and load it again.

    python examples/quickstart.py MODEL OUT
    python examples/quickstart.py MODEL OUT text.txt   # a language model needs text, or retraining

MODEL is a folder or a Hub id of a causal language model.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse24 import Sparse24Config, print_sparsity_report


def main():
    name, out, *text = sys.argv[1:]
    config = Sparse24Config(method="auto" if text else "magnitude", dataset=text[0] if text else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, device_map=device)
    print_sparsity_report(model)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(name).save_pretrained(out)

    reloaded = AutoModelForCausalLM.from_pretrained(out, device_map=device)
    tokens = torch.arange(16, device=device)[None]
    with torch.inference_mode():
        same = torch.equal(model(tokens).logits, reloaded(tokens).logits)
    print(f"reloaded from {out}: {'logits equal to the last bit' if same else 'the logits differ'}")


if __name__ == "__main__":
    main()
