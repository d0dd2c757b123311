"""Tensors in shared memory: found where a message says, refused where they cannot lie, gone with their last user."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from pathlib import Path

import pytest
import torch

from attnd.errors import InvalidRequest, PermissionDenied, ServerFault
from attnd.protocol import frames
from attnd.protocol.regions import Region
from attnd.protocol.shm import sockets
from attnd.protocol.tensors import Array, torch_tensor
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2

NUM_BYTES = 8192
FLOAT32 = tensor_pb2.DTYPE_FLOAT32


@pytest.fixture
def memory() -> mmap.mmap:
    return sockets.map_memory(sockets.sealed_memory(NUM_BYTES), NUM_BYTES)


def tensor(shape: list[int], offset: int = 0, dtype: int = FLOAT32, region_id: int = 5) -> tensor_pb2.Tensor:
    place = tensor_pb2.Region(id=region_id, offset=offset)
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(dtype), shape=shape, region=place)


def test_a_tensor_is_a_view_of_the_memory(memory: mmap.mmap) -> None:
    values = torch.arange(12, dtype=torch.float32)
    memory[128 : 128 + 48] = values.numpy().tobytes()
    array = Region(5, memory).array(tensor([3, 4], 128), "q")
    assert (array.dtype, array.shape) == (FLOAT32, (3, 4))
    viewed = torch_tensor(array)
    assert torch.equal(viewed, values.view(3, 4))
    memory[128:132] = torch.tensor([9.0]).numpy().tobytes()
    assert viewed[0, 0] == 9


def test_a_tensor_may_end_where_the_region_does(memory: mmap.mmap) -> None:
    assert Region(5, memory).array(tensor([16], NUM_BYTES - 64), "q").data.nbytes == 64
    assert Region(5, memory).array(tensor([0, 1 << 60], NUM_BYTES), "q").data.nbytes == 0


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (tensor([4], region_id=6), "q lies in region 6, but this plane has region 5"),
        (tensor([4], 32), "q has offset 32, but must have a multiple of 64"),
        (tensor([17], NUM_BYTES - 64), f"q has offset {NUM_BYTES - 64} and needs 68 bytes"),
        (tensor([0], NUM_BYTES + 64), f"q has offset {NUM_BYTES + 64} and needs 0 bytes"),
        (tensor([4], (1 << 64) - 64), "ends at byte 8192"),
        (tensor([1 << 62, 1 << 62]), "ends at byte 8192"),
        (tensor([-1]), "q has 1 extents, but must have at most 8 extents, none negative"),
        (tensor([-4, -4]), "none negative"),
        (tensor([1] * 9), "q has 9 extents"),
        (tensor([4], dtype=0), "q has dtype unspecified"),
        (tensor([4], dtype=6), "q has dtype 6"),
        (tensor([4], dtype=99), "q has dtype 99"),
    ],
)
def test_a_tensor_that_cannot_lie_there_is_refused(memory: mmap.mmap, message: tensor_pb2.Tensor, text: str) -> None:
    request = attention_pb2.AttendRequest(call=step_pb2.Call(step_id=1, q=message)).SerializeToString()
    with pytest.raises(InvalidRequest, match=text):
        frames.ATTEND_REQUEST.decode(request, Region(5, memory))


def test_messages_mix_tensors_in_them_and_in_the_region(memory: mmap.mmap) -> None:
    inline = tensor_pb2.Tensor(dtype=FLOAT32, shape=[1], data=b"abcd")
    call = step_pb2.Call(step_id=3, q=tensor([2], 64), k=inline, reply=tensor_pb2.Region(id=5, offset=640))
    request = attention_pb2.AttendRequest(call=call).SerializeToString()
    message, tensors = frames.ATTEND_REQUEST.decode(request, Region(5, memory))
    assert message.call.reply.offset == 640
    assert {name: bytes(array.data) for name, array in tensors.items()} == {"q": bytes(8), "k": b"abcd"}
    with pytest.raises(InvalidRequest, match="q lies in region 5, but this plane is inline"):
        frames.ATTEND_REQUEST.decode(request)


def test_placed_arrays_come_back(memory: mmap.mmap) -> None:
    region = Region(5, memory)
    arrays = [Array(FLOAT32, (3,), memoryview(b"0123456789ab")), Array(FLOAT32, (1,), memoryview(b"wxyz"))]
    messages, views = region.placed(arrays, 128, "reply")
    assert [message.region.offset for message in messages] == [128, 192]
    assert [bytes(region.array(message, "x").data) for message in messages] == [b"0123456789ab", b"wxyz"]
    views[1][:] = b"WXYZ"
    assert bytes(memory[192:196]) == b"WXYZ"
    with pytest.raises(InvalidRequest, match="reply has offset 8192"):
        region.placed(arrays, NUM_BYTES - 64, "reply")
    assert bytes(memory[NUM_BYTES - 64 :]) == bytes(64)  # not even the one that would have fitted


def test_memory_is_unmapped_with_its_last_view() -> None:
    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:attnd")

    before = num_mappings()
    region = Region(5, sockets.map_memory(sockets.sealed_memory(NUM_BYTES), NUM_BYTES))
    array = region.array(tensor([4]), "q")
    viewed = torch_tensor(array)
    del array
    region.close()
    with pytest.raises(InvalidRequest, match="ends at byte 0"):
        region.array(tensor([4]), "q")
    assert num_mappings() == before + 1
    del viewed
    assert num_mappings() == before


def test_memory_keeps_its_size() -> None:
    descriptor = sockets.sealed_memory(NUM_BYTES)
    for size in (0, NUM_BYTES * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


def test_memory_that_could_shrink_is_not_mapped() -> None:
    descriptor = os.memfd_create("loose")
    os.ftruncate(descriptor, NUM_BYTES)
    with pytest.raises(ServerFault, match="seals"):
        sockets.map_memory(descriptor, NUM_BYTES)
    with pytest.raises(ServerFault, match=f"the region has {NUM_BYTES} bytes"):
        sockets.map_memory(sockets.sealed_memory(NUM_BYTES), NUM_BYTES * 2)


def test_memory_travels_over_a_socket_and_is_the_same() -> None:
    one, other = socket.socketpair()
    with one, other:
        descriptor = sockets.sealed_memory(NUM_BYTES)
        sockets.send_memory(one, descriptor)
        here = sockets.map_memory(descriptor, NUM_BYTES)
        there = sockets.map_memory(sockets.receive_memories(other, 1)[0], NUM_BYTES)
        here[:5] = b"hello"
        assert there[:5] == b"hello"
        assert sockets.peer_of(one) == (os.getpid(), os.geteuid())


def test_a_refusal_travels_instead() -> None:
    one, other = socket.socketpair()
    with one, other:
        sockets.send_refusal(one, PermissionDenied("not you"))
        with pytest.raises(PermissionDenied, match="not you"):
            sockets.receive_memories(other, 1)[0]
        one.close()
        with pytest.raises(ConnectionResetError):
            sockets.receive_memories(other, 1)[0]


def test_a_refusal_that_does_not_end_has_the_deadline_of_the_whole() -> None:
    """A byte comes at each look; each alone would be in time."""
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(0.2)
        one.sendall((1_000).to_bytes(4, "little"))
        done = threading.Event()

        def drip() -> None:
            while not done.wait(0.05):
                one.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with pytest.raises(TimeoutError):
                sockets.receive_memories(other, 1)
        finally:
            done.set()
            dripping.join()


@pytest.mark.parametrize(("announced", "rule"), [(65_537, "must have at most 65536"), (3, "cannot be read")])
def test_a_refusal_that_is_none_is_the_servers_fault(announced: int, rule: str) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(announced.to_bytes(4, "little") + b"\xff" * 3)
        with pytest.raises(ServerFault, match=rule):
            sockets.receive_memories(other, 1)


def test_more_descriptors_than_were_asked_for_are_closed(tmp_path: Path) -> None:
    one, other = socket.socketpair()
    with one, other, (tmp_path / "file").open("w") as file:
        before = len(os.listdir("/proc/self/fd"))
        sockets.send_memory(one, *[file.fileno()] * 20)
        for descriptor in sockets.receive_memories(other, 1):
            os.close(descriptor)
        assert len(os.listdir("/proc/self/fd")) == before
