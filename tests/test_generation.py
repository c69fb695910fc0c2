"""Packed models where users put them: pipelines, static caches, assisted decoding, `torch.compile`, under adapters."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    pipeline,
)

from hf_sparse24 import Sparse24Config, Sparse24Linear, pack_, prune_
from tests.families import build
from tests.test_from_pretrained import QUANTIZATIONS

# Relative error of what a packed tiny model writes: none in floating point, which runs the same torch calls.
ERROR = {None: 0.0, "int8": 0.05, "fp8": 0.15}


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request):
    return request.param


@pytest.fixture
def masked():
    """A dense-masked Llama whose weights are so large that its tokens depend on every projection."""
    model = build("llama", initializer_range=0.2)
    prune_(model, Sparse24Config(method="magnitude"))
    return model


@pytest.fixture
def packed(masked, quantization):
    model = copy.deepcopy(masked)
    pack_(model, quantization)
    return model


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")


def assert_packed(model):
    assert any(isinstance(module, Sparse24Linear) for module in model.modules())


GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 2}


class TestPipelines:
    def test_text_generation_from_a_folder(self, packed, tmp_path):
        packed.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        write = pipeline("text-generation", model=str(tmp_path), device="cpu")
        assert_packed(write.model)
        prompts = ["w5 w7 w11 w13", "w17 w19"]
        for prompt, (answer,) in zip(prompts, write(prompts, return_tensors=True, **GREEDY), strict=True):
            expected = packed.generate(write.tokenizer(prompt, return_tensors="pt").input_ids, **GREEDY)
            assert torch.equal(torch.as_tensor(answer["generated_token_ids"]), expected[0])

    def test_text_generation_that_prunes_on_the_way(self, tmp_path, quantization, magnitude):
        build("llama", initializer_range=0.2).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        request = {"quantization_config": magnitude(quantization=quantization)}
        write = pipeline("text-generation", model=str(tmp_path), device="cpu", model_kwargs=request)
        assert_packed(write.model)
        ids = write.tokenizer("w5 w7 w11", return_tensors="pt").input_ids
        (answer,) = write("w5 w7 w11", return_tensors=True, **GREEDY)
        assert torch.equal(torch.as_tensor(answer["generated_token_ids"]), write.model.generate(ids, **GREEDY)[0])

    def test_feature_extraction(self, packed, masked, quantization, tmp_path):
        packed.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        embed = pipeline("feature-extraction", model=str(tmp_path), device="cpu")
        assert_packed(embed.model)
        found = embed("w5 w7 w11 w13", return_tensors=True)
        ids = embed.tokenizer("w5 w7 w11 w13", return_tensors="pt").input_ids
        expected = masked.model(ids).last_hidden_state
        assert (found - expected).norm() <= 4 * ERROR[quantization] * expected.norm()

    def test_speech_recognition(self, quantization, tmp_path):
        letters = ["<pad>", "|", *"abcdefghijklmnop"]
        (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        sizes |= {"conv_dim": (16,) * 3, "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4), "vocab_size": 18}
        model = Wav2Vec2ForCTC(
            Wav2Vec2Config(**sizes, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, initializer_range=0.3)
        ).eval()
        prune_(model, Sparse24Config(method="magnitude"))
        sound = torch.randn(4000)
        extractor = Wav2Vec2FeatureExtractor()
        values = extractor(sound.numpy(), sampling_rate=16000, return_tensors="pt").input_values
        pack_(model, quantization)
        with torch.no_grad():
            expected = model(values).logits.argmax(-1)
        model.save_pretrained(tmp_path)
        extractor.save_pretrained(tmp_path)
        Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)
        hear = pipeline("automatic-speech-recognition", model=str(tmp_path), device="cpu")
        assert_packed(hear.model)
        text = hear(sound.numpy())["text"]
        assert text == hear.tokenizer.decode(expected[0])
        assert len(set(text)) > 1


@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens(packed, tokens):
    plain = packed.generate(tokens, **GREEDY)
    assert torch.equal(packed.generate(tokens, cache_implementation="static", **GREEDY), plain)
    assert len(set(plain[:, tokens.shape[1] :].flatten().tolist())) > 4


@pytest.mark.parametrize("who", ["target", "assistant", "both"])
@torch.no_grad()
def test_assisted_decoding_gives_the_tokens_of_the_target_alone(masked, packed, tokens, who):
    ids = tokens[:1]
    target = packed if who != "assistant" else masked
    alone = target.generate(ids, **GREEDY)
    assistant = copy.deepcopy(packed if who != "target" else masked)
    calls = []
    assistant.register_forward_hook(lambda *_: calls.append(None))
    assert torch.equal(target.generate(ids, assistant_model=assistant, **GREEDY), alone)
    assert calls
    # Half an assistant guesses wrong, and the target corrects it.
    assistant.lm_head.weight.data.neg_()
    assert torch.equal(target.generate(ids, assistant_model=assistant, **GREEDY), alone)


@pytest.mark.parametrize("quantization", [None, "int8"], indirect=True)
@torch.no_grad()
def test_a_whole_model_compiles_without_a_break(packed, tokens):
    packed.model.layers = packed.model.layers[:1]
    expected = packed(tokens, use_cache=False).logits
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_through_frozen_packed_layers(masked, packed, tokens, quantization, checkpointing):
    """Those of the first layer pass every packed layer after it; the dense-masked model has the same ones."""
    peft = pytest.importorskip("peft")
    gradients = []
    for model in (masked, packed):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable()
            adapted.train()
        adapted(tokens, labels=tokens, use_cache=False).loss.backward()
        trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert len(trained) == 8
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained.values()]))
        assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    expected, found = gradients
    # In floating point a product with the same weight, summed in another order. In 8 bits activations are rounded in
    # every layer: .03 and .14 were seen, where logits differ by .03 and .10. A wrong gradient differs by 1 or more.
    tolerance = {None: 1e-5, "int8": 0.1, "fp8": 0.4}[quantization]
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_an_automatic_class_reads_what_a_pipeline_saved(packed, tokens, tmp_path):
    packed.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    write = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    write.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(read(tokens).logits, packed(tokens).logits)
