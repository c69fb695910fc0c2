"""Where packed layers live: sizes that device maps are made of, and weights that come and go for each call."""

import gc

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

from hf_sparse24 import Sparse24Config, Sparse24Linear, pack_, prune_
from tests.families import build
from tests.test_from_pretrained import QUANTIZATIONS, digests

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request):
    return request.param


@pytest.fixture
def packed(quantization):
    model = build("llama")
    prune_(model, Sparse24Config(method="magnitude"))
    pack_(model, quantization)
    return model


@pytest.fixture
def sizes(monkeypatch):
    """Return what transformers reckons for the modules of a model, on the meta device as when it places them."""
    found = []

    def spy(model, *args, **kwargs):
        modules, leaves = compute_module_sizes(model, *args, **kwargs)
        found.append({"device": next(model.parameters()).device.type} | modules)
        return modules, leaves

    monkeypatch.setattr("transformers.integrations.accelerate.compute_module_sizes", spy)
    return found


def tensor_bytes(model, *names):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if name.endswith(names or ""))


@pytest.mark.parametrize("with_gpu", [False, True])
def test_a_packed_model_is_as_large_as_its_tensors(packed, sizes, tmp_path, monkeypatch, with_gpu):
    packed.save_pretrained(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("this test says whether there is a GPU")
    monkeypatch.setattr("hf_sparse24.quantizer.torch.cuda.is_available", lambda: with_gpu)
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    # On a GPU what libraries read in place of the indices comes on top, as large as they are.
    metadata = tensor_bytes(packed, "weight_indices") if with_gpu else 0
    assert sizes[0]["device"] == "meta"
    assert sizes[0][""] == tensor_bytes(packed) + metadata
    layers = [sizes[0][f"model.layers.{number}"] for number in range(2)]
    assert layers == [tensor_bytes(packed.model.layers[0]) + metadata // 2] * 2


def test_a_dense_checkpoint_is_placed_as_it_is_loaded(sizes, tmp_path, magnitude, quantization):
    dense = build("llama")
    dense.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": "1GB"},
        quantization_config=magnitude(quantization=quantization),
    )
    assert sizes[0][""] == tensor_bytes(dense)
    assert isinstance(model.model.layers[0].mlp.up_proj, Sparse24Linear)


def placed_bytes(model, room, quantizer=None):
    """Return how many bytes of a model an automatic map puts on each device; the devices need not exist."""
    places = infer_auto_device_map(model, room, ["LlamaDecoderLayer"], hf_quantizer=quantizer)
    placed = dict.fromkeys(room, 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owners = [key for key in places if not key or f"{name}.".startswith(f"{key}.")]
        placed[places[max(owners, key=len)]] += tensor.nbytes
    return placed


def test_automatic_maps_use_what_packing_saves(quantization):
    model = build("llama", num_hidden_layers=12)
    prune_(model, Sparse24Config(method="magnitude"))
    size = tensor_bytes(model)
    room = {0: int(0.42 * size), 1: int(0.42 * size), "cpu": 10 * size}
    assert placed_bytes(model, room)["cpu"] > 0
    pack_(model, quantization)
    placed = placed_bytes(model, room, model.hf_quantizer)
    assert placed["cpu"] == 0
    assert sum(placed.values()) == tensor_bytes(model)
    assert all(placed[device] <= room[device] for device in (0, 1))


@pytest.mark.parametrize("way", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_layers_come_for_each_call(packed, tokens, tmp_path, way):
    expected = packed(tokens).logits
    where = {"offload_dir": tmp_path} if way is accelerate.disk_offload else {}
    way(packed, execution_device=torch.device("cpu"), **where)
    for _ in range(2):
        assert packed.model.layers[0].mlp.up_proj.weight.is_meta
        assert torch.equal(packed(tokens).logits, expected)
    # Another input: nothing that belongs to the weight of the call before may be left.
    assert not torch.equal(packed(tokens.flip(-1)).logits, expected)


def test_a_dispatched_model_is_saved_as_it_was(packed, tokens, tmp_path):
    packed.save_pretrained(tmp_path / "packed")
    expected = packed(tokens).logits
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = accelerate.dispatch_model(packed, places, main_device="cpu", offload_dir=tmp_path / "offloaded")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_a_map_that_runs_out_of_memory_is_refused_before_weights_are_read(packed, form, tmp_path, magnitude):
    model, request = (packed, {}) if form == "packed" else (build("llama"), {"quantization_config": magnitude()})
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    with pytest.raises(ValueError, match="would be neither pruned nor checked; this device_map has 'disk'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": 20_000}, **request)


def wide(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=2, vocab_size=512)).to(dtype).eval()


@pytest.mark.gpu
def test_the_reckoned_size_is_what_a_gpu_holds(quantization, tmp_path):
    model = wide()
    prune_(model, Sparse24Config(method="magnitude"))
    pack_(model, quantization)
    model.save_pretrained(tmp_path)
    del model
    gc.collect()  # what other tests have left is not to be freed in between
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    held = torch.cuda.memory_allocated() - before
    reckoned = tensor_bytes(model, ".weight", ".weight_scale", ".weight_indices", "_inv_freq", "inv_freq")
    reckoned += tensor_bytes(model, ".weight_indices")
    tensors = 4 * len(list(model.parameters()))
    # Each tensor takes a multiple of 512 bytes.
    assert reckoned * 0.95 - 512 * tensors <= held <= reckoned * 1.05 + 512 * tensors


@pytest.mark.gpu
@TWO_GPUS
def test_an_automatic_map_over_two_gpus(quantization, tmp_path, magnitude):
    wide().save_pretrained(tmp_path / "dense")
    ids = torch.randint(0, 512, (2, 100), device="cuda")
    one = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map="cuda:0", quantization_config=magnitude(quantization=quantization)
    )
    one.save_pretrained(tmp_path / "packed")
    request = {"quantization_config": magnitude(quantization=quantization)}
    for folder, asked in (("dense", request), ("packed", {})):
        two = AutoModelForCausalLM.from_pretrained(tmp_path / folder, device_map="balanced", **asked)
        places = {module.weight.device.index for module in two.modules() if isinstance(module, Sparse24Linear)}
        assert places == {0, 1}
        with torch.no_grad():
            assert torch.equal(two(ids).logits.to(0), one(ids).logits)
        two.save_pretrained(tmp_path / "again")
        assert digests(tmp_path / "packed") == digests(tmp_path / "again")


@pytest.mark.gpu
@TWO_GPUS
def test_calibrated_pruning_of_a_model_on_two_gpus(tmp_path):
    wide(torch.float32).save_pretrained(tmp_path)
    batches = [{"input_ids": torch.randint(0, 512, (2, 64))} for _ in range(4)]
    weights = []
    for device_map in ("cuda:0", "balanced"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        prune_(model, Sparse24Config(method="wanda", refit=False, match_blocks=False), batches)
        weights.append({name: parameter.cpu() for name, parameter in model.named_parameters()})
    same = [(weights[1][name] == weight).float().mean() for name, weight in weights[0].items()]
    assert min(same) > 0.999  # sums on another device: a near tie may fall otherwise
