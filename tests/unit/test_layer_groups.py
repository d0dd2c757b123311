"""Layer groups of a cache as a client asks for them, and what it makes of those that a server tells of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import attnd
from attnd.errors import InvalidRequest, Unsupported
from attnd.planes.choice import PlaneOptions
from attnd.planes.cuda.session import CudaSession
from attnd.protocol import frames, requests
from attnd.protocol.head_dims import head_dim_v_of, most_head_dim_v
from attnd.protocol.layer_groups import LayerGroup
from attnd.protocol.tensors import to_array
from attnd.v1 import attention_pb2, cache_pb2, tensor_pb2

BF16, FP8 = tensor_pb2.DTYPE_BFLOAT16, tensor_pb2.DTYPE_FLOAT8_E4M3FN
OWN = {"num_kv_heads": 4, "head_dim": 128, "num_pages": 100}
NAME = "float8_e4m3fn"


def config_of(*groups: LayerGroup, **own: object) -> cache_pb2.CacheConfig:
    return attnd.CacheSpec(groups=groups, **own).to_message().config


def ints(tensor: tensor_pb2.Tensor) -> list[int]:
    assert tensor.dtype == tensor_pb2.DTYPE_INT32
    return np.frombuffer(tensor.data, np.int32).tolist()


def scales(tensor: tensor_pb2.Tensor) -> list[float]:
    return np.frombuffer(tensor.data, np.float32).tolist()


def test_a_group_takes_what_it_leaves_out_from_the_cache() -> None:
    full, windowed = LayerGroup([5, 11]), LayerGroup(range(5), num_kv_heads=8, head_dim=64, num_pages=9, window=512)
    config = config_of(full, windowed, **OWN, head_dim_v=32, page_size=32, dtype="float16")
    assert config.num_layers == 7
    # The cache has none of its own: a server refuses them beside groups.
    assert {field.name for field, _ in config.ListFields()} == {
        *("num_layers", "groups", "dtype", "layout", "backend", "precision")
    }
    first, second = config.groups
    assert (ints(first.layers), ints(second.layers)) == ([5, 11], [0, 1, 2, 3, 4])
    assert (first.num_kv_heads, first.head_dim, first.head_dim_v, first.page_size, first.num_pages) == (
        *(4, 128, 32, 32, 100),
    )
    assert (second.num_kv_heads, second.head_dim, second.head_dim_v, second.page_size, second.num_pages) == (
        *(8, 64, 32, 32, 9),
    )
    assert (first.window, second.window) == (0, 512)
    assert config_of(full, **OWN, num_layers=12).num_layers == 12
    whole = config_of(LayerGroup(np.arange(3), **OWN))
    assert whole.num_layers == 3
    assert not whole.num_kv_heads


def test_types_and_scales_are_taken_together() -> None:
    own = {**OWN, "kv_dtype": NAME, "v_dtype": "bfloat16", "k_scales": 0.5}
    taken, given, of_v, latent = config_of(
        LayerGroup([0]),
        LayerGroup([1], kv_dtype="bfloat16"),
        LayerGroup([2], v_dtype=NAME, v_scales=[1.0, 2.0, 3.0, 4.0]),
        LayerGroup([3], num_kv_heads=1, latent=True),
        **own,
    ).groups
    assert (taken.kv_dtype, taken.v_dtype, scales(taken.k_scales)) == (FP8, BF16, [0.5])
    assert not taken.HasField("v_scales")
    assert (given.kv_dtype, given.v_dtype) == (BF16, 0)
    assert not given.HasField("k_scales")
    assert (of_v.kv_dtype, of_v.v_dtype) == (FP8, FP8)
    assert (scales(of_v.k_scales), scales(of_v.v_scales)) == ([0.5], [1, 2, 3, 4])
    assert (latent.kv_dtype, latent.v_dtype, scales(latent.k_scales)) == (FP8, 0, [0.5])
    assert latent.latent
    own = {**OWN, "v_dtype": NAME, "v_scales": 2.0}
    taken, given = config_of(LayerGroup([0]), LayerGroup([1], v_dtype="bfloat16"), **own).groups
    assert (taken.kv_dtype, taken.v_dtype, scales(taken.v_scales)) == (0, FP8, [2.0])
    assert (given.v_dtype, given.HasField("v_scales")) == (BF16, False)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"groups": [LayerGroup([0])]}, "groups[0].num_kv_heads is None, but must be given, here or for the whole"),
        ({**OWN, "groups": [LayerGroup([0]), LayerGroup(None)]}, "groups[1].layers is None, but must be given"),
        ({**OWN, "groups": [LayerGroup([0.5])]}, "groups[0].layers "),
        ({**OWN, "groups": [LayerGroup([0], num_pages=-1)]}, "groups[0].num_pages is -1, but must be an integer in 0."),
        ({**OWN, "groups": [LayerGroup([0], window=2**32)]}, "groups[0].window is 4294967296, but must be an integer"),
        ({**OWN, "groups": [LayerGroup([0], kv_dtype="int4")]}, "groups[0].kv_dtype is int4, but must be one of"),
        ({**OWN, "groups": [LayerGroup([0], k_scales="x")]}, "groups[0].k_scales must hold one number for each head"),
        ({**OWN, "groups": [{"layers": [0]}]}, "groups[0] is a dict, but must be a LayerGroup"),
        ({**OWN, "groups": []}, "groups has 0 elements, but must have one, or be None"),
        ({**OWN, "groups": [LayerGroup([0])], "num_layers": -1}, "num_layers is -1, but must be an integer in 0.."),
        ({**OWN}, "num_layers is None, but must be given where groups is not"),
        ({"num_layers": 2, "num_kv_heads": 1, "head_dim": 8}, "num_pages is None, but must be given where groups is"),
    ],
)
def test_what_cannot_be_sent_names_group_and_field(fields: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        attnd.CacheSpec(**fields).to_message()
    assert str(caught.value).startswith(text)
    assert caught.value.field in text.split()[0:1]


def test_a_cache_without_groups_is_asked_for_as_ever() -> None:
    """Field by field what 0.1.0 sends: no v_dtype, no groups."""
    spec = attnd.CacheSpec(num_layers=2, **OWN, kv_dtype=NAME, k_scales=0.5, v_scales=[1, 2, 3, 4])
    config = spec.to_message().config
    assert {field.name for field, _ in config.ListFields()} == {
        *(
            "num_layers",
            "num_kv_heads",
            "head_dim",
            "page_size",
            "num_pages",
            "dtype",
            "layout",
            "backend",
            "precision",
        ),
        *("kv_dtype", "k_scales", "v_scales"),
    }


def test_requests_name_the_group() -> None:
    ref = cache_pb2.CacheRef(id=bytes(16), epoch=3)
    copied = cache_pb2.CopyPagesRequest.FromString(requests.copy_pages(ref, [1], [2], 3))
    asked = cache_pb2.RenewCacheRequest.FromString(requests.ask_written_pages(ref, 2))
    warmed = requests.warm_up(
        ref, num_heads=1, query_len=1, max_reqs=1, max_context_len=0, options=attnd.AttentionOptions(), group=1
    )
    assert (copied.group, asked.group, attention_pb2.WarmUpRequest.FromString(warmed).group) == (3, 2, 1)
    for refused in (lambda: requests.copy_pages(ref, [1], [2], -1), lambda: requests.ask_written_pages(ref, -1)):
        with pytest.raises(InvalidRequest, match="group is -1, but must be"):
            refused()


LATENT = config_of(LayerGroup([0, 2], **OWN, head_dim_v=64), LayerGroup([1], **OWN, latent=True, head_dim_v=8))


def test_a_layer_has_the_head_dim_of_its_group() -> None:
    assert [head_dim_v_of(LATENT, layer) for layer in range(4)] == [64, 8, 64, 0]
    assert most_head_dim_v(LATENT) == 64
    plain = attnd.CacheSpec(num_layers=2, **OWN).to_message().config
    assert (head_dim_v_of(plain, 0), most_head_dim_v(plain)) == (128, 128)


@pytest.mark.parametrize(
    "like", [torch.empty(0), np.empty(0), to_array(np.zeros(1, np.float32), "x")], ids=["torch", "numpy", "array"]
)
@pytest.mark.parametrize("chunks", [[3], [2, 1], [0]])
def test_v_of_a_latent_layer_is_read_from_k(like: object, chunks: list[int]) -> None:
    k = torch.arange(sum(chunks) * 24, dtype=torch.float32).view(-1, 1, 24)
    parts = [frames.Framed(attention_pb2.ReadKvResponse(), {"k": to_array(part, "k")}) for part in k.split(chunks)]
    read_k, read_v = requests.joined(parts, like, 8)
    assert tuple(read_v.shape) == (sum(chunks), 1, 8)
    numbers = [np.frombuffer(to_array(each, "x").data, np.float32) for each in (read_k, read_v)]
    assert numbers[0].tolist() == k.flatten().tolist()
    assert numbers[1].tolist() == k[..., :8].flatten().tolist()


def test_store_kv_of_a_latent_layer_has_no_v() -> None:
    ref = cache_pb2.CacheRef(id=bytes(16), epoch=3)
    (chunk,) = requests.store_kv(ref, 1, [3, 4], np.ones((2, 1, 24), np.float32), None)
    assert set(frames.STORE_KV_REQUEST.decode(chunk).tensors) == {"k"}
    with pytest.raises(InvalidRequest, match=r"^k has shape \[2, 24\], but slot_mapping has 2 tokens"):
        requests.store_kv(ref, 1, [3, 4], np.ones((2, 24), np.float32), None)


def test_a_cuda_plane_has_no_layers_that_differ_and_no_latent_ones() -> None:
    for config, why in (
        (LATENT, "has 2 layer groups"),
        (config_of(LayerGroup([0], **OWN, latent=True)), "is latent"),
    ):
        with pytest.raises(Unsupported, match=f"^plane is cuda, but the cache {why}: use shm or inline$"):
            CudaSession(SimpleNamespace(config=config), 1.0, PlaneOptions("cuda"))
    one = config_of(LayerGroup([0, 1], **OWN, window=7))
    assert CudaSession(SimpleNamespace(config=one), 1.0, PlaneOptions("cuda")).geometry == (4, 128, 128, BF16)
