"""The parts of a cuda plane that can be looked at without a GPU: places, words, kernels' text, reasons."""

from __future__ import annotations

import ctypes
import mmap
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
from attnd.planes.cuda.opening import check_reach
from attnd.planes.cuda.tensors import check_capture, copy_in
from attnd.protocol.cuda import copies as cuda_copies
from attnd.protocol.cuda import driver as cuda_driver
from attnd.protocol.cuda import gate_flags as cuda_gates
from attnd.protocol.cuda import host_flags as cuda_words
from attnd.protocol.cuda.device_bytes import CPU, DeviceBytes
from attnd.protocol.cuda.layout import ALIGNMENT, WORDS_BYTES, Geometry, step_layout
from attnd.protocol.cuda.memory import rounded
from attnd.v1 import tensor_pb2
from attnd_server.planes.cuda.planes import cuda_planes
from attnd_server.planes.cuda.resident import gates as resident_gates
from attnd_server.planes.open_planes import PlaneTable
from attnd_server.planes.worker import Worker

LLAMA_8B = Geometry(8, 128, 128, tensor_pb2.DTYPE_BFLOAT16)


def test_tensors_lie_one_behind_the_other_after_the_words() -> None:
    layout = step_layout(3, 9, Geometry(3, 24, 8, tensor_pb2.DTYPE_FLOAT32), 1 << 20)
    assert [place.shape for place in layout] == [(3, 9, 24), (3, 3, 24), (3, 3, 8), (3, 9, 8), (3, 9)]
    end = WORDS_BYTES
    for place in layout:
        assert place.offset % ALIGNMENT == 0
        assert end <= place.offset < end + ALIGNMENT
        end = place.offset + place.num_bytes
    assert layout.lse.dtype == tensor_pb2.DTYPE_FLOAT32


def test_a_step_that_the_region_does_not_hold_is_refused() -> None:
    whole = step_layout(64, 32, LLAMA_8B, 1 << 30).lse
    needed = whole.offset + whole.num_bytes
    assert step_layout(64, 32, LLAMA_8B, needed) == step_layout(64, 32, LLAMA_8B, 1 << 30)
    with pytest.raises(attnd.InvalidRequest, match=f"which take {needed} bytes of a cuda plane's region, but it has"):
        step_layout(64, 32, LLAMA_8B, needed - 1)


@pytest.mark.parametrize(("num_bytes", "given"), [(0, 512), (1, 512), (512, 512), (513, 1024)])
def test_memory_is_rounded_up_to_what_the_gpu_gives(num_bytes: int, given: int) -> None:
    assert rounded(num_bytes, 512) == given


def test_memory_becomes_a_tensor_on_the_device_that_is_named() -> None:
    memory = ctypes.create_string_buffer(64)
    tensor = torch.from_dlpack(DeviceBytes(ctypes.addressof(memory), 64, (CPU, 0)))
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((64,), torch.uint8, "cpu")
    tensor[3] = 7
    assert memory.raw[3] == 7
    view = tensor[4:12].view(torch.bfloat16)
    del tensor
    view.fill_(1)
    assert memory.raw[4:6] == b"\x80\x3f"


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_the_gates_assemble(tmp_path: Path, architecture: str) -> None:
    assembler = triton_assembler()
    (tmp_path / "gates.ptx").write_text(cuda_gates.PTX)
    command = [assembler, f"-arch={architecture}", str(tmp_path / "gates.ptx"), "-o", str(tmp_path / "gates.cubin")]
    subprocess.run(command, check=True)
    for name in ("wait", "signal"):
        assert f"attnd_{name}".encode() in (tmp_path / "gates.cubin").read_bytes()


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_the_copies_assemble(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "copies.ptx").write_text(cuda_copies.PTX)
    files = [str(tmp_path / "copies.ptx"), "-o", str(tmp_path / "copies.cubin")]
    subprocess.run([triton_assembler(), f"-arch={architecture}", *files], check=True)
    for name in ("copy", "copy_and_write", "post", "hand_over"):
        assert f"attnd_{name}".encode() in (tmp_path / "copies.cubin").read_bytes()


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_the_gates_of_resident_steps_assemble(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "resident.ptx").write_text(resident_gates.PTX)
    files = [str(tmp_path / "resident.ptx"), "-o", str(tmp_path / "resident.cubin")]
    subprocess.run([triton_assembler(), f"-arch={architecture}", *files], check=True)
    for name in ("begin", "wait", "signal", "end", "resume"):
        assert f"attnd_resident_{name}".encode() in (tmp_path / "resident.cubin").read_bytes()


def test_what_a_kernel_copies_of_a_tensor() -> None:
    qkv = torch.zeros(5, 4 * 16 + 2 * 2 * 16, dtype=torch.bfloat16)
    q = qkv[:, :64].view(5, 4, 16)
    copy = copy_in(4096, q)
    assert copy == (4096, q.data_ptr(), 5, 128, 256)
    assert copy.is_possible
    assert copy_in(4096, q[2:3]) == (4096, q.data_ptr() + 512, 1, 128, 128)
    assert copy_in(4096, q[:, ::2]) is None
    assert copy_in(4096, q.transpose(1, 2)) is None
    odd = torch.zeros(5 * 64 + 1, dtype=torch.bfloat16)[1:].view(5, 4, 16)
    copy = copy_in(4096, odd)
    assert copy is not None
    assert not copy.is_possible


def triton_assembler() -> str:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not path.exists():
        pytest.skip("this triton has no ptxas")
    return str(path)


class FakeDriver:
    """A driver that notes operations of streams. Words of the host have the address that they have here."""

    CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP = 1, 2
    CUstreamBatchMemOpType = SimpleNamespace(CU_STREAM_MEM_OP_WAIT_VALUE_32=1, CU_STREAM_MEM_OP_WRITE_VALUE_32=2)
    CUstreamWriteValue_flags = SimpleNamespace(CU_STREAM_WRITE_VALUE_DEFAULT=0)
    CUstreamWaitValue_flags = SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0)

    def __init__(self) -> None:
        self.operations: list[tuple[str, int, int]] = []
        self.result: Any = 0
        self.registered = 0

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuMemHostRegister(self, address: int, num_bytes: int, flags: int) -> tuple[int]:
        self.registered += 1
        return (0,)

    def cuMemHostUnregister(self, address: int) -> tuple[int]:
        self.registered -= 1
        return (0,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[int, int]:
        self.base = address
        return (0, address)

    def CUstreamBatchMemOpParams(self) -> Any:
        return SimpleNamespace(writeValue=SimpleNamespace(), waitValue=SimpleNamespace())

    def CUdeviceptr(self, value: int) -> int:
        return value

    def cuuint32_t(self, value: int) -> int:
        return value

    def cuStreamBatchMemOp(self, stream: int, count: int, operations: list[Any], flags: int) -> tuple[Any]:
        assert count == len(operations)
        for operation in operations:
            is_wait = operation.operation == 1
            part = operation.waitValue if is_wait else operation.writeValue
            self.operations.append(("wait" if is_wait else "write", part.address - self.base, part.value))
        return (self.result,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    for module in (cuda_driver, cuda_words):
        monkeypatch.setattr(module, "driver", lambda: fake)
    return fake


def test_host_words_are_handed_over_as_the_contract_says(driver: FakeDriver) -> None:
    worker = cuda_words.HostFlags(cuda_words.HostWords(mmap.mmap(-1, 4096)), signal=0, flag=64)
    for layer in range(2):
        worker.signal(7, layer, layer == 1)
        worker.wait(7, layer, layer == 1)
    to_server, to_worker = 0, 256
    assert driver.operations == [
        ("write", to_server, 1),
        ("wait", to_worker, 1),
        ("write", to_server, 2),
        ("wait", to_worker, 2),
        ("write", to_worker, 0),
    ]
    driver.operations.clear()
    server = cuda_words.HostFlags(cuda_words.HostWords(mmap.mmap(-1, 4096)), signal=64, flag=0)
    for layer in range(2):
        server.wait(7, layer, layer == 1)
        server.signal(7, layer, layer == 1)
    assert driver.operations == [
        ("wait", to_server, 1),
        ("write", to_worker, 1),
        ("wait", to_server, 2),
        ("write", to_server, 0),
        ("write", to_worker, 2),
    ]
    worker.close()
    server.close()
    assert driver.registered == 0


def test_a_side_that_is_stopped_lets_everything_pass(driver: FakeDriver) -> None:
    memory = mmap.mmap(-1, 4096)
    flags = cuda_words.HostFlags(cuda_words.HostWords(memory), signal=0, flag=64)
    flags.stop()
    assert flags.is_stopped
    (word,) = memoryview(memory)[256:260].cast("I")
    assert 1024 < word < 1 << 31  # beyond every layer's value, as a signed comparison sees it
    assert memory[0:4] == bytes(4)


class OverwrittenWords(cuda_words.HostWords):
    """Of which the other side writes one over, so many times."""

    num_overwritten, num_writes, num_reads = 0, 0, 0

    def write(self, index: int, value: int) -> None:
        self.num_writes += 1
        super().write(index, value)

    def read(self, index: int) -> int:
        self.num_reads += 1
        if self.num_overwritten:
            self.num_overwritten -= 1
            super().write(index, 0)
        return super().read(index)


def test_a_word_that_the_other_side_writes_over_is_written_again_and_again(driver: FakeDriver) -> None:
    words = OverwrittenWords(mmap.mmap(-1, 4096))
    flags = cuda_words.HostFlags(words, signal=0, flag=64)
    flags.stop()
    assert words.num_writes == 1  # nobody has: no more than that
    words.num_overwritten = 1
    flags.stop()
    assert words.num_writes > 100
    assert words.read(64) == cuda_words._RELEASED
    flags.close()


def test_a_failed_call_of_the_driver_says_which(driver: FakeDriver) -> None:
    flags = cuda_words.HostFlags(cuda_words.HostWords(mmap.mmap(-1, 4096)), signal=0, flag=64)
    driver.result = SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED")
    with pytest.raises(cuda_driver.CudaError, match="cuStreamBatchMemOp failed: CUDA_ERROR_NOT_SUPPORTED") as caught:
        flags.signal(7, 0, False)
    assert caught.value.name == "CUDA_ERROR_NOT_SUPPORTED"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        attnd.Unsupported, match=r"needs the package cuda-bindings, which comes with attnd\[cuda\]; in a"
    ):
        cuda_driver.driver.__wrapped__()


def test_a_server_without_a_gpu_says_so() -> None:
    assert cuda_planes(torch.device("cpu"), 1 << 20, 16) == "the server's device is cpu, and it needs a GPU"


def gpu(uuid: str, reaches: bool = True) -> Any:
    return SimpleNamespace(uuid=uuid, reaches=lambda other: reaches)


def test_gpus_that_cannot_share_memory_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "device_of", {"b": gpu("b")}.get)
    check_reach(gpu("a"), "b")
    with pytest.raises(attnd.Unsupported, match="the server's GPU is c, which must be among those that this process"):
        check_reach(gpu("a"), "c")
    with pytest.raises(attnd.Unsupported, match="GPU a does not reach the server's b, and must reach it directly"):
        check_reach(gpu("a", reaches=False), "b")


def test_workers_that_share_the_servers_gpu_have_a_limit_of_their_own() -> None:
    planes = PlaneTable("/socket", 1 << 20, max_planes=1, max_cuda_planes=9)
    here, there = Worker("here", True), Worker("there", True)
    first = planes.open("me", here, most_beside=2)
    planes.open("me", there)
    planes.open("me", here, most_beside=2)
    with pytest.raises(
        attnd.Exhausted, match="2 cuda planes of workers on the server's GPU are open, which is the limit"
    ):
        planes.open("me", here, most_beside=2)
    planes.open("me", there)
    planes.close(first.id, "me")
    planes.open("me", here, most_beside=2)


def test_shm_and_cuda_planes_are_counted_apart() -> None:
    planes = PlaneTable("/somewhere/a.sock", 4096, 1, 2)
    assert planes.open("me").worker is None
    assert planes.open("me", Worker("a")).worker == ("a", False)
    planes.open("me", Worker("b"))
    with pytest.raises(attnd.Exhausted, match="2 cuda planes are open, which is the limit: each has a stream"):
        planes.open("me", Worker("a"))
    with pytest.raises(attnd.Exhausted, match="1 shm planes are open, which is the limit"):
        planes.open("me")


def test_a_capture_on_another_gpu_is_refused() -> None:
    """torch makes the stream of its captures once, on the GPU that is current then."""

    def torch_cuda(current: int, capturing: bool) -> SimpleNamespace:
        return SimpleNamespace(current_device=lambda: current, is_current_stream_capturing=lambda: capturing)

    for current, capturing in ((1, False), (1, True), (0, False)):
        check_capture(torch_cuda(current, capturing), 1)
    with pytest.raises(attnd.InvalidRequest, match="captured on a stream of cuda:0, but a session on cuda:1 needs"):
        check_capture(torch_cuda(0, True), 1)


def test_who_opens_a_plane_while_another_is_on_its_way_out_is_told_to_ask_again() -> None:
    table = PlaneTable("/socket", 1 << 20, max_planes=1, max_cuda_planes=1)
    ours, theirs = socket.socketpair()
    with ours:
        plane = table.open("me", Worker("gpu"))
        with pytest.raises(attnd.Exhausted) as refused:
            table.open("me", Worker("gpu"))
        assert refused.value.retry_after_s is None  # its ticket may yet be brought
        table.claim(plane.ticket, ours)
        with theirs, pytest.raises(attnd.Exhausted) as refused:
            table.open("me", Worker("gpu"))
        assert refused.value.retry_after_s is None
        with pytest.raises(attnd.Exhausted) as refused:
            table.open("me", Worker("gpu"))
        assert refused.value.retry_after_s == PlaneTable.RETRY_S
        table.forget(plane)
        table.open("me", Worker("gpu"))
