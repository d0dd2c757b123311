"""The bottom of the cuda plane: memory of one GPU in two processes, and streams that wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from attnd.planes.cuda.tensors import copy_in
from attnd.protocol.cuda.copies import Copier
from attnd.protocol.cuda.driver import CudaError, call, device, device_of
from attnd.protocol.cuda.memory import DeviceMemory
from tests.gpu.cuda_peers import Case, Peers, receive, send, workers_hand_over

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WORKER_GPUS = [
    pytest.param(0, id="one_gpu"),
    pytest.param(1, id="two_gpus", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
]
# Gates on one GPU work, but the two processes take turns of milliseconds.
SLOW_STEPS = 8


def num_steps(flags: str, gpu: int) -> int:
    return SLOW_STEPS if flags == "gates" and gpu == 0 else 250


def test_a_gpu_is_found_by_the_uuid_that_torch_says() -> None:
    for index in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        found = device_of(uuid)
        assert found is not None
        assert found.index == index
        assert found.uuid == uuid
    assert device_of("00000000-0000-0000-0000-000000000000") is None


@pytest.mark.parametrize("gpu", WORKER_GPUS)
def test_memory_of_one_process_is_read_and_written_by_another(gpu: int) -> None:
    with Peers(Case("host", gpu, num_elements=1 << 17), "copy") as peers:
        half = peers.region.num_bytes // 2
        ours = torch.randint(0, 256, (half,), dtype=torch.uint8)
        call("cuMemcpy", peers.region.address, ours.data_ptr(), half)
        call("cuCtxSynchronize")
        send(peers.connection, "go")
        assert receive(peers.connection)[0] == "copied"
        theirs = torch.empty(half, dtype=torch.uint8)
        call("cuMemcpy", theirs.data_ptr(), peers.region.address + half, half)
        assert torch.equal(theirs, ours.flip(0))
        send(peers.connection, "done")


def test_new_memory_is_zero_and_refuses_what_it_cannot_be() -> None:
    gpu = device(0)
    gpu.make_current()
    memory = DeviceMemory.created(gpu, 1000)
    assert memory.num_bytes >= 1000
    host = torch.ones(memory.num_bytes, dtype=torch.uint8)
    call("cuMemcpy", host.data_ptr(), memory.address, memory.num_bytes)
    assert not host.any()
    memory.close()
    memory.close()
    with pytest.raises(CudaError, match="cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"):
        DeviceMemory.created(gpu, 1 << 45)
    descriptor = os.memfd_create("no memory of a GPU")
    with pytest.raises(CudaError, match="cuMemImportFromShareableHandle failed"):
        DeviceMemory.imported(gpu, descriptor, memory.num_bytes)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_memory_of_another_gpu_is_made_without_a_context_there() -> None:
    code = """
import torch
from attnd.protocol.cuda.driver import call, device, driver
from attnd.protocol.cuda.memory import DeviceMemory
torch.cuda.set_device(0)
torch.zeros(1, device="cuda:0")
user, owner = device(0), device(1)
user.make_current()
memory = DeviceMemory.created(owner, 1 << 20, user=user)
call("cuMemsetD8Async", memory.address, 7, memory.num_bytes, 0)
host = torch.zeros(memory.num_bytes, dtype=torch.uint8)
call("cuMemcpy", host.data_ptr(), memory.address, memory.num_bytes)
assert host.eq(7).all()
_, is_active = call("cuDevicePrimaryCtxGetState", owner._device)
assert not is_active
memory.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_memory_made_and_freed_a_hundred_times_leaves_nothing() -> None:
    gpu = device(0)
    gpu.make_current()
    torch.zeros(1, device="cuda:0")
    DeviceMemory.created(gpu, 64 << 20).close()
    before, descriptors = torch.cuda.mem_get_info(0)[0], len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        memory = DeviceMemory.created(gpu, 64 << 20)
        os.close(memory.exported())
        memory.close()
    assert torch.cuda.mem_get_info(0)[0] >= before - (8 << 20)  # others on the GPU may take some
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 700])
def test_copies_of_tensors_whose_tokens_lie_apart(num_tokens: int) -> None:
    gpu = device(0)
    gpu.make_current()
    qkv = torch.randn(num_tokens, 8 * 64 + 2 * 64 + 2 * 32, device="cuda:0").bfloat16()
    parts = [
        part.view(num_tokens, -1, dim) for part, dim in zip(qkv.split([512, 128, 64], dim=1), (64, 64, 32), strict=True)
    ]
    copies = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in parts]
    wanted = [copy_in(copy.data_ptr(), part) for copy, part in zip(copies, parts, strict=True)]
    assert all(copy is not None and copy.is_possible for copy in wanted)
    stream = torch.cuda.current_stream().cuda_stream
    copier = Copier(gpu)
    copier.copy(stream, wanted[:2])
    assert not copies[2].any()
    copier.copy(stream, wanted[2:])
    for copy, part in zip(copies, parts, strict=True):
        assert torch.equal(copy, part)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("flags", ["host", "gates", "gates_own_words"])
@pytest.mark.parametrize("gpu", WORKER_GPUS)
def test_a_thousand_hand_overs_each_bring_the_whole_tensor(gpu: int, flags: str, graph: bool) -> None:
    kind = flags.removesuffix("_own_words")
    case = Case(kind, gpu, num_steps=num_steps(kind, gpu), graph=graph, own_words=flags.endswith("words"))
    with Peers(case, "run") as peers:
        told = peers.run()
    assert not told["stopped"]
    # Each side adds 1 to what it was handed, so that a hand-over lost or made too early shows at the end.
    assert told["worker"] == [2 * case.num_rounds] * 2
    assert told["server"] == [2 * case.num_rounds] * 2


@pytest.mark.parametrize("flags", ["host", "gates"])
@pytest.mark.parametrize("gpu", WORKER_GPUS)
@pytest.mark.parametrize("waits_as", ["server", "worker"])
def test_who_waits_for_a_killed_peer_is_let_go(gpu: int, flags: str, waits_as: str) -> None:
    with Peers(Case(flags, gpu, num_layers=3), "wait") as peers:
        handle = peers.side.stream.cuda_stream
        wait = peers.flags.wait if waits_as == "server" else workers_hand_over(device(0), peers.flags)
        for layer in range(3):
            wait(handle, layer, layer == 2)
        time.sleep(0.2)
        assert not peers.side.stream.query()
        peers.process.kill()
        with pytest.raises((EOFError, ConnectionResetError)):
            receive(peers.connection)
        deadline = time.monotonic() + 20
        while not peers.side.stream.query() and time.monotonic() < deadline:
            peers.flags.stop()
            time.sleep(0.001)
        assert peers.side.stream.query()
        # The memory is this process' own and still there.
        host = torch.empty(8, dtype=torch.uint8)
        call("cuMemcpy", host.data_ptr(), peers.region.address, 8)
