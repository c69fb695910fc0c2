"""The experts of a layer beside dense `grouped_mm`, on tiny sizes."""

import sys

import pytest
import torch

from hf_sparse24.benchmark import experts
from hf_sparse24.benchmark.experts import MIXTURES, Mixture, benchmark_experts
from hf_sparse24.benchmark.figures import describe
from hf_sparse24.benchmark.results import OK, read_csv
from hf_sparse24.benchmark.roofline import Machine
from hf_sparse24.benchmark.timing import Timing

CPU = torch.device("cpu")
TINY = Mixture("tiny", 4, 2, 32, 16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(experts, "measure_machine", lambda device: Machine(1000.0, 100.0, 200.0))
    monkeypatch.setattr(experts, "time_stream", lambda call, device: [call(), 10.0][1])
    monkeypatch.setattr(experts, "time_calls", lambda calls, device: Timing([call() for call in calls] and 10.0, 5.0))


def test_every_candidate_is_right_and_timed():
    found = list(benchmark_experts(TINY, [1, 9], CPU))
    assert [row.tokens for rows in found for row in rows] == [1] * 8 + [9] * 8
    for rows, mode in zip(found, 2 * ["eager", "CUDA graph"], strict=True):
        assert {row.label for row in rows} == {f"tiny, 2 of 4, {mode}"}
        assert {row.host_us for row in rows} == {None if mode == "eager" else 5.0}
        assert [row.candidate for row in rows] == ["dense-bf16", "2:4-bf16", "2:4-int8", "2:4-fp8"]
        assert {row.status for row in rows} == {OK}
        assert all(row.us == 10.0 and row.over_dense_bf16 == 1.0 for row in rows)
        assert rows[0].error is None
        assert all(row.error > 0 for row in rows[2:])
    assert describe(found[0][0]) == "experts, tiny, 2 of 4, eager M=1"


def test_work_is_that_of_the_experts_that_have_tokens():
    dense, packed, int8, _ = next(benchmark_experts(TINY, [1], CPU))
    weights = 2 * (2 * 16 * 32 + 32 * 16)  # of two experts
    activations = 2 * 2 * (32 + 32 + 16 + 32)
    assert dense.bytes == 2 * weights + activations
    assert packed.bytes == (1 + 1 / 8) * weights + activations
    assert int8.bytes == (1 / 2 + 1 / 8) * weights + 2 * 4 * (32 + 32) + activations
    assert dense.flops == 2 * packed.flops == 2 * weights


def test_a_wrong_result_has_no_time(monkeypatch):
    monkeypatch.setattr(experts, "TOLERANCE", dict.fromkeys(experts.TOLERANCE, -1.0))
    rows = next(benchmark_experts(TINY, [3], CPU))
    assert all(row.status.startswith("wrong: relative error") and row.us is None for row in rows[1:])


def test_calls_of_a_graph_have_routings_of_their_own(monkeypatch):
    monkeypatch.setattr(experts, "rotations", lambda size, device: 3)
    seen = []
    monkeypatch.setattr(
        experts,
        "time_calls",
        lambda calls, device: [seen.append([call.args[0] for call in calls]), Timing(1.0, None)][1],
    )
    next(benchmark_experts(TINY, [5], CPU))
    assert len(seen) == 4
    for tokens in seen:
        assert len(tokens) == 3
        assert not torch.equal(tokens[0], tokens[1])


def test_what_cannot_run_says_why():
    rows = next(benchmark_experts(TINY, [3], CPU, ["2:4-int8"], backend="cutlass"))
    assert rows[1].status.startswith("cannot run: ValueError: backend='cutlass' cannot run here")


def test_the_shapes_are_those_of_the_models():
    assert [mixture.shapes for mixture in MIXTURES] == [
        ((28672, 4096), (4096, 14336)),
        ((1536, 2048), (2048, 768)),
    ]


def test_the_script_writes_a_csv(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    sys.modules.pop("gpu", None)
    import gpu

    monkeypatch.setattr(gpu, "MIXTURES", (TINY,))
    monkeypatch.setattr(gpu, "measure_machine", lambda device: Machine(1000.0, 100.0, 200.0))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "experts", "--out", str(tmp_path), "--device", "cpu"])
    gpu.main()
    rows, facts = read_csv(tmp_path / "performance_experts.csv")
    assert {row.tokens for row in rows} == {1, 16, 64, 4096}
    assert facts["command"] == "python benchmarks/gpu.py --only experts"
