"""Tiny models of many families, built from their configs: for unit tests; claims are made on real models."""

import torch
import transformers

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE = {**SIZE, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
OLD_GPT = {"n_embd": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}

# name: (model class, config class, config)
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD_GPT),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
        | {"word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", OLD_GPT),
    "falcon": ("FalconForCausalLM", "FalconConfig", SIZE),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZE),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", SIZE),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZE),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96},
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        SIZE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", SIZE | {"embedding_size": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
        | {"tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SEQ2SEQ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": SIZE, "vision_config": IMAGE}),
    "dinov2": ("Dinov2Model", "Dinov2Config", IMAGE),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", IMAGE | {"use_swiglu_ffn": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", EXPERTS),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 8, "v_head_dim": 8},
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    ),
}

SWIN = {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4, "image_size": 64}
SWIN |= {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
WIDE_TEXT = {**SIZE, "hidden_size": 64, "num_attention_heads": 2}

# What only some tests are about: layers that share their weights, casts to the dtype of a weight, attention of torch,
# experts that are modules.
ODD_FAMILIES = {
    "zamba": (
        "ZambaForCausalLM",
        "ZambaConfig",
        SIZE
        | {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "tie_word_embeddings": True}
        | {"num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        SIZE
        | {"num_hidden_layers": 6, "num_mem_blocks": 2, "tie_word_embeddings": True, "num_key_value_heads": 4}
        | {"layers_block_type": ["linear_attention", "hybrid", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_d_state": 8}
        | {"use_shared_attention_adapter": True, "adapter_rank": 4, "chunk_size": 8, "use_mamba_kernels": False},
    ),
    "longt5": (
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
        | {"tie_word_embeddings": False},
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        GROUPED
        | {"num_layers": 1, "num_key_value_heads": 4, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16}
        | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    ),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", EXPERTS | {"intermediate_size_mlp": 64}),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
        | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "vocab_size": 96}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "router_jitter_noise": 0},
    ),
    "seamless_m4t": (
        "SeamlessM4TForTextToText",
        "SeamlessM4TConfig",
        {"hidden_size": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 96}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "bridgetower": (
        "BridgeTowerModel",
        "BridgeTowerConfig",
        {**WIDE_TEXT, "text_config": WIDE_TEXT}
        | {"vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32}},
    ),
    "mask2former": (
        "Mask2FormerModel",
        "Mask2FormerConfig",
        {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_feedforward_dim": 64}
        | {"dim_feedforward": 64, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4}
        | {"num_queries": 6},
    ),
}


def build(family, **overrides):
    """Build a tiny model with random weights; the same seed gives the same weights."""
    model_class, config_class, kwargs = (FAMILIES | ODD_FAMILIES)[family]
    torch.manual_seed(0)
    if family == "mask2former":
        overrides = {"backbone_config": transformers.SwinConfig(**SWIN)} | overrides
    config = getattr(transformers, config_class)(**{**kwargs, **overrides})
    return getattr(transformers, model_class)(config).eval()


def inputs(family):
    """Return arguments for a forward pass of the model that `build` makes."""
    torch.manual_seed(1)
    tokens = {"input_ids": torch.randint(3, 96, (2, 7))}
    decoder = {"decoder_input_ids": torch.randint(3, 96, (2, 5))}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 80, 3000)} | decoder
    if family in ("t5", "bart", "switch"):
        return tokens | decoder
    if family in ("vit", "dinov2", "dinov2_swiglu"):
        return pixels
    if family == "mask2former":
        return {"pixel_values": torch.randn(2, 3, 64, 64)}
    if family == "bridgetower":
        return tokens | pixels | {"pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}
    return tokens | pixels if family == "clip" else tokens
