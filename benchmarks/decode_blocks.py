"""Time the block shapes of `decode.cu` on one GPU: what `kernels/decode_blocks.py` chooses from, and what it could.

    python benchmarks/decode_blocks.py                             # what it gets done in 55 seconds
    python benchmarks/decode_blocks.py --forms bf16 --shapes 4096x14336 --tokens 48,64 --blocks 60

For each projection, form and number of tokens it takes the block that is chosen and those that the fitted cost ranks
highest, compares each output with a float32 product, and times them by CUDA graphs on weights that are not in the
cache. It prints a table a case, the fastest first, and writes all of them as JSON. Activations are quantized before
the clock starts. Beside them stands the time of the library with its scales, quantization left out as well.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from hf_sparse24.benchmark.results import run_environment
from hf_sparse24.benchmark.roofline import measure_machine
from hf_sparse24.benchmark.timing import capture, rotations, time_stream, warm_up
from hf_sparse24.kernels import decode, dispatch, nvrtc
from hf_sparse24.kernels.decode_blocks import UNIT, Block, Problem, nanoseconds, tiles
from hf_sparse24.kernels.reference import quantize_per_token
from hf_sparse24.packing import PackedWeight, pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

SHAPES = "28672x4096,14336x4096,4096x14336,6144x4096,4096x4096,1024x4096"
TOKENS = "64,32,128"
QUANTIZATIONS = {"bf16": None, "w8a16-int8": "int8", "w8a16-fp8": "fp8", "w8a8-int8": "int8", "w8a8-fp8": "fp8"}
DTYPE = torch.bfloat16
ROW_TILES, ROW_WARPS, TEAMS, CLUSTERS, UNITS = (1, 2, 3, 4), (1, 2, 4, 5, 7, 8), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)
STAGES = (2, 3, 4, 6, 8)
MOST_SUMS = 32  # row tiles times token tiles: what registers hold
WARPS = range(2, 17)
GRAPH_MICROSECONDS = 800
WRONG = 0.02  # relative L2 error: rounding to bfloat16 is 0.002
SHOWN = 6


def possible_blocks(token_tiles, problem):
    """Return every block that fits, those of one kind that differ in their queues included."""
    found = []
    for shape in itertools.product(ROW_TILES, ROW_WARPS, TEAMS, UNITS, STAGES, CLUSTERS):
        block = Block(*shape[:3], token_tiles, *shape[3:])
        chunks = problem.features // (UNIT * block.units)
        useful = block.stages <= 1 + math.ceil(chunks / (block.teams * block.cluster))
        small = block.row_tiles * token_tiles <= MOST_SUMS and block.row_warps * block.teams in WARPS
        clusters = block.cluster == 1 or (problem.capability >= (9, 0) and problem.clusters_at_once(block.cluster))
        if useful and small and clusters and problem.takes(block):
            found.append(block)
    return found


def ranked(token_tiles, problem, count):
    """Return the chosen block and those that the fit ranks highest: of a kind the shortest and the longest queue."""
    chosen = tiles(token_tiles, problem)
    kinds = {}
    for block in sorted(possible_blocks(token_tiles, problem), key=lambda block: nanoseconds(block, problem)):
        kinds.setdefault((*block[:3], block.cluster), []).append(block)
    picked = {chosen: None}
    for alike in kinds.values():
        best = max(block.units for block in alike)
        queues = sorted((block for block in alike if block.units == best), key=lambda block: block.stages)
        picked |= dict.fromkeys((queues[0], queues[-1]))
        if len(picked) >= count:
            break
    return list(picked)


def token_tiles_of(tokens, input_dtype):
    most = decode.MOST_QUANTIZED_TOKENS if input_dtype.itemsize == 1 else decode.MOST_TOKENS
    return decode._TOKEN_TILES[min(tokens, most)]


def compiled(arguments):
    """Return what NVRTC makes of a block: in a process of its own, for many at once."""
    return nvrtc.compile_cuda("decode.cu", *arguments)


@contextlib.contextmanager
def forced(block):
    """Make every product take one block."""
    chosen, decode.tiles = decode.tiles, lambda *arguments: block
    decode._compiled.cache_clear()
    try:
        yield
    finally:
        decode.tiles = chosen
        decode._compiled.cache_clear()


def microseconds(calls, device):
    """Return the device time of one of some calls that do the same on different operands."""
    with torch.cuda.device(device):
        estimate = warm_up(calls)
        rounds = math.ceil(min(GRAPH_MICROSECONDS / estimate, 100) / len(calls))
        return time_stream(capture(calls, rounds).replay, device) / (rounds * len(calls))


class Case:
    """A projection, a form of it and a number of tokens, with as many copies as do not fit in the cache."""

    def __init__(self, form, outputs, features, tokens, device):
        self.form, self.tokens, self.device = form, tokens, device
        weight = prune_2to4(torch.randn(outputs, features, device=device).to(DTYPE))
        packed = pack_weight(weight, QUANTIZATIONS[form])
        copies = rotations(packed.weight.nbytes + packed.weight_indices.nbytes, device)
        self.weights = [
            PackedWeight(*(None if part is None else part.clone() for part in packed)) for _ in range(copies)
        ]
        self.x, self.scale = torch.randn(tokens, features, device=device).to(DTYPE), None
        if form.startswith("w8a8"):
            self.x, self.scale = quantize_per_token(self.x, packed.weight.dtype)
        seen = self.x.float() if self.scale is None else self.x.float() * self.scale
        self.expected = seen @ unpack_weight(packed).float().t()
        capability = nvrtc.device_capability(device.index)
        self.problem = Problem(
            outputs,
            features,
            packed.weight.dtype,
            self.x.dtype,
            capability,
            functools.partial(nvrtc.clusters_at_once, device=device.index),
        )
        self.token_tiles = token_tiles_of(tokens, self.x.dtype)

    def definitions(self, block):
        """Return what a block is compiled with."""
        return decode.definitions(self.x.dtype, self.problem.value_dtype, DTYPE, block)

    def call(self, packed):
        """Return the product with one of the copies."""
        if self.scale is None:
            return decode.few_tokens_linear(self.x, *packed, None)
        return decode.scaled_linear(self.x, self.scale, *packed, None, DTYPE)

    def time(self, block):
        """Return the microseconds of a block, or why there are none."""
        try:
            with forced(block):
                output = self.call(self.weights[0]).float()
                error = float((output - self.expected).norm() / self.expected.norm())
                if not error <= WRONG:
                    return f"wrong: relative error {error:.2g}"
                return microseconds([lambda packed=packed: self.call(packed) for packed in self.weights], self.device)
        except RuntimeError as problem:  # the driver refuses a launch
            return f"cannot run: {problem}"

    def time_library(self):
        """Return the microseconds of the library that runs this weight for many tokens, or None."""
        if self.scale is None:
            return None
        weight = (self.problem.value_dtype, self.problem.outputs, self.problem.features)
        backend = next((b for b in ("cutlass", "cusparselt") if dispatch.takes_weight(*weight, b).ok), None)
        if backend is None:
            return None
        prepared = [dispatch.prepare(packed, backend) for packed in self.weights]
        calls = [
            lambda packed=packed, form=form: dispatch.scaled_linear(
                self.x, self.scale, *packed._replace(weight=form.weight), None, DTYPE, form.metadata, backend
            )
            for packed, form in zip(self.weights, prepared, strict=True)
        ]
        return microseconds(calls, self.device)


def measure(case, blocks, until):
    """Return a row: every block with its time and the fit's."""
    rows = []
    for block in blocks:
        if time.perf_counter() > until:
            break
        us = case.time(block)
        rows.append({"block": list(block), "us": us, "fit_us": round(nanoseconds(block, case.problem) / 1e3, 2)})
    timed = sorted((row for row in rows if not isinstance(row["us"], str)), key=lambda row: row["us"])
    chosen = next((row["us"] for row in rows if row["block"] == list(blocks[0])), None)
    library = case.time_library() if time.perf_counter() < until else None
    print(
        f"\n{case.problem.outputs}x{case.problem.features} {case.form} {case.tokens} tokens, {len(timed)} of "
        f"{len(blocks)} blocks; chosen {list(blocks[0])} {chosen}; library {library}"
    )
    for row in timed[:SHOWN]:
        print(f"  {row['us']:7.2f} us, fit {row['fit_us']:7.2f}  {row['block']}")
    for row in rows:
        if isinstance(row["us"], str):
            print(f"  {row['block']}: {row['us']}")
    sys.stdout.flush()
    shape = {"n": case.problem.outputs, "k": case.problem.features, "m": case.tokens, "form": case.form}
    best = {"best": timed[0]["block"], "best_us": timed[0]["us"]} if timed else {}
    return {**shape, "picked": list(blocks[0]), "picked_us": chosen, **best, "library_us": library, "timed": rows}


def run(arguments, pool, until):
    """Return a row of each case, the binaries of the next one being made while one is timed."""
    device, binaries = torch.device(arguments.device, 0), {}
    compile_here = nvrtc.compile_cuda

    def compile_early(case):
        blocks = ranked(case.token_tiles, case.problem, arguments.blocks)
        for block in blocks:
            names = case.definitions(block)
            if frozenset(names.items()) not in binaries:
                job = pool.apply_async(compiled, ((names, case.problem.capability),))
                binaries[frozenset(names.items())] = job
        return case, blocks

    def compile_cuda(file, names, capability):
        job = binaries.get(frozenset(names.items()))
        return compile_here(file, names, capability) if job is None else job.get()

    nvrtc.compile_cuda = compile_cuda
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    rows, waiting = [], None
    for form, tokens, shape in itertools.product(
        arguments.forms.split(","), map(int, arguments.tokens.split(",")), shapes
    ):
        if form.startswith("w8a8") or tokens <= decode.MOST_TOKENS:
            following = compile_early(Case(form, *shape, tokens, device))
            if waiting and time.perf_counter() < until:
                rows.append(measure(*waiting, until))
            waiting = following
    return rows + ([measure(*waiting, until)] if waiting and time.perf_counter() < until else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="w8a8-int8,bf16", help=", ".join(QUANTIZATIONS))
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN,OUTxIN,...")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--blocks", type=int, default=10, help="of a case, at least")
    parser.add_argument("--seconds", type=float, default=55, help="after which no case is begun")
    parser.add_argument("--out", type=Path, default=Path("decode_blocks_timed.json"))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    until = time.perf_counter() + arguments.seconds
    # Started before CUDA is: a process cannot be divided afterwards.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        rows = run(arguments, pool, until)
        pool.terminate()
    device = torch.device(arguments.device, 0)
    facts = run_environment(device, " ".join(["python", *sys.argv]), measure_machine(device))
    facts["clusters_at_once"] = {size: nvrtc.clusters_at_once(size, 0) for size in CLUSTERS}
    arguments.out.write_text(json.dumps({**facts, "cases": rows}, indent=1) + "\n")
    print(f"{len(rows)} cases -> {arguments.out}; clusters at once {facts['clusters_at_once']}")


if __name__ == "__main__":
    main()
