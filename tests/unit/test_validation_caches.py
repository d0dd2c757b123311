"""A cache that somebody asks for: defaults, ranges, lease and name."""

from __future__ import annotations

import math

import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.v1 import backend_pb2, cache_pb2, tensor_pb2
from attnd_server.attention.config import AttentionBackend, AttentionConfig, Layout, PrecisionMode
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.config import ServerConfig
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.service import validation
from tests.unit.wire_messages import tensor

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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, KVSplitConfig(chunk_size=0, max_splits=128, batch_invariant=None)),
        ({"chunk_size": 16, "max_splits": 1}, KVSplitConfig(16, 1)),
        ({"chunk_size": 1 << 20, "max_splits": 1024}, KVSplitConfig(1 << 20, 1024)),
        ({"batch_invariant": True}, KVSplitConfig(batch_invariant=True)),
        ({"batch_invariant": False}, KVSplitConfig(batch_invariant=False)),
    ],
)
def test_the_cut_of_kv_is_automatic_unless_given(fields, expected):
    assert validation.cache_config(cache_config(kv_split=cache_pb2.KvSplit(**fields))).kv_split == expected


CHUNK_SIZES = "must be 0 or a power of two in 16..1048576"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("chunk_size", 8, CHUNK_SIZES),
        ("chunk_size", 48, CHUNK_SIZES),
        ("chunk_size", 1 << 21, CHUNK_SIZES),
        ("chunk_size", 2**32 - 1, CHUNK_SIZES),
        ("max_splits", 1025, "must be 1..1024"),
        ("max_splits", 2**32 - 1, "must be 1..1024"),
    ],
)
def test_cuts_of_kv_are_refused(name, value, rule):
    with pytest.raises(InvalidRequest) as caught:
        validation.cache_config(cache_config(kv_split=cache_pb2.KvSplit(**{name: value})))
    assert str(caught.value) == f"kv_split.{name} is {value}, but {rule}"
    assert caught.value.field == f"kv_split.{name}"


def test_every_value_of_the_wire_is_known():
    for value in backend_pb2.Backend.values():
        validation.cache_config(cache_config(backend=value))
    for value in cache_pb2.Precision.values():
        validation.cache_config(cache_config(precision=value))
    for value in cache_pb2.Layout.values():
        validation.cache_config(cache_config(layout=value))


def scales(*values, dtype="float32"):
    return tensor(values, dtype)


BACKENDS = "auto, naive, sdpa, triton, triton_grouped, flash_attn, xformers"
DTYPES = "DTYPE_FLOAT32, DTYPE_FLOAT16 or DTYPE_BFLOAT16"
FP8 = "DTYPE_FLOAT8_E4M3FN"


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
        ({"kv_dtype": 3}, "kv_dtype", f"kv_dtype is DTYPE_BFLOAT16, but must be DTYPE_FLOAT16 as dtype, or {FP8}"),
        ({"kv_dtype": 99}, "kv_dtype", f"kv_dtype is 99, but must be DTYPE_FLOAT16 as dtype, or {FP8}"),
        ({"k_scales": scales(1.0)}, "k_scales", f"k_scales is given, but must be absent unless kv_dtype is {FP8}"),
        ({"v_dtype": 3}, "v_dtype", f"v_dtype is DTYPE_BFLOAT16, but must be DTYPE_FLOAT16 as dtype, or {FP8}"),
        ({"v_dtype": 99}, "v_dtype", f"v_dtype is 99, but must be DTYPE_FLOAT16 as dtype, or {FP8}"),
        (
            {"v_dtype": tensor_pb2.DTYPE_FLOAT8_E4M3FN, "k_scales": scales(1.0)},
            "k_scales",
            f"k_scales is given, but must be absent unless kv_dtype is {FP8}",
        ),
        (
            {
                "kv_dtype": tensor_pb2.DTYPE_FLOAT8_E4M3FN,
                "v_dtype": tensor_pb2.DTYPE_FLOAT16,
                "v_scales": scales(1.0),
            },
            "v_scales",
            f"v_scales is given, but must be absent unless v_dtype is {FP8}",
        ),
        ({"num_pages": 2**32 - 1}, "num_pages", "num_pages is 4294967295, but must be 1..2147483647"),
    ],
)
def test_configurations_are_refused(changes, field, text):
    with pytest.raises(InvalidRequest) as caught:
        validation.cache_config(cache_config(**changes))
    assert str(caught.value) == text
    assert caught.value.field == field


def test_pages_have_the_type_of_calls_or_fp8_with_scales():
    for kv_dtype in (tensor_pb2.DTYPE_UNSPECIFIED, tensor_pb2.DTYPE_FLOAT16):
        assert validation.cache_config(cache_config(kv_dtype=kv_dtype)).kv_dtype is torch.float16
    message = cache_config(kv_dtype=tensor_pb2.DTYPE_FLOAT8_E4M3FN)
    config = validation.cache_config(message)
    assert config.kv_dtype is torch.float8_e4m3fn
    assert (config.k_scales, config.v_scales) == ((1.0,), (1.0,))
    message.k_scales.CopyFrom(scales(0.5))
    message.v_scales.CopyFrom(scales(0.25, 2.0, 3.0))
    config = validation.cache_config(message)
    assert (config.k_scales, config.v_scales) == ((0.5,), (0.25, 2.0, 3.0))


def test_v_has_the_type_of_k_unless_it_is_given():
    half, fp8 = tensor_pb2.DTYPE_FLOAT16, tensor_pb2.DTYPE_FLOAT8_E4M3FN
    for given, kv_dtype, v_dtype in (
        ({}, torch.float16, torch.float16),
        ({"v_dtype": half}, torch.float16, torch.float16),
        ({"kv_dtype": fp8}, torch.float8_e4m3fn, torch.float8_e4m3fn),
        ({"kv_dtype": fp8, "v_dtype": half, "k_scales": scales(0.5)}, torch.float8_e4m3fn, torch.float16),
        ({"v_dtype": fp8, "v_scales": scales(0.5)}, torch.float16, torch.float8_e4m3fn),
    ):
        config = validation.cache_config(cache_config(**given))
        assert (config.kv_dtype, config.v_dtype) == (kv_dtype, v_dtype)
        assert config.k_scales == ((0.5,) if "k_scales" in given else (1.0,))
        assert config.v_scales == ((0.5,) if "v_scales" in given else (1.0,))


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        (scales(), "v_scales has 0 elements, but must have 1, or one for each of the 3 KV heads"),
        (scales(1, 1), "v_scales has 2 elements, but must have 1, or one for each of the 3 KV heads"),
        (scales(1, 0, 1), "v_scales[1] is 0, but must be positive, finite and a normal float32"),
        (scales(-2), "v_scales[0] is -2, but must be positive, finite and a normal float32"),
        (scales(math.nan), "v_scales[0] is nan, but must be positive, finite and a normal float32"),
        (scales(math.inf), "v_scales[0] is inf, but must be positive, finite and a normal float32"),
        (scales(2**-127), "v_scales[0] is 5.87747e-39, but must be positive, finite and a normal float32"),
        (tensor([[1.0]], "float32"), "v_scales has shape [1, 1], but must be [num_scales]"),
        (scales(1, dtype="int32"), "v_scales has dtype int32, but must be float32"),
    ],
)
def test_scales_are_refused(refused, text):
    with pytest.raises(InvalidRequest) as caught:
        validation.cache_config(cache_config(kv_dtype=tensor_pb2.DTYPE_FLOAT8_E4M3FN, v_scales=refused))
    assert str(caught.value) == text
    assert caught.value.field == "v_scales"


def test_the_server_checks_its_own_configurations_too():
    geometry = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 8, "num_pages": 1}
    with pytest.raises(InvalidRequest, match=r"^kv_dtype is torch\.float32, but must be torch\.bfloat16 as dtype"):
        AttentionConfig(**geometry, kv_dtype=torch.float32)
    with pytest.raises(InvalidRequest, match=r"^k_scales is given, but must be absent unless kv_dtype is"):
        AttentionConfig(**geometry, k_scales=(2.0,))
    with pytest.raises(InvalidRequest, match=r"^max_splits is 0, but must be 1\.\.1024$"):
        KVSplitConfig(max_splits=0)


SERVER = ServerConfig(default_ttl_s=30.0, max_ttl_s=3600.0)


def create(**fields):
    request = cache_pb2.CreateCacheRequest(**{"config": cache_config()} | fields)
    return validation.create_cache(request, SERVER)


def test_a_lease():
    shape, ttl_s, name = create(ttl_s=1.0, name="x" * 128)
    assert shape == CacheShape.of(validation.cache_config(cache_config()))
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
