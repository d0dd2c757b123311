"""What single families need beside small numbers."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
_MROPE_OF_HALF = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
_LATENT = {"num_key_value_heads": 4}  # as many as queries
_WINDOWED = ["sliding_attention", "full_attention"] * 2
_WINDOWS = {"layer_types": _WINDOWED, "sliding_window": 6, "use_sliding_window": True}
_RECURRENT = ["linear_attention", "full_attention"] * 2
_CONVOLUTIONS = ["conv", "full_attention"] * 2
_COMPASS = {
    "layer_types": _WINDOWED,
    "rope_parameters": {"sliding_attention": {**_ROPE, "mrope_section": [4, 2, 2]}, "full_attention": None},
}
_DOTS3 = {
    **_LATENT,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA4 = {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "layer_types": _WINDOWED}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 97,
    "hc_lowrank": 8,
    "split_ngram_parts": 1,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu", "bailing_hybrid"), _LATENT),
    **{name: {"text_config": _LATENT} for name in ("kimi_k25", "mistral_large4", "unlimited_ocr")},
    **{name: {"text_config": _MROPE} for name in ("glm4v", "paddleocr_vl")},
    **{name: {"text_config": _MROPE_OF_HALF} for name in ("glm4v_moe", "glm_ocr", "glmga")},
    "chameleon": {"vocabulary_map": {"<image>": 95}},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    **{name: {"layer_types": _CONVOLUTIONS} for name in ("lfm2", "lfm2_moe")},
    **dict.fromkeys(("dots1", "laguna", "mellum", "qwen2", "qwen2_moe", "qwen3", "smollm3"), _WINDOWS),
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "dots3_note (decoder)": _DOTS3,
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": _WINDOWED,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _RECURRENT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "prophetnet": {"num_decoder_layers": 4, "num_encoder_layers": 4},
    "prophetnet (decoder)": {"num_decoder_layers": 4, "num_encoder_layers": 4, "is_decoder": True},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp (decoder)": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 16],
        "attn_layers": ["local"] * 4,
    },
    **{name: {"decoder_start_token_id": 1} for name in ("t5", "udop")},
    "speech_to_text": {"input_feat_per_channel": 16, "max_source_positions": 64},
    "whisper": {"num_mel_bins": 16, "max_source_positions": 16},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}

_YARN = {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Families in another shape: the family, and its overrides.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, cross attention": ("bert", {"add_cross_attention": True}),
    "cohere2, all windowed": ("cohere2", {"layer_types": ["sliding_attention"] * 4}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gpt2, upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": ["full_attention"] * 4}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, one layer": ("llama", {"num_hidden_layers": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "initializer_range": 0.1}),
    "llama, wide heads": ("llama", {"head_dim": 80, "num_key_value_heads": 4}),
    "llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, window of two": ("mistral", {"sliding_window": 2}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False}),
    "qwen3, no window": ("qwen3", {"layer_types": ["full_attention"] * 4, "use_sliding_window": False}),
}

_LARGE = ("Emu3ForConditionalGeneration", "VibeVoiceAsrForConditionalGeneration", "Florence2ForConditionalGeneration")
_NEEDS_IMAGES = (
    *("BlipForConditionalGeneration", "Blip2ForConditionalGeneration", "DeepseekOcr2ForConditionalGeneration"),
    *(
        "UdopForConditionalGeneration",
        "Granite4VisionForConditionalGeneration",
        "HunYuanVLForConditionalGeneration",
        "IdeficsForVisionText2Text",
    ),
    *("InstructBlipForConditionalGeneration", "InstructBlipVideoForConditionalGeneration"),
    *("Kosmos2ForConditionalGeneration", "PPFormulaNetForConditionalGeneration", "VisionEncoderDecoderModel"),
    *("Pix2StructForConditionalGeneration", "VoxtralRealtimeForConditionalGeneration"),
)
_NEEDS_MORE = (
    *("Cosmos3EdgeForConditionalGeneration", "DiffusionGemmaForBlockDiffusion", "Dots3NoteForConditionalGeneration"),
    *("Ernie4_5_VLMoeForConditionalGeneration", "FastVlmForConditionalGeneration", "Gemma3nForConditionalGeneration"),
    *("GraniteDoclingForConditionalGeneration", "Inkling2ForConditionalGeneration", "InklingForConditionalGeneration"),
    *("Mistral4ForCausalLM", "Molmo2ForConditionalGeneration", "MuseSparkForConditionalGeneration"),
    *("Nemotron3_5TranscribeForConditionalGeneration", "NemotronH_Omni_Reasoning_V3"),
    *("PerceptionLMForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration"),
    *("Qwen3OmniMoeThinkerForConditionalGeneration", "Glm5NextForConditionalGeneration"),
)

# Classes that are left out, and why.
LEFT_OUT: dict[str, str] = {
    "BltForCausalLM": "four models in one, and no number of layers",
    "PI0ForConditionalGeneration": "generates actions, not tokens",
    **dict.fromkeys(_NEEDS_IMAGES, "answers to images only"),
    **dict.fromkeys(
        _NEEDS_MORE, "small numbers alone make no configuration of it, or it needs packages that are not here"
    ),
    **dict.fromkeys(_LARGE, "small numbers leave it with a hundred million weights"),
    **dict.fromkeys(("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"), "several codebooks a token"),
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), "a draft that reads the keys of its model"
    ),
}
