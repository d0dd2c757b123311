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
