"""Models that a RemoteCache cannot serve, or not so: an error that says what to do, before anything is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("transformers.models.lfm2", reason="needs a transformers with a cache for convolutions")

from attnd.integrations.transformers import RemoteCache  # noqa: E402
from tests.e2e.test_transformers_stops import tokens  # noqa: E402
from tests.hybrid_models import make_model  # noqa: E402


def remote(client: attnd.Client, served: Any, **options: Any) -> RemoteCache:
    return RemoteCache(client, served.config, max_tokens=256, dtype=served.dtype, **options)


def test_recompute_is_refused(client) -> None:
    model, before = make_model("granite"), len(client.list_caches())
    with pytest.raises(attnd.Unsupported, match="states stay here"):
        remote(client, model, on_cache_lost="recompute", model=model)
    assert len(client.list_caches()) == before


@torch.no_grad()
def test_layers_called_by_hand_are_refused(client) -> None:
    model = make_model("lfm2")
    hidden = torch.randn(1, 3, 64)
    cache = remote(client, model)
    model(tokens(7), past_key_values=cache)
    with pytest.raises(attnd.Unsupported, match=r"begins at layer 3, but .* must begin at layer 0"):
        model.model.layers[3](hidden, position_embeddings=None, past_key_values=cache)


def test_a_model_without_attention_is_refused(client) -> None:
    with pytest.raises(attnd.Unsupported, match="falcon_mamba model has no num_attention_heads"):
        RemoteCache(client, transformers.FalconMambaConfig(), max_tokens=64, dtype=torch.float32)
    recurrent = transformers.GraniteMoeHybridConfig(num_hidden_layers=2)
    with pytest.raises(attnd.Unsupported, match="no layer of a granitemoehybrid model attends"):
        RemoteCache(client, recurrent, max_tokens=64, dtype=torch.float32)
    with pytest.raises(attnd.Unsupported, match="rwkv model has no num_attention_heads"):
        RemoteCache(client, transformers.RwkvConfig(), max_tokens=64, dtype=torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        (
            "MiMoV2Flash",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"of layer 1 are \(4, 16, 16\), but must",
        ),
        ("JetMoe", {"num_key_value_heads": 2, "kv_channels": 16}, "changes keys of layer 0 after"),
        ("DiffLlama", {}, "layer 0 attends twice in one pass"),
        ("GPTJ", {"rotary_dim": 16}, "does not heed it and cannot be served"),
    ],
)
def test_what_only_a_pass_shows(client, name: str, config: dict[str, Any], match: str) -> None:
    small = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    if name == "JetMoe":
        small = {key: small[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    if name == "GPTJ":
        small = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**small | config)).eval()
    model.set_attn_implementation("attnd")
    cache = remote(client, model)
    with pytest.raises(attnd.Unsupported, match=match):
        model(tokens(7), past_key_values=cache)
    cache.close()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("Gemma4TextConfig", r"of layer \d+ are \(.*\), but must be those of layer 0"),
        ("Llama4TextConfig", "chunked_attention, which attends within chunks"),
        ("XLNetConfig", "an? xlnet model caches hidden states"),
        ("OpenAIGPTConfig", "openai-gpt model takes no cache"),
        ("MiniMaxConfig", "takes a MiniMaxCache only"),
        ("RecurrentGemmaConfig", "keeps the states of its recurrences in its modules"),
        ("XLSTMConfig", "has no num_attention_heads"),
    ],
)
def test_what_the_configuration_shows(client, config: str, match: str) -> None:
    kind = getattr(transformers, config, None) or getattr(transformers, config.replace("XL", "xL"))
    with pytest.raises(attnd.Unsupported, match=match):
        RemoteCache(client, kind(), max_tokens=64, dtype=torch.float32)


@torch.no_grad()
def test_layers_that_attend_to_images_are_left_out_without_one(client) -> None:
    text = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [0, 2],
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    model = transformers.MllamaForCausalLM(transformers.models.mllama.MllamaTextConfig(**text)).eval()
    ids = tokens(12)
    expected = model(ids).logits
    model.set_attn_implementation("attnd")
    with remote(client, model) as cache:
        model(ids[:, :8], past_key_values=cache)
        torch.testing.assert_close(
            model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:], atol=1e-4, rtol=1e-4
        )
        assert cache.cache.info().config.num_layers == 1
        with pytest.raises(attnd.Unsupported, match=r"layer 0 attends to images \(cross_attention_layers\)"):
            model(ids, past_key_values=cache, cross_attention_states=torch.randn(1, 4, 64))
