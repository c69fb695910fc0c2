"""Prune a language model on text, pack it in 8 bits, and say what is left of its quality.

    python examples/prune_with_calibration.py MODEL OUT text.txt
    python examples/prune_with_calibration.py MODEL OUT text.txt --quantization fp8 --num_samples 64

The last tenth of the text is held out for the evaluation; calibration never reads it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse24 import Sparse24Config, print_sparsity_report
from hf_sparse24.evaluation import Evaluation, held_out_tokens, perplexity, print_evaluations


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("text", type=Path)
    parser.add_argument("--quantization", choices=["none", "int8", "fp8"], default="int8")
    parser.add_argument("--num_samples", type=int, default=128, help="windows")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens of a window")
    return parser.parse_args()


def main():
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    window = args.sequence_length
    tokens = held_out_tokens(tokenizer, args.text.read_text("utf8"), window, windows=32)
    dense = AutoModelForCausalLM.from_pretrained(args.model, device_map=device)
    before = perplexity(dense, tokens, window)
    del dense

    config = Sparse24Config(
        quantization=None if args.quantization == "none" else args.quantization,
        dataset=str(args.text),
        tokenizer=tokenizer,
        num_samples=args.num_samples,
        sequence_length=window,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, device_map=device)
    print_sparsity_report(model)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    measured = Evaluation(
        metric="perplexity",
        value=perplexity(model, tokens, window),
        samples=len(tokens) // window,
        unit=f"windows of {window} tokens",
        dense=before,
        dataset=args.text.name,
    )
    print_evaluations([measured])
    Path(args.out, "quality.json").write_text(measured.to_json(), "utf8")  # for: hf-sparse24 card --evaluation


if __name__ == "__main__":
    main()
