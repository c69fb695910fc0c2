"""A tiny model of almost any type of transformers: its default config with every size set to a small one.

Sizes that must agree become the same number, in the configs inside a config too, so that types need none of their own.
"""

import warnings

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.architectures import classes_of

_SIZES = {
    32: "hidden_size d_model dim n_embd embed_dim encoder_hidden_size decoder_hidden_size word_embed_proj_dim "
    "projection_dim image_size attention_hidden_size",
    64: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner ffn_hidden_size "
    "shared_expert_intermediate_size max_position_embeddings n_positions feed_forward_size block_ff_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk num_hidden_layers n_layer n_layers num_layers "
    "encoder_layers decoder_layers num_decoder_layers num_encoder_layers depth text_layers",
    96: "vocab_size",
    8: "head_dim d_kv patch_size kv_channels mamba_d_state qk_nope_head_dim qk_rope_head_dim v_head_dim",
    16: "moe_intermediate_size embedding_size q_lora_rank kv_lora_rank",
    1: "n_group topk_group n_shared_experts bos_token_id eos_token_id",
    0: "pad_token_id",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}


def build(model_type):
    """Return a model with random weights, the same in every call: of the first class that takes the config."""
    config_class, errors = CONFIG_MAPPING[model_type], []
    for model_class in classes_of(model_type):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _stirred(model_class(config_class(**_tiny(config_class()))).eval())
        except Exception as error:  # whatever a config of one of hundreds of types runs into
            errors.append(error)
    raise errors[0] if errors else LookupError("a part of other types: no auto class takes it")


def inputs(model):
    """Return arguments for a forward pass, random, the same in every call."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 90, (2, 7))
    makers = {
        "input_ids": lambda: tokens,
        "pixel_values": lambda: torch.randn(2, 3, 32, 32),
        "input_values": lambda: torch.randn(2, 3000),
        "input_features": lambda: torch.randn(2, *_FEATURES.get(model.config.model_type, (80, 3000))),
    }
    arguments = {model.main_input_name: makers[model.main_input_name]()}
    return arguments | ({"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {})


# Whisper's are (bins, frames).
_FRAMES_FIRST = (
    "canary nemotron3_5_asr nemotron_asr_streaming nemotron_asr_streaming_encoder parakeet_ctc parakeet_encoder "
    "parakeet_rnnt parakeet_tdt"
)
_FEATURES = {
    **dict.fromkeys(_FRAMES_FIRST.split(), (50, 80)),
    "speech_to_text": (300, 80),
    "gemma4_audio": (96, 128),
    "glmasr_encoder": (128, 300),
    "voxtral_realtime_encoder": (128, 300),
}


def _stirred(model):
    """Add noise to every parameter: what is zero or one at first would hide what reaches it."""
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape).to(parameter.dtype)
    return model


def _tiny(config):
    arguments = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            arguments[key] = _tiny(value)
        elif key in _SIZE_OF and isinstance(value, int | None) and not isinstance(value, bool):
            arguments[key] = _SIZE_OF[key]
    return arguments
