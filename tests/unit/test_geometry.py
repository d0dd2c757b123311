"""What a cache's geometry says of its memory, and which geometries there are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from attnd.errors import InvalidRequest
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.geometry import Geometry
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.snapshots.manifest import Manifest

SIZES = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "head_dim_v": 24, "num_pages": 5, "page_size": 4}
LATENT = {**SIZES, "num_kv_heads": 1, "head_dim": 576, "head_dim_v": 512, "latent": True}
HALF, NAME = torch.bfloat16, "float8_e4m3fn"


@pytest.mark.parametrize(
    ("fields", "num_bytes", "k_is_quantised", "v_is_quantised", "is_uniform"),
    [
        (SIZES, 60 * 2 * (16 + 24) * 2, False, False, True),
        ({**SIZES, "kv_dtype": FP8}, 60 * 2 * (16 + 24), True, True, True),
        ({**SIZES, "v_dtype": FP8}, 60 * 2 * (16 * 2 + 24), False, True, False),
        ({**SIZES, "kv_dtype": FP8, "v_dtype": HALF}, 60 * 2 * (16 + 24 * 2), True, False, False),
        (LATENT, 60 * 576 * 2, False, False, False),
        ({**LATENT, "kv_dtype": FP8}, 60 * 576, True, True, False),
    ],
)
def test_bytes_are_those_of_each_type(fields, num_bytes, k_is_quantised, v_is_quantised, is_uniform) -> None:
    names = {name: str(value).removeprefix("torch.") for name, value in fields.items() if name.endswith("dtype")}
    for config in (AttentionConfig(**fields), Geometry(**{**fields, **names})):
        assert config.num_bytes == num_bytes
        assert (config.k_is_quantised, config.v_is_quantised) == (k_is_quantised, v_is_quantised)
        assert config.is_quantised == (k_is_quantised or v_is_quantised)
        assert config.is_uniform == is_uniform


def test_v_is_a_part_of_a_latent_row() -> None:
    config = AttentionConfig(**LATENT, kv_dtype=FP8, k_scales=(0.5,))
    assert (config.k_shape, config.v_shape) == ((5, 4, 1, 576), (5, 4, 1, 512))
    assert config.v_scales == (0.5,)
    assert config == AttentionConfig(**LATENT, kv_dtype=FP8, k_scales=(0.5,), v_scales=(0.5,))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({**SIZES, "v_dtype": torch.float32}, "v_dtype is torch.float32, but must be torch.bfloat16 as dtype, or {}"),
        ({**SIZES, "window": -1}, "window is -1, but must be 0..4294967295"),
        ({**SIZES, "window": 2**32}, "window is 4294967296, but must be 0..4294967295"),
        ({**SIZES, "k_scales": (2.0,), "v_dtype": FP8}, "k_scales is given, but must be absent unless kv_dtype is {}"),
        (
            {**SIZES, "v_scales": (2.0,), "kv_dtype": FP8, "v_dtype": HALF},
            "v_scales is given, but must be absent unless v_dtype is {}",
        ),
        ({**SIZES, "head_dim": 520}, "head_dim is 520, but must be 8..512"),
        ({**LATENT, "head_dim": 1032}, "head_dim is 1032, but must be 8..1024"),
        ({**LATENT, "head_dim_v": 584}, "head_dim_v is 584, but must be at most head_dim, 576, of a latent cache"),
        ({**LATENT, "num_kv_heads": 2}, "num_kv_heads is 2, but must be 1 of a latent cache"),
        ({**LATENT, "layout": Layout.DISTINCT}, "layout is distinct, but must be unified of a latent cache"),
        ({**LATENT, "v_dtype": FP8}, "v_dtype is {0}, but must be torch.bfloat16 as kv_dtype of a latent cache"),
        (
            {**LATENT, "kv_dtype": FP8, "k_scales": (0.5,), "v_scales": (0.25,)},
            "v_scales is 0.25, but must be 0.5 as k_scales of a latent cache, or absent",
        ),
    ],
)
def test_what_no_cache_can_be_is_refused(fields, text) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AttentionConfig(**fields)
    assert str(caught.value).replace("torch.float8", "float8") == text.format(NAME)
    assert caught.value.field == text.split()[0]


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        (SIZES, {}),
        ({**SIZES, "kv_dtype": FP8, "v_dtype": FP8}, {}),
        ({**SIZES, "v_dtype": FP8, "v_scales": (0.5,), "window": 7}, {"v_dtype": NAME, "window": 7}),
        ({**LATENT, "kv_dtype": FP8, "k_scales": (0.5,)}, {"latent": True}),
    ],
)
def test_a_manifest_names_what_is_new_only_where_a_cache_has_it(fields, more) -> None:
    config = AttentionConfig(**fields)
    manifest = Manifest("0123456789abcdef" * 2, (5,), "bob", "", 60, CacheShape.of(config), (3,), 9, "f" * 64)
    said = json.loads(manifest.to_bytes())
    assert said["version"] == (2 if more else 1)
    written = said["groups"][0] if more else said["config"]
    assert not more or written.pop("layers") == [0, 1, 2]
    # What 0.1.0 wrote, in its order, and what came later.
    assert list(written) == [
        *("num_layers", "num_kv_heads", "head_dim", "num_pages", "page_size", "head_dim_v"),
        *("layout", "backend", "precision", "dtype", "kv_dtype", "k_scales", "v_scales", "kv_split"),
        *more,
    ]
    assert more.items() <= written.items()
    assert Manifest.from_bytes(manifest.to_bytes(), AttentionConfig) == manifest
    by_name = Manifest.from_bytes(manifest.to_bytes())
    assert by_name.to_bytes() == manifest.to_bytes()
    assert by_name.shape.num_bytes == config.num_bytes


def test_replacing_a_type_leaves_the_other() -> None:
    config = AttentionConfig(**SIZES)
    assert (config.kv_dtype, config.v_dtype) == (HALF, HALF)
    assert replace(config, kv_dtype=FP8, v_dtype=None).v_dtype is FP8
    assert replace(config, kv_dtype=FP8).v_dtype is HALF
