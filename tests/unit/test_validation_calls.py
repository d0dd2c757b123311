"""The tensors and options of a layer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnd.errors import Exhausted, InvalidRequest
from attnd.protocol import frames
from attnd.protocol.tensors import Array, dtype_of
from attnd.v1 import attention_pb2, backend_pb2, step_pb2
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.service import validation
from tests.unit.wire_messages import CONFIG, LIMITS, array, step, tensor

FLOAT32 = dtype_of("float32")


def payloads(**changes):
    arrays = {
        "q": array("float32", 4, 6, 16),
        "k": array("float32", 4, 2, 16),
        "v": array("float32", 4, 2, 24),
    } | changes
    return {field: value for field, value in arrays.items() if value is not None}


def call(arrays, **changes):
    metadata = validation.step(step(**changes), CONFIG, LIMITS)
    return validation.call(step_pb2.Call(), arrays, CONFIG, metadata)


def test_a_call_views_the_received_bytes():
    received = np.arange(4 * 6 * 16, dtype=np.float32)
    data = memoryview(received.tobytes())
    tensors = call(payloads(q=Array(FLOAT32, (4, 6, 16), data)))
    assert tensors.num_heads == 6
    assert tensors.q.shape == (4, 6, 16)
    assert tensors.k.shape == (4, 2, 16)
    assert tensors.v.shape == (4, 2, 24)
    assert tensors.q.flatten().tolist() == received.tolist()
    assert tensors.q.data_ptr() == np.frombuffer(data, np.uint8).ctypes.data


@pytest.mark.parametrize(("return_lse", "num_bytes"), [(False, 4 * 6 * 24 * 4), (True, 4 * 6 * (24 * 4 + 4))])
def test_a_reply_that_fits_no_message_is_refused(monkeypatch, return_lse, num_bytes):
    metadata = validation.step(step(), CONFIG, LIMITS)
    message = step_pb2.Call(options=step_pb2.AttentionOptions(return_lse=return_lse))
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", num_bytes + 1024)
    assert validation.call(message, payloads(), CONFIG, metadata).num_heads == 6
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", num_bytes + 1023)
    with pytest.raises(Exhausted) as caught:
        validation.call(message, payloads(), CONFIG, metadata)
    text = f"q asks for {num_bytes} bytes of output, but a reply has room for {num_bytes - 1}"
    assert str(caught.value) == text


def test_a_cache_only_call_has_q_alone():
    tensors = call(payloads(k=None, v=None), cache_only=True, slot_mapping=None)
    assert tensors.q is not None
    assert tensors.k is None
    assert tensors.v is None


def test_a_store_only_call_has_no_q():
    tensors = call(payloads(q=None), store_only=True)
    assert tensors.q is None
    assert tensors.num_heads == 0
    assert tensors.k.shape == (4, 2, 16)


LATENT = replace(CONFIG, num_kv_heads=1, head_dim_v=8, latent=True)


def test_v_of_a_latent_call_is_a_view_of_k():
    given = payloads(k=array("float32", 4, 1, 16), v=None)
    tensors = validation.call(step_pb2.Call(), given, LATENT, validation.step(step(), LATENT, LIMITS))
    assert tensors.v.shape == (4, 1, 8)
    assert tensors.v.data_ptr() == tensors.k.data_ptr()
    assert torch.equal(tensors.v, tensors.k[..., :8])
    message = attention_pb2.StoreKvRequest(layer=0, slot_mapping=tensor([0, 5, 3, 2], "int32"))
    stored = validation.store_kv(message, payloads(q=None, v=None, k=array("float32", 4, 1, 16)), LATENT)
    assert stored.v.data_ptr() == stored.k.data_ptr()
    for refused in (payloads(k=array("float32", 4, 1, 16), v=array("float32", 4, 1, 8)),):
        with pytest.raises(InvalidRequest, match=r"^v is given, but must be absent: it is the first 8 elements of k$"):
            validation.call(step_pb2.Call(), refused, LATENT, validation.step(step(), LATENT, LIMITS))
        with pytest.raises(InvalidRequest, match=r"^v is given, but must be absent"):
            validation.store_kv(message, refused, LATENT)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": None}, "q is absent, but must be given"),
        ({"k": None}, "k is absent, but must be given"),
        ({"v": None}, "v is absent, but must be given"),
        ({"q": array("float16", 4, 6, 16)}, "q has dtype float16, but must be float32"),
        ({"q": Array(0, (4, 6, 16), memoryview(b""))}, "q has dtype unspecified, but must be float32"),
        ({"q": array("float32", 3, 6, 16)}, "q has shape [3, 6, 16], but must be [4, num_heads, 16]"),
        ({"q": array("float32", 4, 6 * 16)}, "q has shape [4, 96], but must be [4, num_heads, 16]"),
        ({"q": array("float32", 4, 6, 24)}, "q has shape [4, 6, 24], but must be [4, num_heads, 16]"),
        ({"q": array("float32", 4, 5, 16)}, "q has 5 heads, but must have a multiple of the cache's 2 KV heads"),
        ({"q": array("float32", 4, 1, 16)}, "q has 1 heads, but must have a multiple of the cache's 2 KV heads"),
        ({"q": array("float32", 4, 0, 16)}, "q has 0 heads, but must have a multiple of the cache's 2 KV heads"),
        ({"k": array("float32", 4, 3, 16)}, "k has shape [4, 3, 16], but must be [4, 2, 16]"),
        ({"v": array("float32", 4, 2, 16)}, "v has shape [4, 2, 16], but must be [4, 2, 24]"),
        (
            {"k": Array(FLOAT32, (4, 2, 16), memoryview(bytes(511)))},
            "k has 511 bytes of data, but must have 512 for float32 [4, 2, 16]",
        ),
        (
            {"q": Array(FLOAT32, (4, 2**60, 16), memoryview(bytes(64)))},
            f"q has 64 bytes of data, but must have {2**68} for float32 [4, {2**60}, 16]",
        ),
        (
            {"q": Array(FLOAT32, (4, -6, 16), memoryview(bytes(64)))},
            "q has shape [4, -6, 16], but must be [4, num_heads, 16]",
        ),
    ],
)
def test_tensors_are_refused(changes, text):
    with pytest.raises(InvalidRequest) as caught:
        call(payloads(**changes))
    assert str(caught.value) == text
    assert caught.value.field == next(iter(changes))


@pytest.mark.parametrize(
    ("arrays", "changes", "text"),
    [
        (payloads(), {"store_only": True}, "q is given, but must be absent in a store-only step"),
        (
            payloads(v=None),
            {"cache_only": True, "slot_mapping": None},
            "k is given, but must be absent in a cache-only step",
        ),
        (
            payloads(k=None),
            {"cache_only": True, "slot_mapping": None},
            "v is given, but must be absent in a cache-only step",
        ),
    ],
)
def test_tensors_that_the_step_has_not_are_refused(arrays, changes, text):
    with pytest.raises(InvalidRequest) as caught:
        call(arrays, **changes)
    assert str(caught.value) == text


@pytest.mark.parametrize("layer", [3, 2**32 - 1])
def test_layers_are_refused(layer):
    with pytest.raises(InvalidRequest) as caught:
        validation.layer(layer, CONFIG.num_layers)
    assert str(caught.value) == f"layer is {layer}, but the cache has layers 0..2"
    assert caught.value.field == "layer"


def test_layers():
    assert [validation.layer(value, CONFIG.num_layers) for value in range(3)] == [0, 1, 2]
    with pytest.raises(InvalidRequest):
        validation.layer(-1, CONFIG.num_layers)


def test_store_kv():
    message = attention_pb2.StoreKvRequest(layer=1, slot_mapping=tensor([9, 0, 4, 1]))
    slots, k, v = validation.store_kv(message, payloads(), CONFIG)
    assert slots.tolist() == [9, 0, 4, 1]
    assert k.shape == (4, 2, 16)
    assert v.shape == (4, 2, 24)


@pytest.mark.parametrize(
    ("message", "arrays", "text"),
    [
        ({"slot_mapping": None}, {}, "slot_mapping is absent, but must be given"),
        ({"slot_mapping": tensor([1, 2, 3, 1])}, {}, "slot_mapping[3] is 1, but must differ from slot_mapping[0]"),
        ({"slot_mapping": tensor([1, 2, 3])}, {}, "k has shape [4, 2, 16], but must be [3, 2, 16]"),
        ({}, {"v": None}, "v is absent, but must be given"),
        ({}, {"v": array("bfloat16", 4, 2, 24)}, "v has dtype bfloat16, but must be float32"),
    ],
)
def test_chunks_are_refused(message, arrays, text):
    request = attention_pb2.StoreKvRequest(**{"layer": 1, "slot_mapping": tensor([9, 0, 4, 1])} | message)
    with pytest.raises(InvalidRequest) as caught:
        validation.store_kv(request, payloads(**arrays), CONFIG)
    assert str(caught.value) == text


def options(num_heads=2, **fields):
    return validation.options(step_pb2.AttentionOptions(**fields), CONFIG, num_heads)


def test_options_default():
    result = options()
    assert result.scale == 0.25
    assert (result.softcap, result.window, result.return_lse) == (0.0, 0, False)
    assert result.alibi_slopes is None
    assert result.sinks is None
    assert result.backend is AttentionBackend.AUTO


def test_every_option_is_taken():
    result = options(
        scale=0.0,
        softcap=30.0,
        window=128,
        alibi_slopes=tensor([0.5, -0.25], "float32"),
        sinks=tensor([1.5, -math.inf], "float32"),
        return_lse=True,
        backend=backend_pb2.BACKEND_NAIVE,
    )
    assert (result.scale, result.softcap, result.window, result.return_lse) == (0.0, 30.0, 128, True)
    assert result.alibi_slopes.tolist() == [0.5, -0.25]
    assert result.sinks.tolist() == [1.5, -math.inf]
    assert result.sinks.dtype == torch.float32
    assert result.backend is AttentionBackend.NAIVE


@pytest.mark.parametrize(("sent", "taken"), [(2**31 - 1, 2**31 - 1), (2**31, 0), (2**32 - 1, 0)])
def test_a_window_that_no_position_reaches_is_off(sent, taken):
    assert options(window=sent).window == taken


def test_a_store_only_call_may_carry_the_options_of_its_layer():
    slopes = tensor([0.5, 0.25, 0.125], "float32")
    assert options(num_heads=0, alibi_slopes=slopes).alibi_slopes is None


def test_a_call_without_backend_takes_the_caches():
    config = AttentionConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=1, backend=AttentionBackend.SDPA)
    assert validation.options(step_pb2.AttentionOptions(), config, 1).backend is AttentionBackend.SDPA
    auto = step_pb2.AttentionOptions(backend=backend_pb2.BACKEND_AUTO)
    assert validation.options(auto, config, 1).backend is AttentionBackend.AUTO


BACKENDS = "auto, naive, sdpa, triton, triton_grouped, flash_attn, xformers"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scale": math.nan}, "scale is nan, but must be finite"),
        ({"scale": -math.inf}, "scale is -inf, but must be finite"),
        ({"softcap": -1.5}, "softcap is -1.5, but must be finite and at least 0"),
        ({"softcap": math.nan}, "softcap is nan, but must be finite and at least 0"),
        ({"softcap": math.inf}, "softcap is inf, but must be finite and at least 0"),
        ({"backend": 99}, f"backend is 99, but must be one of {BACKENDS}"),
        ({"alibi_slopes": tensor([1, 2])}, "alibi_slopes has dtype int32, but must be float32"),
        ({"alibi_slopes": tensor([1.0], "float32")}, "alibi_slopes has shape [1], but must be [2]"),
        ({"alibi_slopes": tensor([0.0, math.nan], "float32")}, "alibi_slopes[1] is nan, but must be finite"),
        ({"alibi_slopes": tensor([-math.inf, 0.0], "float32")}, "alibi_slopes[0] is -inf, but must be finite"),
        ({"sinks": tensor([0.0, math.inf], "float32")}, "sinks[1] is inf, but must be finite or -inf"),
        ({"sinks": tensor([math.nan, 0.0], "float32")}, "sinks[0] is nan, but must be finite or -inf"),
    ],
)
def test_options_are_refused(fields, text):
    with pytest.raises(InvalidRequest) as caught:
        options(**fields)
    assert str(caught.value) == text
    assert caught.value.field == next(iter(fields))
