"""A tiny model of each of many types: pruned, packed, saved, read and saved again, and run."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from hf_sparse24 import pack_, prune_
from hf_sparse24.nn import PackedModule
from hf_sparse24.nn.mixture import packable_experts
from hf_sparse24.selection import select
from tests import tiny
from tests.test_from_pretrained import assert_same_model, digests

# Those that `tests.tiny` can build small and run with one input. Not among them: what needs boxes, two modalities at
# once or a package that is not installed; what has too many weights outside its layers; and ShieldGemma 2, which
# transformers 5.23 saves under names that it does not read. `test_architectures` has every type.
_TYPES = """
afmoe aimv2_vision_model albert apertus arcee aria aria_text audioflamingo3 aya_vision bart beam beit bert
bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert canary canine
chinese_clip_vision_model clip clip_text_model clip_vision_model cohere cohere2 cohere2_moe cohere2_vision
colmodernvbert colpali convbert cosmos3_omni cpmant ctrl cwm data2vec-audio data2vec-text data2vec-vision deberta
deberta-v2 deepseek_v4 deepseek_vl deit diffllama dinov2 dinov2_with_registers dinov3_vit distilbert doge dots1 dpr
electra embedding_gemma2 embedding_gemma2_text encoder-decoder ernie ernie4_5 esm eurobert evolla exaone4
exaone_moe falcon falcon_h1 fastspeech2_conformer flava flex_olmo flint fnet focalnet fsmt funnel fuyu gemma gemma2
gemma3 gemma3_text gemma4_unified gemma4_unified_text git glm glm4 glm4_moe glmasr glmasr_encoder glpn got_ocr2
gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite granite_docling_text granite_speech
granite_speech_plus granite_swa granitemoe granitemoe_swa granitemoeshared gte helium higgs_audio_v2 hrm_text
hubert hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax hyperclovax_vision_v2 idefics2 idefics3 ijepa
imagegpt inkling2_text inkling_text internlm3 internvl internvl_vision iquestcoder jais2 jetmoe jina_embeddings_v3
kolibri1 kosmos-2.5 laguna layoutlm led lfm2 lfm2_vl lighton_ocr llama llama4_text llava llava_next
llava_next_video llava_onevision longformer longt5 m2m_100 marian markuplm mbart megatron-bert mellum metaclip_2
mimo_v2_flash minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral
mlcd mlcd_vision_model mllama mobilebert mobilevit modernbert modernbert-decoder modernvbert molmo2_text moonshine
moshi moss_transcribe_diarize mpnet mpt mra mt5 muse_glimmer_text muse_spark_text mvp nanochat nemotron
nemotron3_5_asr nemotron_asr_streaming nemotron_asr_streaming_encoder nemotron_h nllb-moe nomic_bert nystromformer
olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt openai_privacy_filter opt ovis2 paligemma parakeet_ctc
parakeet_encoder parakeet_rnnt parakeet_tdt pegasus pegasus_x persimmon phi phi3 phi4_multimodal phimoe pixio
pixtral plbart pop2piano pp_chart2table prophetnet pvt_v2 qianfan_ocr qianfan_ocr_vision qwen2 qwen2_audio
qwen2_moe qwen3 qwen3_asr qwen3_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text
radio rembert roberta roberta-prelayernorm roformer rwkv sam3_vit_model sam_hq_vision_model sam_vision_model
sapiens2 seamless_m4t seamless_m4t_v2 seed_oss segformer sew sew-d siglip siglip_vision_model smollm3 smolvlm
solar_open speech_to_text speecht5 stablelm starcoder2 swiftformer switch_transformers t5 t5gemma t5gemma2 tapas
tipsv2 tipsv2_text_model tipsv2_vision_model trocr ultrabert ultravbert umt5 unispeech unispeech-sat unlimited_ocr
vaultgemma video_llama_3 video_llava vipllava vision-encoder-decoder visual_bert vit vit_mae vit_msn vitdet voxtral
voxtral_realtime_encoder wav2vec2 wav2vec2-conformer wavlm whisper xglm xlm-roberta xlm-roberta-xl xlnet yolos yoso
"""
TYPES = _TYPES.split()

# Older configs that take no arguments for the configs inside them.
SINCE_5_23 = ("aria", "colmodernvbert", "colpali", "encoder-decoder", "video_llama_3", "vision-encoder-decoder")

# Types that cannot generate from the input of `tests.tiny`.
NOT_GENERATED = {
    "pop2piano": "asks for a composer",
    "qwen3_omni_moe_thinker": "asks for images",
}

# float32, weights of 0.02: a Conv1D's addmm, FalconLinear's matmul with a transposed view and a product with a stack
# of experts sum in another order than F.linear, over two layers. All others run the same torch call.
TOLERANCE = 1e-5


def saved_dense(model_type, folder):
    """Save a dense model, and return it as transformers reads it."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if model_type in SINCE_5_23 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its config cannot be made tiny before transformers 5.23")
    model = tiny.build(model_type)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def masked_by_hand(model):
    """Return a copy in which each group of four of a target keeps its two largest; ties go to the lower column."""
    model = copy.deepcopy(model)
    for target in select(model).targets:
        weight = getattr(model.get_submodule(target.module_name), target.parameter)
        groups = weight.data.movedim(target.dim, -1).unflatten(-1, (-1, 4))
        smallest = torch.sort(groups.abs(), dim=-1, descending=True, stable=True).indices[..., 2:]
        groups.scatter_(-1, smallest, 0.0)
    return model


def outputs(model):
    """Return every tensor that a forward pass writes, by name."""
    arguments = tiny.inputs(model)
    torch.manual_seed(2)  # a few draw masks or positions
    with torch.no_grad():
        found = model(**arguments)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def generated(model):
    arguments = tiny.inputs(model)
    if arguments.pop("decoder_input_ids", None) is not None:
        arguments["decoder_start_token_id"] = 1
    found = model.generate(**arguments, max_new_tokens=3, do_sample=False)
    return found if isinstance(found, torch.Tensor) else found.sequences


def assert_same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    assert left
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=tolerance, atol=tolerance, equal_nan=True)


# In INT8 every fourth type; the others with the survey.
SOME = [pytest.param(name, marks=[pytest.mark.survey] * (number % 4 > 0)) for number, name in enumerate(TYPES)]


@pytest.mark.parametrize("model_type", TYPES)
def test_round_trip(model_type, tmp_path, magnitude):
    dense = saved_dense(model_type, tmp_path / "dense")
    model_class, expected = type(dense), masked_by_hand(dense)

    masked = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude(pack=False))
    assert_same(outputs(masked), outputs(expected))
    assert not all(torch.equal(a, b) for a, b in zip(outputs(masked).values(), outputs(dense).values(), strict=True))

    packed = model_class.from_pretrained(tmp_path / "dense", quantization_config=magnitude())
    assert_same(outputs(packed), outputs(expected), TOLERANCE)
    packed.save_pretrained(tmp_path / "packed")
    read = model_class.from_pretrained(tmp_path / "packed")
    assert_same_model(packed, read)
    assert_same(outputs(packed), outputs(read))
    read.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")
    if dense.can_generate() and model_type not in NOT_GENERATED:
        assert torch.equal(generated(read), generated(packed))


@pytest.mark.parametrize("model_type", SOME)
def test_round_trip_in_int8(model_type, tmp_path, magnitude):
    if model_type == "rwkv":
        pytest.skip("RWKV divides weights in place: refused, see test_rwkv_in_8_bits")
    dense = saved_dense(model_type, tmp_path / "dense")
    made = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization="int8"))
    made.save_pretrained(tmp_path / "packed")
    read = type(dense).from_pretrained(tmp_path / "packed")
    assert_same_model(made, read)
    assert_same(outputs(made), outputs(read))
    read.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")
    selection = select(dense)
    _, left = packable_experts(dense, selection)
    assert not left
    packed = [target for target in selection.targets if target.packs or target.is_expert_stack]
    assert sum(isinstance(module, PackedModule) for module in read.modules()) == len(packed)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_rwkv_in_8_bits(quantization, magnitude):
    model = tiny.build("rwkv")
    prune_(model, magnitude())
    with pytest.raises(ValueError, match="divides weights in place every 6 layers"):
        pack_(model, quantization)
    model.config.rescale_every = 0
    pack_(model, quantization)
    assert all(value.isfinite().all() for value in outputs(model).values())


def test_wavlm_reads_its_weights_itself():
    targets = {target.name.rpartition(".")[2]: target for target in select(tiny.build("wavlm")).targets}
    assert {name for name, target in targets.items() if target.read_by == "WavLMAttention"} == {
        "q_proj", "k_proj", "v_proj", "out_proj"
    }  # fmt: skip
    assert targets["output_dense"].packs
