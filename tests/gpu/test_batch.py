"""Calls of several callers in one launch, and the addresses of a GPU that make it possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnd
from attnd_server.attention.config import AttentionConfig
from attnd_server.execution.joined import graphs
from attnd_server.kv.page_space import SharedSpace
from attnd_server.kv.page_spaces import PageSpaces
from tests.shared_calls import HEADS, Caller, check_same_bits, waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CONFIG = AttentionConfig(num_layers=4, num_kv_heads=8, head_dim=128, num_pages=1024, dtype=torch.bfloat16)
HOPPER: dict[str, Any] = {"head_dim": 128, "head_dim_v": 128, "page_size": 16, "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def classes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few launches are enough here for a graph of their class."""
    monkeypatch.setattr(graphs, "ASKED_BEFORE", 0)
    monkeypatch.setattr(graphs, "PAUSE", 0)


@pytest.fixture(scope="module")
def device() -> torch.device:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
    return torch.device("cuda", 0)


def test_memory_comes_with_a_cache_and_goes_with_it(device: torch.device) -> None:
    def free() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.mem_get_info(device)[0]

    spaces = PageSpaces(device, 1 << 30)
    kept = spaces.take(replace(CONFIG, num_pages=1))
    before = free()
    pages = spaces.take(CONFIG)
    assert isinstance(pages.space, SharedSpace)
    assert kept.space is pages.space
    assert abs(before - free() - CONFIG.num_bytes) <= 4 << 20
    assert not pages.k.any()
    assert not pages.v.any()
    pages.k.fill_(1)
    pages.v.fill_(2)
    assert not kept.k.any()
    assert not kept.v.any()
    spaces.give_back(pages, CONFIG)
    assert abs(before - free()) <= 4 << 20
    again = spaces.take(CONFIG)
    assert not again.k.any()
    spaces.give_back(again, CONFIG)
    spaces.give_back(kept, replace(CONFIG, num_pages=1))


def test_a_cache_that_does_not_fit_is_refused(device: torch.device) -> None:
    spaces = PageSpaces(device, 1 << 42)
    too_big = replace(CONFIG, num_pages=CONFIG.num_pages * (1 << 40) // CONFIG.num_bytes)
    with pytest.raises(torch.OutOfMemoryError):
        spaces.take(too_big)
    spaces.give_back(spaces.take(CONFIG), CONFIG)


@pytest.mark.parametrize("backend", ["triton", "triton_grouped"])
@pytest.mark.parametrize("geometry", [{}, HOPPER], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "everything"])
def test_callers_at_different_layers_get_the_bits_of_calls_alone(
    device: torch.device, backend: str, geometry: dict[str, Any], is_plain: bool
) -> None:
    options = attnd.AttentionOptions()
    if not is_plain:
        options = attnd.AttentionOptions(
            softcap=2.0, window=19, alibi_slopes=torch.rand(HEADS), sinks=torch.randn(HEADS), return_lse=True
        )
    page = {**geometry}.get("page_size", 4)
    with waiting("cuda") as server:
        callers = [
            Caller(server, [5, 0, 37], 1, backend, num_pages=24, geometry=geometry),
            Caller(server, [70 * page], 2, backend, num_layers=5, num_pages=99, geometry=geometry),
            Caller(server, [1, 2], 3, backend, num_pages=7, geometry=geometry),
            *(Caller(server, [300 + seed], seed, backend, num_pages=200, geometry=geometry) for seed in range(5)),
        ]
        check_same_bits(server, callers, options)
