"""Calls with tensors of a GPU over a shm plane: copied straight to and from the region, here by a stand-in for it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd
from attnd.planes.shm import messages
from attnd.protocol.shm import pinned_region
from tests.attention import dense_attention
from tests.servers import ServerProcess, mapped

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 64, "page_size": 4, "dtype": "float32"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("gpu_copies")
    with ServerProcess(folder / "log", "--socket-dir", str(folder / "sockets"), "--region-bytes", "96MiB") as process:
        yield process.address


class Gpu:
    """What is asked of CUDA, and what is pinned and waited for."""

    error = 0

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.most_pinned = self.num_waits = self.num_reads = 0

    def cudart(self) -> Gpu:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            ctypes.string_at(address + num_bytes - 1, 1)  # it is mapped
            self.pinned[address] = num_bytes
            self.most_pinned = max(self.most_pinned, num_bytes)
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        ctypes.string_at(address + self.pinned.pop(address) - 1, 1)
        return 0

    def current_stream(self, device: torch.device) -> Gpu:
        return self

    def synchronize(self) -> None:
        self.num_waits += 1

    def record(self, stream: object) -> None:
        self.num_reads += 1

    def Event(self) -> Gpu:
        return self


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    stand_in = Gpu()
    monkeypatch.setattr(messages, "gpu_of", lambda *given: CPU if isinstance(given[0], torch.Tensor) else None)
    monkeypatch.setattr(pinned_region, "_cudart", stand_in.cudart)
    monkeypatch.setattr(torch.cuda, "current_stream", stand_in.current_stream)
    monkeypatch.setattr(torch.cuda, "Event", stand_in.Event)
    return stand_in


def prompt(length: int) -> attnd.StepMetadata:
    return attnd.StepMetadata([length], [0], [list(range(64))], range(length))


def new_tokens(num_tokens: int) -> Any:
    """As a model has them: q of another order in memory."""
    q = torch.randn(4, num_tokens, 16).transpose(0, 1)
    return q, torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


@pytest.mark.parametrize("return_lse", [False, True])
def test_outputs_are_those_of_attention(address: str, gpu: Gpu, return_lse: bool) -> None:
    options = attnd.AttentionOptions(return_lse=return_lse)
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        outputs = []
        for length in (5, 5, 9, 1, 1):
            step = session.step(prompt(length))
            for layer in range(2):
                q, k, v = new_tokens(length)
                output = step.attend(layer, q, k, v, options)
                output = output[0] if return_lse else output
                outputs.append((output, dense_attention(q, k, v)))
        for output, expected in outputs:  # at the end: none lies where a later one went
            torch.testing.assert_close(output, expected)
        assert gpu.num_reads == 10
        assert gpu.most_pinned == 32 << 20
        assert gpu.pinned
    assert not gpu.pinned


def test_outputs_go_to_memory_of_the_callers_own(address: str, gpu: Gpu) -> None:
    options = attnd.AttentionOptions(return_lse=True)
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        kept = []
        for length, num_rows in ((5, 5), (5, 5), (5, 9), (1, 1)):
            step = session.step(prompt(length))
            q, k, v = new_tokens(num_rows)
            out = torch.full((num_rows, 2, 4, 16), torch.nan)[:, 1]
            output, lse = step.attend(1, q, k, v, options, out=out)
            assert output is out
            kept.append((out, lse, length, dense_attention(q[:length], k[:length], v[:length])))
        for out, lse, length, expected in kept:
            torch.testing.assert_close(out[:length], expected)
            assert (out[length:] == 0).all()
            assert lse[:length].isfinite().all()
            assert (lse[length:] == -torch.inf).all()
            assert out._base[:, 0].isnan().all()  # type: ignore[union-attr,index]
        assert gpu.num_reads == 4


def test_what_is_pinned_grows_with_the_calls(address: str, gpu: Gpu) -> None:
    geometry = {**GEOMETRY, "num_kv_heads": 64, "head_dim": 128, "num_pages": 40}
    with attnd.connect(address) as client, client.create_cache(**geometry) as cache, cache.session() as session:
        for length, pinned_mib in ((1, 32), (2, 32), (300, 64), (1, 64)):
            q, k, v = (torch.randn(length, 64, 128) for _ in "qkv")
            metadata = attnd.StepMetadata([length], [0], [[0]], None)
            torch.testing.assert_close(session.step(metadata).attend(0, q, k, v), dense_attention(q, k, v))
            assert list(gpu.pinned.values()) == [pinned_mib << 20]
    assert not gpu.pinned


def test_a_region_that_cannot_be_pinned_serves_all_the_same(
    address: str, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.error = 712
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        for length in (3, 7):
            q, k, v = new_tokens(length)
            torch.testing.assert_close(session.step(prompt(length)).attend(0, q, k, v), dense_attention(q, k, v))
    (record,) = caplog.records
    assert record.message == "the region of a session cannot be pinned, so its copies are slower: CUDA error 712"


def test_tensors_of_host_and_gpu_take_turns(address: str, gpu: Gpu) -> None:
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        outputs = []
        for kind in ("gpu", "numpy", "gpu", "gpu", "numpy", "numpy", "gpu"):
            q, k, v = new_tokens(6)
            given = [each.contiguous().numpy() for each in (q, k, v)] if kind == "numpy" else [q, k, v]
            outputs.append((session.step(prompt(6)).attend(1, *given), dense_attention(q, k, v)))
        for output, expected in outputs:
            output = output if isinstance(output, torch.Tensor) else torch.tensor(output)
            torch.testing.assert_close(output, expected)


def test_store_only_and_cache_only_calls(address: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "gpu_of", lambda *given: CPU)
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        q, k, v = new_tokens(6)
        store = attnd.StepMetadata([6], [0], [[0, 1]], range(6), store_only=True)
        for _ in range(2):
            assert session.step(store).attend(0, None, k, v) is None
        read = attnd.StepMetadata([6], [6], [[0, 1]], cache_only=True)
        for _ in range(2):
            output = session.step(read).attend(0, q, None, None)
            torch.testing.assert_close(output, dense_attention(q, k, v, causal=False))


def test_a_type_that_the_wire_does_not_have_is_refused(address: str, gpu: Gpu) -> None:
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        q, k, v = new_tokens(6)
        with pytest.raises(attnd.InvalidRequest, match=r"q has dtype torch\.float64, but must be one of float32"):
            session.step(prompt(6)).attend(0, q.double(), k, v)
        torch.testing.assert_close(session.step(prompt(6)).attend(0, q, k, v), dense_attention(q, k, v))


def test_a_session_that_nobody_has_leaves_nothing_pinned_or_mapped(address: str, gpu: Gpu) -> None:
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        before = mapped(os.getpid())
        session = cache.session()
        output = session.step(prompt(6)).attend(0, *new_tokens(6))
        assert gpu.pinned
        del session
        assert mapped(os.getpid()) == before
        assert not gpu.pinned
        assert output.isfinite().all()


def test_which_tensors_are_on_one_gpu() -> None:
    from attnd.protocol.shm.placed_tensors import gpu_of

    assert gpu_of(torch.ones(1), None, torch.ones(1)) is None
    assert gpu_of([1.0]) is None
    assert gpu_of(None) is None
