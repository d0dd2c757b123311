"""`AttentionOptions` to the wire, once per object."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.protocol.attention_options import BACKENDS, AttentionOptions, backend_of
from attnd.protocol.tensors import to_array
from attnd.v1 import backend_pb2, step_pb2, tensor_pb2


def test_defaults_are_an_empty_message() -> None:
    assert AttentionOptions().encoded == b""
    assert not AttentionOptions().message.HasField("scale")


def test_every_option_travels() -> None:
    options = AttentionOptions(
        scale=0.0,
        softcap=50.0,
        window=128,
        alibi_slopes=[0.5, 0.25],
        sinks=[1.0, -math.inf],
        return_lse=True,
        backend="sdpa",
    )
    message = step_pb2.AttentionOptions.FromString(options.encoded)
    assert message == options.message
    assert message.HasField("scale")
    assert message.scale == 0.0
    assert (message.softcap, message.window, message.return_lse) == (50.0, 128, True)
    assert message.backend == backend_pb2.BACKEND_SDPA
    assert message.alibi_slopes.dtype == tensor_pb2.DTYPE_FLOAT32
    assert np.frombuffer(message.alibi_slopes.data, np.float32).tolist() == [0.5, 0.25]
    assert np.frombuffer(message.sinks.data, np.float32).tolist() == [1.0, -math.inf]


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5),
        np.array([1, 2.5]),
        np.array([1, 2.5], np.float32),
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        torch.nn.Parameter(torch.tensor([1, 2.5])),
        to_array(np.array([1, 2.5], np.float32), "sinks"),
    ],
    ids=["tuple", "float64", "float32", "bfloat16", "parameter", "attnd_array"],
)
def test_numbers_of_any_kind_become_float32(values) -> None:
    message = AttentionOptions(sinks=values).message.sinks
    assert message.shape == [2]
    assert np.frombuffer(message.data, np.float32).tolist() == [1.0, 2.5]


def test_the_message_is_built_once() -> None:
    options = AttentionOptions(scale=0.1)
    assert options.message is options.message
    assert options.encoded is options.encoded


def test_names_of_backends_are_those_of_the_contract() -> None:
    assert set(BACKENDS) == {"auto", "naive", "sdpa", "triton", "triton_grouped", "flash_attn", "xformers"}
    assert backend_of("triton_grouped") == backend_pb2.BACKEND_TRITON_GROUPED
    assert backend_of("") == backend_pb2.BACKEND_UNSPECIFIED


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backend", "cudnn", "backend is 'cudnn', but must be one of auto, naive, sdpa"),
        ("backend", "unspecified", "backend is 'unspecified'"),
        ("window", -1, "window is -1, but must be an integer in 0.."),
        ("window", 1 << 32, "window is 4294967296"),
        ("scale", "big", "scale is 'big', but must be a number"),
        ("softcap", None, "softcap is None, but must be a number"),
        ("sinks", "abc", "sinks must hold one number for each head"),
        ("alibi_slopes", 0.5, "alibi_slopes must hold one number for each head"),
        ("alibi_slopes", torch.zeros(2, 2), "alibi_slopes must hold one number for each head"),
    ],
)
def test_refuses_what_the_wire_cannot_carry(field: str, value: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _ = AttentionOptions(**{field: value}).message
    assert message in str(caught.value)
    assert caught.value.field == field
