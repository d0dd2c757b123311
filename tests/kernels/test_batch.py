"""Calls of several callers in one launch of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnd
from tests import interpreter
from tests.shared_calls import HEADS, Caller, check_same_bits, waiting

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        if device != "cpu":
            pytest.skip("on a GPU tests/gpu does this")
        yield device


@pytest.mark.parametrize("backend", ["triton", "triton_grouped"])
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "everything"])
def test_callers_at_different_layers_get_the_bits_of_calls_alone(backend: str, is_plain: bool) -> None:
    options = attnd.AttentionOptions()
    if not is_plain:
        options = attnd.AttentionOptions(
            softcap=2.0, window=19, alibi_slopes=torch.rand(HEADS), sinks=torch.randn(HEADS), return_lse=True
        )
    geometry = {"kv_split": attnd.KVSplit(chunk_size=16)}  # some requests have several chunks, some one
    with waiting() as server:
        callers = [
            Caller(server, [5, 0, 37], seed=1, backend=backend, geometry=geometry),
            Caller(server, [70], seed=2, backend=backend, geometry=geometry, num_layers=5),
            Caller(server, [1, 2], seed=3, backend=backend, geometry=geometry, num_pages=7),
        ]
        check_same_bits(server, callers, options)


def test_blocks() -> None:
    geometry = {"kv_split": attnd.KVSplit(batch_invariant=True)}
    with waiting() as server:
        contexts = ([7, 31], [18])
        callers = [
            Caller(server, lens, seed=7, backend="triton_grouped", query_len=4, geometry=geometry) for lens in contexts
        ]
        check_same_bits(server, callers, attnd.AttentionOptions())
