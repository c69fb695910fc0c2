"""Shapes, candidates, rows of projections and their timing."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from hf_sparse24.benchmark import candidates, gemm, timing
from hf_sparse24.benchmark.candidates import BASELINES, OURS, chosen
from hf_sparse24.benchmark.gemm import TOLERANCE, benchmark_projections, relative_errors
from hf_sparse24.benchmark.roofline import Machine, projection_work
from hf_sparse24.benchmark.shapes import Shape, layer_groups, model_shapes, parse_shapes, skeleton
from hf_sparse24.benchmark.timing import Timing, rotations, time_calls
from hf_sparse24.pattern import prune_2to4

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture
def quick(monkeypatch):
    """Time nothing: a CPU takes milliseconds for an FP8 product."""
    monkeypatch.setattr(gemm, "time_calls", lambda calls, device: Timing(float(len(calls)), 2.0))
    monkeypatch.setattr(gemm, "measure_machine", lambda device: Machine(1000.0, 100.0, 200.0))


def rows_of(kinds, tokens=(1, 5, 33), workload=None):
    workload = workload or [[Shape(48, 64)]]
    return [row for rows in benchmark_projections(workload, tokens, kinds, CPU) for row in rows]


def test_shapes_of_a_model_have_their_roles():
    found = {str(shape): shape.label for shape in model_shapes(skeleton(LLAMA))}
    assert found == {"64x64": "q o", "32x64": "k v", "160x64": "gate up", "64x160": "down"}


def test_a_transposed_layer_is_not_measured_transposed():
    model = skeleton(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40))
    assert {str(shape) for shape in model_shapes(model)} == {"96x32", "32x32", "128x32", "32x128"}


def test_projections_of_one_input_are_a_group():
    groups = layer_groups(skeleton(LLAMA))
    assert [[shape.label for shape in group] for group in groups] == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    merged = layer_groups(skeleton(LLAMA), merged=True)
    assert [str(group[0]) for group in merged] == ["128x64", "64x64", "320x64", "64x160"]
    assert sum(map(len, merged)) == 4


def test_gate_and_up_do_not_share_with_attention_in_a_flat_layer():
    flat = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict()])})
    for name in ("q_proj", "gate_proj", "v_proj", "up_proj", "o_proj", "fc1"):
        flat["layers"][0][name] = torch.nn.Linear(8, 8)
    assert [[s.label for s in g] for g in layer_groups(flat)] == [["q", "v"], ["gate", "up"], ["o"], ["fc1"]]


@pytest.mark.parametrize("text", ["", "12", "12x", "0x4", "8x6", "8x4;8x8", "-8x4"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(ValueError, match="--shapes takes OUTxIN"):
        parse_shapes(text)


@pytest.mark.parametrize("name", [*BASELINES, *(f"2:4-{name or 'bf16'}" for name in OURS)])
def test_every_candidate_computes_the_product(name, kernel_device):
    if name.startswith("torch-sparse") and kernel_device == "cpu":
        pytest.skip("torch's 2:4 needs a GPU")
    kind = (BASELINES | {f"2:4-{key or 'bf16'}": kind for key, kind in OURS.items()})[name]
    weight = torch.randn(64, 128, device=kernel_device).bfloat16()
    weight[3] /= 50  # a channel, and below a token, that one scale for all would ruin in INT8
    weight = prune_2to4(weight) if kind.sparse else weight
    projection = kind(weight.clone())
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, 128, device=kernel_device).bfloat16()
        x[0] /= 30
        prepared = projection.prepare(projection.place(x))
        output = projection.finished(projection.multiply(prepared), prepared, tokens)
        assert output.shape == (tokens, 64)
        expected = (x.double() @ weight.double().t()).float()
        error, _ = relative_errors(output, expected)
        assert error < TOLERANCE[kind.precision]
    small = (output[:, 3].float() - expected[:, 3]).norm() / expected[:, 3].norm()
    assert small < TOLERANCE[kind.precision]


def test_rows_have_the_ratio_of_the_same_precision(quick, monkeypatch):
    times = iter([12.0, 6.0, 4.0, 5.0, 8.0, 3.0, 2.0])
    monkeypatch.setattr(gemm, "time_calls", lambda calls, device: Timing(next(times), 1.0))
    names = "dense-fp8,dense-fp8-tensor,dense-int8"
    rows = {row.candidate: row for row in rows_of(chosen("none,int8,fp8", names), tokens=[4])}
    assert [row.us for row in rows.values()] == [12, 6, 4, 5, 8, 3, 2]
    found = {name: (row.over_same_precision, row.over_dense_fp8, row.over_dense_bf16) for name, row in rows.items()}
    assert found["2:4-bf16"] == (12 / 8, 4 / 8, 12 / 8)
    assert found["2:4-int8"] == (5 / 3, 4 / 3, 12 / 3)
    assert found["2:4-fp8"] == (4 / 2, 4 / 2, 12 / 2)  # the better of the two dense ones


def test_a_group_is_checked_projection_by_projection(quick):
    rows = rows_of(chosen("int8", "dense-int8"), workload=layer_groups(skeleton(LLAMA)))
    assert {row.status for row in rows} == {"ok"}
    assert rows[0].shape == "64x64+32x64+32x64 64x64 160x64+160x64 64x160"
    assert rows[0].label == "q+k+v o gate+up down"


class Scaled(candidates.DenseBf16):
    """As a kernel that forgets a scale."""

    def multiply(self, prepared):
        return 0.9 * super().multiply(prepared)


class OneColumn(candidates.DenseBf16):
    """As a kernel that does not reach the last output."""

    def multiply(self, prepared):
        output = super().multiply(prepared)
        output[:, -1] = 0
        return output


class NotANumber(candidates.DenseBf16):
    def multiply(self, prepared):
        return super().multiply(prepared).fill_(float("nan"))


class Broken(candidates.DenseBf16):
    def multiply(self, prepared):
        raise RuntimeError("no such kernel\nand a long trace")


class Unbuildable(candidates.DenseBf16):
    def __init__(self, weight, backend="auto"):
        raise ImportError("nothing here")


@pytest.mark.parametrize("kind", [Scaled, OneColumn, NotANumber])
def test_what_is_wrong_has_no_time(quick, kind):
    for row in rows_of({"dense-bf16": candidates.DenseBf16, "wrong": kind}, tokens=[64]):
        assert row.status.startswith("wrong: relative error") == (row.candidate == "wrong")
        assert (row.us is None) == (row.over_dense_bf16 is None) == (row.candidate == "wrong")


@pytest.mark.parametrize(("kind", "reason"), [(Broken, "no such kernel"), (Unbuildable, "nothing here")])
def test_what_fails_says_why_and_the_others_go_on(quick, kind, reason):
    broken, dense = rows_of({"broken": kind, "dense-bf16": candidates.DenseBf16}, tokens=[2])
    assert broken.status == f"cannot run: {'RuntimeError' if kind is Broken else 'ImportError'}: {reason}"
    assert (dense.status, dense.us) == ("ok", 1.0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--against takes dense-bf16"):
        chosen("int8", "dense-int4")
    with pytest.raises(ValueError, match="--quantization takes none, int8, fp8"):
        chosen("int4", "dense-int8")
    assert list(chosen("fp8", "dense-int8")) == ["dense-bf16", "dense-int8", "2:4-fp8"]


def test_work_is_what_the_formats_store():
    weights = 4096 * 1024
    sizes = {(16, False): 2, (16, True): 1.125, (8, False): 1, (8, True): 0.625}  # bytes a weight
    for (bits, sparse), size in sizes.items():
        work = projection_work(4096, 1024, 0, bits, sparse)
        assert work.bytes - (4 * 4096 if bits == 8 else 0) == size * weights
        assert projection_work(4096, 1024, 3, bits, sparse).flops == (3 if sparse else 6) * weights
        assert projection_work(4096, 1024, 3, bits, sparse).bytes == work.bytes + 2 * 3 * (4096 + 1024)


def test_the_floor_is_the_slower_of_moving_and_multiplying():
    machine = Machine(copy_gb_s=1000, tflops_16=100, tflops_8=200)
    few, many = (projection_work(4096, 4096, tokens, 16, False) for tokens in (1, 4096))
    assert machine.floor_us(few) == pytest.approx(few.bytes / 1e12 * 1e6)
    assert machine.floor_us(many) == pytest.approx(2 * 4096**3 / 1e14 * 1e6)
    assert machine.floor_us(projection_work(4096, 4096, 4096, 8, True)) == pytest.approx(4096**3 / 2e14 * 1e6)


def test_rotations_exceed_the_cache_and_a_cpu_needs_none(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50 * 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert rotations(10 * 2**20, torch.device("cuda")) == 20
    assert rotations(2**30, torch.device("cuda")) == 1
    assert rotations(1, CPU) == 1


def test_time_grows_with_the_work():
    small, large = torch.randn(8, 8), torch.randn(384, 384)
    few, many = (time_calls([lambda x=x: x @ x] * 2, CPU).us for x in (small, large))
    assert 0 < few < many / 5
    assert timing.time_stream(lambda: large @ large, CPU) > 5 * few


@pytest.mark.gpu
def test_graphs_are_timed_on_a_gpu():
    weights = [torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    x = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16)
    found = time_calls([lambda weight=weight: x @ weight for weight in weights], torch.device("cuda"))
    assert 0.5 < found.us < 200
    assert 0.5 < found.host_us < 1000


class FakeGraph:
    """Runs what was called during its capture."""

    def __init__(self):
        self.captured = []

    def replay(self):
        clock.now += sum(self.captured)


class Clock:
    now = 0.0


clock = Clock()


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU whose clock moves by what a call says it takes, in microseconds, and whose host takes 3 for each."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.time = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.time - self.time) / 1e3

    @contextmanager
    def graph(target):
        before = len(calls)
        yield
        target.captured = calls[before:]

    class Stream:
        def wait_stream(self, other):
            pass

    for name, value in {
        "Event": Event,
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda *device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 3e-6 * len(calls))

    def call_of(microseconds):
        def call():
            calls.append(microseconds)
            clock.now += microseconds

        return call

    return call_of


@pytest.mark.parametrize("microseconds", [[7.0], [5.0, 9.0], [2500.0, 2500.0]])
def test_the_time_of_a_graph_is_divided_by_its_calls(fake_gpu, microseconds):
    found = time_calls([fake_gpu(each) for each in microseconds], torch.device("cuda"))
    assert found.us == pytest.approx(sum(microseconds) / len(microseconds))
    if found.us > 300:
        assert found.host_us is None
    else:
        assert found.host_us == pytest.approx(3)
