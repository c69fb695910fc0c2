"""Generate with a static cache, compiled on a GPU, and count tokens a second: a dense model beside a 2:4 one.

    python examples/serve_generate.py MODEL PACKED
    python examples/serve_generate.py MODEL PACKED --no_compile   # where there is no compiler

On a machine without sparse kernels (see `hf-sparse24 env`) the packed model runs as a dense one, and is no faster.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

import hf_sparse24  # noqa: F401  (teaches transformers the packed format)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("packed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_compile", action="store_true")
    return parser.parse_args()


def seconds(model, prompt, args):
    """Return the median time of a generation; two runs before it compile and choose algorithms."""
    times = []
    for _ in range(args.repeats + 2):
        started = time.perf_counter()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=args.no_compile,
            pad_token_id=0,
        )
        output.sum().item()  # waits for the GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main():
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for what in ("dense", "packed"):
        model = AutoModelForCausalLM.from_pretrained(getattr(args, what), device_map=device).eval()
        vocabulary = model.config.get_text_config().vocab_size
        prompt = torch.randint(0, vocabulary, (args.batch, args.prompt_tokens), device=device)
        rate = args.batch * args.new_tokens / seconds(model, prompt, args)
        print(f"{what:>6}: {rate:9.1f} tokens/s, prompt included")
        del model


if __name__ == "__main__":
    main()
