"""Regions of shm planes that are registered with CUDA."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import attnd
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution import step as steps
from attnd_server.execution.runner import Runner
from attnd_server.inproc import InprocTransport
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.server import PlaneServer
from attnd_server.planes.shm.pinning import CudaRegistrar, Pinning, registrar_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda", 0)
REGION_BYTES = 16 << 20
PAGE, HEADS, KV_HEADS, DIM, LAYERS, NUM_REQS = 16, 32, 8, 128, 2, 64
GEOMETRY = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "num_pages": NUM_REQS, "page_size": PAGE}


@contextmanager
def serving(folder: Path) -> Iterator[tuple[PlaneServer, attnd.Client]]:
    """A server on the GPU whose planes come over its socket."""
    config, planes = ServerConfig(device="cuda:0", socket_dir=str(folder), region_bytes=REGION_BYTES), Planes()
    service = build_service(config, planes=planes)
    server = PlaneServer(service, planes)
    try:
        with attnd.Client(InprocTransport(service), timeout_s=60) as client:
            yield server, client
    finally:
        server.drain()
        server.stop(0)


def wait_until_nothing_is_pinned(server: PlaneServer) -> None:
    deadline = time.monotonic() + 30
    while server._pinning.num_bytes:
        assert time.monotonic() < deadline, "the region of a session that has ended is still pinned"
        time.sleep(0.001)


def tensor_of(memory: mmap.mmap) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def test_registered_memory_is_pinned_until_the_end_of_the_block() -> None:
    memory = mmap.mmap(-1, 1 << 20)
    with Pinning(registrar_for(GPU)).pinned(memory) as is_pinned:
        assert is_pinned
        assert tensor_of(memory).is_pinned()
        tensor_of(memory).fill_(7)
        assert (tensor_of(memory).to(GPU, non_blocking=True) == 7).all()
    assert not tensor_of(memory).is_pinned()


def test_a_refusal_disturbs_no_kernel() -> None:
    registrar, memory = CudaRegistrar(GPU), mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    registrar.register(address, len(memory))
    with pytest.raises(RuntimeError, match="CUDA error"):
        registrar.register(address, len(memory))  # once more
    assert torch.ones(1000, device=GPU).sum().item() == 1000
    registrar.unregister(address)
    with pytest.raises(RuntimeError, match="CUDA error"):
        registrar.unregister(address)
    assert torch.ones(1000, device=GPU).sum().item() == 1000


@pytest.mark.parametrize("is_warm", [False, True])
def test_calls_from_pinned_memory_have_the_bits_of_those_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    are_pinned: set[tuple[bool, bool]] = set()
    attend = Runner.attend

    def watched(runner: Runner, call: steps.Call) -> steps.Result:
        assert call.q is not None
        are_pinned.add((call.q.is_pinned(), call.at is not None))
        return attend(runner, call)

    monkeypatch.setattr(Runner, "attend", watched)
    context_lens = [index % PAGE for index in range(NUM_REQS)]
    slots = [request * PAGE + context_len for request, context_len in enumerate(context_lens)]
    tables = [[request] for request in range(NUM_REQS)]
    metadata = attnd.StepMetadata([1] * NUM_REQS, context_lens, tables, slots, kind="decode")
    with serving(tmp_path) as (server, client), client.create_cache(**GEOMETRY, dtype=torch.bfloat16) as cache:
        for layer in range(LAYERS):
            k, v = torch.randn(2, NUM_REQS * PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
            cache.store_kv(layer, range(NUM_REQS * PAGE), k, v)
        if is_warm:
            assert cache.warm_up(num_heads=HEADS, max_reqs=NUM_REQS).num_graphs
        with cache.session(plane="shm") as shm, cache.session(plane="inline") as inline:
            for _ in range(3):
                opened = [session.step(metadata) for session in (shm, inline)]
                for layer in range(LAYERS):
                    q = torch.randn(NUM_REQS, HEADS, DIM, dtype=torch.bfloat16)  # 768 KiB with k and v
                    k, v = torch.randn(2, NUM_REQS, KV_HEADS, DIM, dtype=torch.bfloat16)
                    outputs = [step.attend(layer, q, k, v) for step in opened]
                    assert torch.equal(*outputs)
            # Those of shm, which the device takes from there and puts back itself, and those of inline.
            assert are_pinned == {(True, True), (False, False)}
            assert server._pinning.num_bytes == REGION_BYTES
        wait_until_nothing_is_pinned(server)


def test_what_was_stored_is_what_lay_there_when_the_call_was_sent(tmp_path: Path) -> None:
    """A store-only call has no results to wait for, but its tensors may be written over once it is answered."""
    num_tokens = NUM_REQS * PAGE
    metadata = attnd.StepMetadata([num_tokens], [0], [list(range(NUM_REQS))], list(range(num_tokens)), store_only=True)
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY, dtype=torch.bfloat16) as cache:
        with cache.session(plane="shm") as session:
            step = session.step(metadata)
            for round_ in range(20):
                sent = [torch.full((num_tokens, KV_HEADS, DIM), round_ + layer / 2) for layer in range(LAYERS)]
                for layer, tensor in enumerate(sent):
                    step.attend(layer, None, tensor.bfloat16(), -tensor.bfloat16())
                for layer, tensor in enumerate(sent):
                    k, v = cache.read_kv(layer, range(num_tokens), like=tensor.bfloat16())
                    assert torch.equal(k.float(), tensor)
                    assert torch.equal(v, -k)


def test_a_hundred_sessions_in_a_row_leave_nothing_pinned(tmp_path: Path) -> None:
    metadata = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
    q = torch.ones(1, HEADS, DIM, dtype=torch.bfloat16)
    k = torch.ones(1, KV_HEADS, DIM, dtype=torch.bfloat16)
    with serving(tmp_path) as (server, client), client.create_cache(**GEOMETRY, dtype=torch.bfloat16) as cache:
        for _ in range(100):
            with cache.session(plane="shm") as session:
                assert torch.equal(session.step(metadata).attend(0, q, k, k), q)
        wait_until_nothing_is_pinned(server)
