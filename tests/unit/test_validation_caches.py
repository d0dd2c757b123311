"""A cache that somebody asks for: defaults, ranges, lease and name."""

from __future__ import annotations

import math

import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.v1 import backend_pb2, cache_pb2, tensor_pb2
from attnd_server import validation
from attnd_server.config import AttentionBackend, AttentionConfig, Layout, PrecisionMode, ServerConfig

GEOMETRY = {
    "num_layers": 30,
    "num_kv_heads": 3,
    "head_dim": 64,
    "page_size": 16,
    "num_pages": 256,
    "dtype": tensor_pb2.DTYPE_FLOAT16,
}


def cache_config(**changes):
    return cache_pb2.CacheConfig(**GEOMETRY | changes)


def test_defaults_are_filled_in():
    assert validation.cache_config(cache_config()) == AttentionConfig(
        num_layers=30,
        num_kv_heads=3,
        head_dim=64,
        head_dim_v=64,
        page_size=16,
        num_pages=256,
        dtype=torch.float16,
        layout=Layout.UNIFIED,
        backend=AttentionBackend.AUTO,
        precision=PrecisionMode.AUTO,
    )


def test_every_choice_is_taken():
    message = cache_config(
        head_dim_v=32,
        layout=cache_pb2.LAYOUT_DISTINCT,
        precision=cache_pb2.PRECISION_FP32,
        backend=backend_pb2.BACKEND_SDPA,
    )
    config = validation.cache_config(message)
    assert config.head_dim_v == 32
    assert config.layout is Layout.DISTINCT
    assert config.precision is PrecisionMode.FP32
    assert config.backend is AttentionBackend.SDPA


def test_every_value_of_the_wire_is_known():
    for value in backend_pb2.Backend.values():
        validation.cache_config(cache_config(backend=value))
    for value in cache_pb2.Precision.values():
        validation.cache_config(cache_config(precision=value))
    for value in cache_pb2.Layout.values():
        validation.cache_config(cache_config(layout=value))


BACKENDS = "auto, naive, sdpa, triton, triton_grouped, flash_attn, xformers"
DTYPES = "DTYPE_FLOAT32, DTYPE_FLOAT16 or DTYPE_BFLOAT16"


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"dtype": 0}, "dtype", f"dtype is DTYPE_UNSPECIFIED, but must be {DTYPES}"),
        ({"dtype": 4}, "dtype", f"dtype is DTYPE_INT32, but must be {DTYPES}"),
        ({"dtype": 99}, "dtype", f"dtype is 99, but must be {DTYPES}"),
        ({"layout": 9}, "layout", "layout is 9, but must be LAYOUT_UNIFIED or LAYOUT_DISTINCT"),
        ({"precision": 9}, "precision", "precision is 9, but must be a value of Precision"),
        ({"backend": 99}, "backend", f"backend is 99, but must be one of {BACKENDS}"),
        ({"num_layers": 0}, "num_layers", "num_layers is 0, but must be 1..1024"),
        ({"num_kv_heads": 1025}, "num_kv_heads", "num_kv_heads is 1025, but must be 1..1024"),
        ({"head_dim": 20}, "head_dim", "head_dim is 20, but must be a multiple of 8"),
        ({"head_dim": 520}, "head_dim", "head_dim is 520, but must be 8..512"),
        ({"head_dim_v": 4}, "head_dim_v", "head_dim_v is 4, but must be 8..512"),
        ({"page_size": 0}, "page_size", "page_size is 0, but must be 1..1024"),
        ({"num_pages": 0}, "num_pages", "num_pages is 0, but must be 1..2147483647"),
        ({"num_pages": 2**32 - 1}, "num_pages", "num_pages is 4294967295, but must be 1..2147483647"),
    ],
)
def test_configurations_are_refused(changes, field, text):
    with pytest.raises(InvalidRequest) as caught:
        validation.cache_config(cache_config(**changes))
    assert str(caught.value) == text
    assert caught.value.field == field


SERVER = ServerConfig(default_ttl_s=30.0, max_ttl_s=3600.0)


def create(**fields):
    request = cache_pb2.CreateCacheRequest(**{"config": cache_config()} | fields)
    return validation.create_cache(request, SERVER)


def test_a_lease():
    config, ttl_s, name = create(ttl_s=1.0, name="x" * 128)
    assert config == validation.cache_config(cache_config())
    assert ttl_s == 1.0
    assert name == "x" * 128
    assert create()[1:] == (30.0, "")
    assert create(ttl_s=3600.0)[1] == 3600.0


@pytest.mark.parametrize("ttl_s", [-1.0, 0.5, 3600.5, math.inf, -math.inf, math.nan, 5e-324])
def test_leases_are_refused(ttl_s):
    with pytest.raises(InvalidRequest) as caught:
        create(ttl_s=ttl_s)
    assert str(caught.value) == f"ttl_s is {ttl_s:g}, but must be 0 or 1..3600 seconds"
    assert caught.value.field == "ttl_s"


def test_a_long_name_is_refused():
    with pytest.raises(InvalidRequest, match=r"^name has 129 characters, but must have at most 128$"):
        create(name="x" * 129)


def test_a_request_without_configuration_is_refused():
    with pytest.raises(InvalidRequest, match=r"^config is absent, but must be given$"):
        create(config=None)
