"""Siblings quantize one input once, and never take a result that belongs to another."""

import copy
import gc
import pickle
import threading

import pytest
import torch

from hf_sparse24 import Sparse24Config
from hf_sparse24.kernels import dispatch
from hf_sparse24.nn import SharedInput
from hf_sparse24.pack import pack_
from hf_sparse24.prune import prune_


@pytest.fixture
def calls(monkeypatch):
    """Count the quantizations."""
    made, quantize = [], dispatch.quantize_per_token

    def counted(input, dtype):
        made.append(input.shape)
        return quantize(input, dtype)

    monkeypatch.setattr(dispatch, "quantize_per_token", counted)
    return made


def test_each_sibling_takes_it_once(calls):
    shared, x = SharedInput(3), torch.randn(4, 40)
    results = [shared.quantize(number, x, torch.int8) for number in range(3)]
    assert len(calls) == 1
    assert all(result is results[0] for result in results)
    assert torch.equal(results[0][0], dispatch.quantize_per_token(x, torch.int8)[0])
    shared.quantize(1, x, torch.int8)  # a second round begins anew
    assert len(calls) == 3


@pytest.mark.parametrize("again", [0, 1])
def test_a_write_in_between_is_seen(calls, again):
    shared, x = SharedInput(2), torch.randn(4, 40)
    shared.quantize(0, x, torch.int8)
    x.mul_(-1)
    values, _ = shared.quantize(again, x, torch.int8)
    assert torch.equal(values, dispatch.quantize_per_token(x.clone(), torch.int8)[0])


def test_the_same_sibling_never_takes_its_own(calls):
    shared, x = SharedInput(2), torch.randn(4, 40)
    shared.quantize(0, x, torch.int8)
    x.data.mul_(-1)  # which torch does not count
    values, _ = shared.quantize(0, x, torch.int8)
    assert torch.equal(values, dispatch.quantize_per_token(x.clone(), torch.int8)[0])


def test_another_tensor_dtype_or_view_is_not_it(calls):
    shared, x = SharedInput(2), torch.randn(4, 40)
    shared.quantize(0, x, torch.int8)
    shared.quantize(1, x.view(4, 40), torch.int8)
    shared.quantize(0, x, torch.float8_e4m3fn)
    assert len(calls) == 3


def test_tensors_of_inference_mode_are_always_quantized(calls):
    shared = SharedInput(2)
    with torch.inference_mode():
        x = torch.randn(4, 40)
        shared.quantize(0, x, torch.int8)
        shared.quantize(1, x, torch.int8)
    assert len(calls) == 2


def test_nothing_outlives_the_input():
    shared, x = SharedInput(3), torch.randn(4, 40)
    shared.quantize(0, x, torch.int8)
    assert shared._left is not None
    del x
    gc.collect()
    assert shared._left is None


def test_threads_get_their_own_results():
    shared, wrong = SharedInput(2), []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(4, 40, generator=generator)
            expected = dispatch.quantize_per_token(x, torch.int8)[0]
            wrong.extend(not torch.equal(shared.quantize(number, x, torch.int8)[0], expected) for number in range(2))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 400
    assert not any(wrong)


def shared_by(module):
    quantize = getattr(module, "_quantize", None)
    return quantize and quantize.func.__self__


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_packing_groups_siblings_and_copies_keep_the_groups_apart(tiny_llama, clone):
    prune_(tiny_llama, Sparse24Config(method="magnitude"))
    pack_(tiny_llama, "int8")
    copied = clone(tiny_llama)
    for model in (tiny_llama, copied):
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            siblings = ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj))
            groups = [{shared_by(module) for module in modules} for modules in siblings]
            assert [len(group) for group in groups] == [1, 1]
            assert groups[0] != groups[1]
            assert attention.o_proj._quantize is mlp.down_proj._quantize is None
    shared, others = ({id(shared_by(m)) for m in model.modules() if shared_by(m)} for model in (tiny_llama, copied))
    assert len(shared) == len(others) == 4
    assert not shared & others
