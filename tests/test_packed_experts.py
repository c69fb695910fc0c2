"""Mixtures of experts from a dense checkpoint to a packed one and back: what is stored, what runs, what is left."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse24 import Sparse24Config, pack, pack_, prune_, set_backend_, sparsity_report, unpack_
from hf_sparse24.kernels import experts
from hf_sparse24.nn import PackedModule, Sparse24Experts, Sparse24Linear
from hf_sparse24.pattern import find_violations
from tests.families import build, inputs
from tests.kernels.emulated_device import emulated_device
from tests.test_from_pretrained import assert_same_model, digests

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"]
QUANTIZATIONS = [None, "int8", "fp8"]
# Relative error of the logits of a token, after two tiny layers with weights of 0.02: the residual stream hides most.
ERROR = {None: 1e-6, "int8": 0.02, "fp8": 0.06}


def saved(family, folder):
    model = build(family)
    model.save_pretrained(folder)
    return type(model)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def logits(model, family="mixtral"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def stacks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Experts)}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", MIXTURES)
def test_from_dense_files_to_packed_files_and_back(family, quantization, tmp_path, magnitude):
    model_class = saved(family, tmp_path / "dense")
    masked = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude(pack=False))
    packed = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization=quantization))
    assert stacks(packed)
    expected = logits(masked, family)
    errors = ((logits(packed, family) - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten().sort().values
    # In 8 bits one token of gpt_oss is so near to two experts that it goes to the other one.
    assert errors[-2 if quantization else -1] <= ERROR[quantization]
    packed.save_pretrained(tmp_path / "packed")
    read = model_class.from_pretrained(tmp_path / "packed")
    assert_same_model(packed, read)
    assert torch.equal(logits(packed, family), logits(read, family))
    read.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")

    unpack_(read)
    assert not stacks(read)
    assert {name for name, _ in read.named_parameters()} == {name for name, _ in masked.named_parameters()}
    read.save_pretrained(tmp_path / "unpacked")
    masked.save_pretrained(tmp_path / "masked")
    found, wanted = tensors(tmp_path / "unpacked"), tensors(tmp_path / "masked")
    assert found.keys() == wanted.keys() == tensors(tmp_path / "dense").keys()
    for name in wanted:
        assert torch.equal(found[name] == 0, wanted[name] == 0) or quantization  # 8 bits round small values to zero
        assert torch.equal(found[name], wanted[name]) or quantization


def test_what_stands_in_a_file(tmp_path, magnitude):
    model_class = saved("mixtral", tmp_path / "dense")
    dense = tensors(tmp_path / "dense")
    assert dense["model.layers.0.block_sparse_moe.experts.3.w1.weight"].shape == (64, 32)
    packed = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization="int8"))
    packed.save_pretrained(tmp_path / "packed")
    experts = {
        name.partition("experts.")[2]: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in tensors(tmp_path / "packed").items()
        if "layers.0.block_sparse_moe.experts" in name
    }
    assert experts == {
        "gate_up_proj.weight": ((4, 128, 16), torch.int8),
        "gate_up_proj.weight_indices": ((4, 128, 4), torch.uint8),
        "gate_up_proj.weight_scale": ((4, 128), torch.float32),
        "down_proj.weight": ((4, 32, 32), torch.int8),
        "down_proj.weight_indices": ((4, 32, 8), torch.uint8),
        "down_proj.weight_scale": ((4, 32), torch.float32),
    }


@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_that_was_never_loaded(family, tmp_path, magnitude):
    model = build(family)
    prune_(model, magnitude())
    model.save_pretrained(tmp_path / "masked")
    pack_(model, "fp8")
    model.save_pretrained(tmp_path / "packed")
    read = type(model).from_pretrained(tmp_path / "packed")
    assert_same_model(model, read)
    unpack_(model)
    model.save_pretrained(tmp_path / "unpacked")
    assert tensors(tmp_path / "unpacked").keys() == tensors(tmp_path / "masked").keys()


@pytest.mark.parametrize("family", MIXTURES)
def test_generate(family, magnitude):
    model = build(family)
    prune_(model, magnitude())
    tokens = inputs(family)["input_ids"]
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    pack_(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), expected)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, family), logits(model, family), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_calibrated_experts_pack(method, tokens):
    model = build("qwen3_moe")
    prune_(model, Sparse24Config(method=method, quantization="int8"), calibration=[tokens])
    expected = logits(model, "qwen3_moe")
    pack_(model, "int8")
    assert len(stacks(model)) == 4
    assert (logits(model, "qwen3_moe") - expected).norm() <= ERROR["int8"] * expected.norm()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_report_counts_them(quantization, magnitude):
    model = build("gpt_oss")
    prune_(model, magnitude())
    dense = {row.name: row for row in sparsity_report(model).rows}
    assert not any(row.reason for row in dense.values() if row.state == "pruned")
    pack_(model, quantization)
    rows = {row.name: row for row in sparsity_report(model).rows}
    assert rows.keys() == dense.keys()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    row, module = rows[name], stacks(model)[name]
    assert (row.state, row.role, row.shape) == ("packed", "gate_up", (4, 128, 32))
    assert (row.density, row.violating_groups) == (0.5, 0) or quantization
    assert row.bytes_dense == dense[name].bytes_stored
    # A value for every second weight, and half a byte of indices and a scale beside them.
    scales = 4 * 4 * 128 if quantization else 0
    assert row.bytes_stored == 4 * 128 * (16 * module.weight.itemsize + 32 // 8) + scales


def test_lora_trains_on_top(magnitude):
    peft = pytest.importorskip("peft")
    model = build("mixtral")
    prune_(model, magnitude())
    pack_(model, "int8")
    before = {name: stack.weight.clone() for name, stack in stacks(model).items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    arguments = inputs("mixtral")
    adapted(**arguments, labels=arguments["input_ids"]).loss.backward()
    # What is before the experts of the first layer learns through all of them.
    gradient = adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()
    for name, stack in stacks(model).items():
        assert torch.equal(stack.weight, before[name])
        assert stack.weight.grad is None


def test_each_packed_stack_is_freed_when_its_dense_one_is_there(magnitude, monkeypatch):
    model = build("mixtral")
    prune_(model, magnitude())
    pack_(model)
    alive, make = [], Sparse24Experts.to_stack
    packed = weakref.WeakSet(stacks(model).values())
    monkeypatch.setattr(Sparse24Experts, "to_stack", lambda stack: alive.append(len(packed)) or make(stack))
    unpack_(model)
    assert alive == [4, 3, 2, 1]


class TestLeft:
    """Experts that stay dense tensors with zeros, and what is said of them."""

    def reasons(self, model):
        return {row.reason for row in sparsity_report(model).rows if "experts" in row.name}

    def round_trip(self, model, folder):
        model.save_pretrained(folder)
        read = type(model).from_pretrained(folder)
        assert_same_model(model, read)
        read.save_pretrained(folder.with_name("again"))
        assert digests(folder) == digests(folder.with_name("again"))

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
    def test_of_some_layers(self, family, tmp_path, magnitude):
        model_class = saved(family, tmp_path / "dense")
        config = magnitude(modules_to_not_convert=["layers.0.mlp.experts"])
        model = model_class.from_pretrained(tmp_path / "dense", quantization_config=config)
        assert all(".layers.1." in name for name in stacks(model))
        assert find_violations(model.model.layers[0].mlp.experts.down_proj.data).count
        assert self.reasons(model) >= {"modules_to_not_convert", None}
        self.round_trip(model, tmp_path / "packed")

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    def test_with_one_projection_dense(self, family, tmp_path, magnitude):
        model_class = saved(family, tmp_path / "dense")
        config = magnitude(target_modules=["q_proj", "experts.gate_up_proj"])
        model = model_class.from_pretrained(tmp_path / "dense", quantization_config=config)
        assert not stacks(model)
        assert not find_violations(model.model.layers[0].mlp.experts.gate_up_proj.data).count
        reason = "packs only together with down_proj, which stays dense"
        assert self.reasons(model) == {reason, "not in target_modules"}
        self.round_trip(model, tmp_path / "packed")

    def test_with_a_forward_of_their_own(self, tmp_path, magnitude, caplog):
        model = build("longcat_flash")
        prune_(model, magnitude())
        expected = logits(model)
        pack_(model)
        assert not stacks(model)
        reason = "LongcatFlashExperts has a forward of its own, which reads the weights of its experts"
        assert self.reasons(model) == {reason}
        assert f"Experts stay dense tensors with zeros: {reason}." in caplog.text
        assert torch.equal(logits(model), expected)
        self.round_trip(model, tmp_path / "packed")

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
    def test_in_files_from_before_experts_could_be_packed(self, family, tmp_path, magnitude, monkeypatch):
        model_class = saved(family, tmp_path / "dense")
        with monkeypatch.context() as patch:
            patch.setattr(pack, "packable_experts", lambda model, selection: ({}, {}))
            old = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization="int8"))
        assert any(isinstance(module, Sparse24Linear) for module in old.modules())
        assert not stacks(old)
        self.round_trip(old, tmp_path / "packed")


class TestRefused:
    def test_a_dense_stack_is_not_packed(self):
        model = build("mixtral")
        with pytest.raises(ValueError, match="Packing needs 2:4 weights"):
            pack_(model)
        assert not any(isinstance(module, PackedModule) for module in model.modules())

    def test_a_stack_that_is_not_finite_changes_nothing(self, magnitude):
        model = build("mixtral")
        prune_(model, magnitude())
        weight = model.model.layers[1].mlp.experts.down_proj.data
        weight[0, 0, weight[0, 0].nonzero()[0]] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj holds 1 NaN"):
            pack_(model)
        assert not any(isinstance(module, PackedModule) for module in model.modules())

    def test_damaged_files(self, tmp_path, magnitude):
        model = build("gpt_oss")
        prune_(model, magnitude())
        pack_(model, "int8")
        model.save_pretrained(tmp_path)
        whole = tensors(tmp_path)
        name = "model.layers.0.mlp.experts.down_proj"

        def read(changed):
            save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
            return type(model).from_pretrained(tmp_path)

        without = {key: tensor for key, tensor in whole.items() if key != f"{name}.weight_scale"}
        with pytest.raises(ValueError, match="weight_scale is missing"):
            read(without)
        with pytest.raises(ValueError, match=r"down_proj\.weight_indices has shape \(3, 32, 8\) where format 1 has"):
            read(whole | {f"{name}.weight_indices": whole[f"{name}.weight_indices"][:3].clone()})
        indices = whole[f"{name}.weight_indices"].clone()
        indices[2, 5, 1] = 0
        with pytest.raises(ValueError, match=r"weight_indices is not ascending, the first time at .* \(2, 5, 2\)"):
            read(whole | {f"{name}.weight_indices": indices})
        read(whole)

    def test_saving_experts_alone_which_transformers_would_replace_by_random_ones(self, tmp_path, magnitude):
        names = ["experts.gate_up_proj", "experts.down_proj"]
        model_class = saved("mixtral", tmp_path / "dense")
        read = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude(target_modules=names))
        model = build("mixtral")
        prune_(model, magnitude(target_modules=names))
        pack_(model)
        for packed in (read, model):
            assert torch.equal(logits(packed), logits(model))
            with pytest.raises(ValueError, match="Pack a linear projection too, such as q_proj, or save it after"):
                packed.save_pretrained(tmp_path / "packed")
            unpack_(packed)
            packed.save_pretrained(tmp_path / "unpacked")

    def test_a_stack_alone_is_not_unpacked(self):
        with pytest.raises(ValueError, match="for a single layer call its"):
            unpack_(Sparse24Experts(2, 8, 8))


def test_roles_and_format_in_the_config(tmp_path, magnitude):
    model = build("mixtral")
    prune_(model, magnitude())
    pack_(model)
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["format_version"] == 1
    assert {"gate_up", "down"} <= set(entry["roles"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which needs no emulation")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_on_an_emulated_gpu(family, monkeypatch, magnitude):
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 128)
    model = build(family, num_hidden_layers=1, head_dim=32, **sizes).bfloat16()
    prune_(model, magnitude())
    arguments = {"input_ids": torch.randint(3, 96, (2, 100))}
    with emulated_device(monkeypatch) as library, torch.no_grad():
        expected = model(**arguments).logits.float()
        pack_(model, "int8")
        found = model(**arguments).logits.float()
        assert (found - expected).norm() <= 0.1 * expected.norm()
        # One launch runs the four experts, each of about a hundred of 200 tokens; the library has the other layers.
        assert {problem.tokens for problem in library.problems} == {208}
        monkeypatch.setattr(experts, "most_grouped_rows", lambda *arguments: 0)
        set_backend_(model, "auto")
        assert (model(**arguments).logits.float() - expected).norm() <= 0.1 * expected.norm()
        assert sum(problem.tokens < 200 for problem in library.problems) >= 6  # an expert each, twice
        before = len(library.problems)
        set_backend_(model, "nvrtc")
        assert (model(**arguments).logits.float() - expected).norm() <= 0.1 * expected.norm()
        assert len(library.problems) == before
        with pytest.raises(ValueError, match="backend='cutlass' does not take"):
            set_backend_(model, "cutlass")
