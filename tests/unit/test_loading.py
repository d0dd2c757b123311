"""How kernels get to a GPU while steps wait there: at once, or into a second context first; with fakes for CUDA."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from attnd.errors import Unsupported
from attnd.protocol.cuda.driver import CudaError
from attnd_server.device import quiet as quiet_module
from attnd_server.device.kernels import loading, local_memory, second_context
from attnd_server.device.kernels.loading import KernelLoader, NotNow, StandIn, num_standing_in
from attnd_server.device.kernels.second_context import SecondContext
from attnd_server.device.quiet import QuietGpu
from tests.servers import wait_for

GPU = torch.device("cuda", 7)
PRIMARY, SECOND = "primary", "second"
PATIENCE_S = 20.0


class FakeCuda:
    """Notes what is asked of the driver, in which context.

    Attributes:
        asked: functions with arguments, each with the current context.
        pending: streams on which something is not over.
        captured: streams that are being captured.
        is_full: whether there is no memory for another context.
        num_spills: registers of a loaded kernel that lie in local memory.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.pending: set[int] = set()
        self.captured: set[int] = set()
        self.is_full = False
        self.num_spills = 200
        self.mode = "global"
        self.contexts: list[str] = []  # of the thread
        self._numbers = itertools.count(1)

    def call(self, function: str, *arguments: Any) -> Any:
        self.asked.append((self.current, function, *arguments))
        if function == "cuCtxPushCurrent":
            self.contexts.append(arguments[0])
        elif function == "cuCtxPopCurrent":
            self.contexts.pop()
        elif function == "cuCtxCreate":
            if len(arguments) == 3:
                raise TypeError("older bindings take two arguments")
            if self.is_full:
                raise CudaError(function, "CUDA_ERROR_OUT_OF_MEMORY")
            self.contexts.append(SECOND)
            return SECOND
        elif function == "cuThreadExchangeStreamCaptureMode":
            self.mode, before = arguments[0], self.mode
            return before
        elif function == "cuStreamIsCapturing":
            return arguments[0] in self.captured
        return next(self._numbers)

    @property
    def current(self) -> str:
        return self.contexts[-1] if self.contexts else ""

    def driver(self) -> Any:
        return SimpleNamespace(
            CUfunction=int,
            CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1),
            CUevent_flags=SimpleNamespace(CU_EVENT_DISABLE_TIMING=2),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed"),
            CUstreamCaptureStatus=SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=False),
            cuStreamQuery=self._query,
        )

    def _query(self, stream: int) -> tuple[int]:
        assert stream not in self.captured
        return (int(stream in self.pending),)

    def load_binary(self, name: str, kernel: bytes, shared: int, index: int) -> tuple[int, int, int, int, int]:
        self.asked.append((self.current, "load_binary", name, kernel, shared, index))
        return 1, 4711, 32, self.num_spills, 1024

    def names(self) -> list[tuple[Any, ...]]:
        """What was asked, without the stack of contexts and the mode."""
        left_out = ("cuCtxPushCurrent", "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode")
        return [each[:2] for each in self.asked if each[1] not in left_out]


class FakePrimary:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def current(self) -> Any:
        cuda = self._cuda

        class Current:
            def __enter__(self) -> None:
                cuda.contexts.append(PRIMARY)

            def __exit__(self, *_: object) -> None:
                cuda.contexts.pop()

        return Current()


class FakeLauncher:
    """Triton's, which notes its launches."""

    launches: list[tuple[Any, ...]]

    def __init__(self, src: object, metadata: object) -> None:
        self.launches = []

    def __call__(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class FakeCompiled:
    """A compiled kernel of Triton's."""

    def __init__(self, quiet: QuietGpu, failure: str = "") -> None:
        self.name, self.kernel, self.src, self.packed_metadata = "a_kernel", b"cubin", object(), (4, 1, 100_000)
        self.metadata = SimpleNamespace(shared=100_000)
        self.module: object = None
        self.function = 0
        self.n_spills = 0
        self.launches: list[tuple[Any, ...]] = []
        self._quiet, self._failure = quiet, failure

    def _init_handles(self) -> None:
        assert self._quiet.are_over(0), "a kernel is loaded while a step waits"
        if self._failure:
            raise RuntimeError(self._failure)
        self.module, self.function, self.n_spills = object(), 12, 500

    def run(self, *arguments: Any) -> None:
        assert self.module is not None
        self.launches.append(arguments)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    active = SimpleNamespace(launcher_cls=FakeLauncher, utils=SimpleNamespace(load_binary=fake.load_binary))
    for module in (loading, second_context):
        monkeypatch.setattr(module, "triton_driver", lambda: active)
    for module in (loading, second_context, local_memory):
        monkeypatch.setattr(module, "call", fake.call)
    for module in (loading, second_context):
        monkeypatch.setattr(module, "driver", fake.driver)
    monkeypatch.setattr(second_context, "device", lambda index: FakePrimary(fake))
    monkeypatch.setattr(loading, "gpu", lambda index: SimpleNamespace(make_current=lambda: None))
    monkeypatch.setattr(local_memory.LocalMemory, "reserve", lambda memory, size: reserve(fake, memory, size))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    second_context.second_context.cache_clear()
    yield fake
    second_context.second_context.cache_clear()


def reserve(cuda: FakeCuda, memory: local_memory.LocalMemory, num_bytes: int) -> None:
    cuda.asked.append((cuda.current, "reserve", num_bytes))
    memory.num_bytes = num_bytes


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[QuietGpu]:
    found = QuietGpu()
    monkeypatch.setattr(loading, "quiet_gpu", lambda device: found)
    yield found
    found.close(0)


ARGUMENTS = (1, 2, 3, 99, 0, (4, 1, 100_000), None, None, None)


def test_a_kernel_is_loaded_where_it_belongs_while_nothing_waits(cuda: FakeCuda, quiet: QuietGpu) -> None:
    compiled = FakeCompiled(quiet)
    assert KernelLoader(GPU).load(compiled) is compiled
    assert [each[1:] for each in cuda.asked] == [("cuFuncLoad", 12), ("reserve", 2000)]
    assert num_standing_in(GPU) == 0


def test_a_step_that_is_soon_over_is_waited_for(cuda: FakeCuda, quiet: QuietGpu) -> None:
    compiled = FakeCompiled(quiet)
    with quiet.waits():
        thread = threading.Thread(target=KernelLoader(GPU).load, args=(compiled,))
        thread.start()
        time.sleep(0.02)
        assert compiled.module is None
    thread.join(PATIENCE_S)
    assert compiled.module is not None
    assert "load_binary" not in str(cuda.asked)


def test_a_kernel_stands_in_until_it_is_loaded(cuda: FakeCuda, quiet: QuietGpu) -> None:
    compiled, told = FakeCompiled(quiet), []
    loader = KernelLoader(GPU, lambda *loaded: told.append(loaded))
    q = torch.zeros(4)
    with quiet.waits():
        stand_in = loader.load(compiled)
        assert isinstance(stand_in, StandIn)
        assert compiled.module is None
        assert num_standing_in(GPU) == 1
        assert (SECOND, "load_binary", "a_kernel", b"cubin", 100_000, 7) in cuda.asked
        assert cuda.names()[-3:] == [(SECOND, "reserve"), (SECOND, "load_binary"), (SECOND, "cuFuncLoad")]
        assert cuda.contexts == []
        assert stand_in.launch_metadata((1,), 99) is None
        stand_in.run(*ARGUMENTS, q, 5, None)
        (launch,) = stand_in._launcher.launches
        assert launch[:3] == (1, 2, 3)
        assert launch[3] != 99  # a stream of the second context
        assert launch[4:] == (4711, (4, 1, 100_000), None, None, None, q.data_ptr(), 5, None)
        assert loader.load(FakeCompiled(quiet))._context is stand_in._context
        assert not told
    wait_for(lambda: len(told) == 2, "the kernel is not loaded")
    assert told[0] == (stand_in, compiled)
    assert num_standing_in(GPU) == 0
    stand_in.run(*ARGUMENTS, q, 5)
    assert len(stand_in._launcher.launches) == 1
    (launch,) = compiled.launches
    assert launch[3:5] == (99, 12)
    assert launch[-2] is q


def test_a_kernel_that_needs_more_local_memory_waits_for_a_moment(cuda: FakeCuda, quiet: QuietGpu) -> None:
    """The driver would wait for all that runs, in both contexts, before its first launch."""
    cuda.num_spills = 300
    loader, compiled = KernelLoader(GPU), FakeCompiled(quiet)
    with quiet.waits():
        with pytest.raises(NotNow):
            loader.load(compiled)
        assert num_standing_in(GPU) == 0
    assert loader.load(compiled) is compiled


def test_a_step_that_has_stalled_is_not_waited_for(
    cuda: FakeCuda, quiet: QuietGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet_module, "_STALLED_S", 0.0)
    monkeypatch.setattr(loading, "_PATIENCE_S", PATIENCE_S)
    with quiet.waits():
        assert quiet.has_stalled()
        assert isinstance(KernelLoader(GPU).load(FakeCompiled(quiet)), StandIn)
    assert not quiet.has_stalled()


def test_a_launch_in_the_second_context_comes_in_the_order_of_the_stream(cuda: FakeCuda) -> None:
    context = SecondContext(7)
    cuda.asked.clear()
    context.launch(99, lambda own: cuda.call("launch", own, cuda.mode))
    assert cuda.contexts == []
    assert cuda.mode == "global"
    made = {each[1]: each for each in cuda.asked}
    own, mode = made["launch"][2:]
    assert mode == "relaxed"  # streams and events can be made while the thread captures
    names = [
        (PRIMARY, "cuEventCreate"),
        (PRIMARY, "cuEventRecord"),
        (SECOND, "cuStreamCreate"),
        (SECOND, "cuStreamWaitEvent"),
        (SECOND, "launch"),
        (SECOND, "cuEventCreate"),
        (SECOND, "cuEventRecord"),
        (PRIMARY, "cuStreamWaitEvent"),
        ("", "cuEventDestroy"),
        ("", "cuEventDestroy"),
    ]
    assert cuda.names() == names
    records, waits = (
        [each for each in cuda.asked if each[1] == name] for name in ("cuEventRecord", "cuStreamWaitEvent")
    )
    before, after = records[0][2], records[1][2]
    assert records == [(PRIMARY, "cuEventRecord", before, 99), (SECOND, "cuEventRecord", after, own)]
    assert waits == [(SECOND, "cuStreamWaitEvent", own, before, 0), (PRIMARY, "cuStreamWaitEvent", 99, after, 0)]
    streams = []
    for stream in (99, 0, 99):
        context.launch(stream, streams.append)
    assert streams == [own, streams[1], own]  # one for each: another may wait for its worker
    assert streams[1] != own


def test_a_launch_that_fails_leaves_nothing(cuda: FakeCuda) -> None:
    context = SecondContext(7)
    with pytest.raises(ZeroDivisionError):
        context.launch(99, lambda own: 1 // 0)
    names = [name for _, name in cuda.names()]
    assert names.count("cuEventCreate") == names.count("cuEventDestroy") == 1
    assert cuda.mode == "global"
    assert cuda.contexts == []
    context.launch(99, lambda own: None)


def test_a_kernel_is_loaded_into_the_second_context_once_nothing_is_left_there(
    cuda: FakeCuda, quiet: QuietGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_context, "_TRY_S", 0.005)
    context, streams = SecondContext(7), list[int]()
    for stream in (0, 99):
        context.launch(stream, streams.append)
    cuda.pending.add(streams[1])
    cuda.captured.add(streams[0])  # must not be asked
    thread = threading.Thread(target=context.load, args=(FakeCompiled(quiet), quiet))
    thread.start()
    time.sleep(0.1)
    assert "load_binary" not in str(cuda.asked)
    cuda.pending.clear()
    thread.join(PATIENCE_S)
    assert "load_binary" in str(cuda.asked)


def test_without_memory_for_a_second_context_a_kernel_waits(
    cuda: FakeCuda, quiet: QuietGpu, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.is_full = True
    loader, loaded = KernelLoader(GPU), []
    with quiet.waits(), caplog.at_level(logging.WARNING):
        threads = [threading.Thread(target=lambda: loaded.append(loader.load(FakeCompiled(quiet)))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: "no second context" in caplog.text, "nobody was told")
        time.sleep(0.1)
        assert not loaded
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(loaded) == 2
    assert caplog.text.count("no second context") == 1
    with quiet.waits():
        loader.close()
        with pytest.raises(RuntimeError, match="shutting down"):
            loader.load(FakeCompiled(quiet))


def test_a_kernel_that_cannot_be_loaded_says_why(cuda: FakeCuda, quiet: QuietGpu) -> None:
    with pytest.raises(RuntimeError, match="out of resources"):
        KernelLoader(GPU).load(FakeCompiled(quiet, "out of resources: shared memory"))


def test_without_cuda_bindings_nothing_waits_and_nothing_is_asked(
    cuda: FakeCuda, quiet: QuietGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise Unsupported("no cuda-bindings", field="plane")

    monkeypatch.setattr(loading, "driver", missing)
    compiled = FakeCompiled(quiet)
    assert KernelLoader(GPU).load(compiled) is compiled
    assert cuda.asked == []


class NotedStream:
    handle = 5
    did: ClassVar[list[str]] = []

    def __init__(self, on: object) -> None:
        self.did.append("made")

    def synchronize(self) -> None:
        self.did.append("waited for")

    def close(self) -> None:
        self.did.append("closed")


def test_local_memory_grows_by_a_launch_and_never_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[str] = []
    launches: list[Any] = []

    def kernels(ptx: str, names: tuple[str, ...]) -> dict[str, Any]:
        sizes.extend(re.findall(r"memory\[(\d+)\]", ptx))
        return {name: name for name in names}

    monkeypatch.setattr(local_memory, "kernels", kernels)
    monkeypatch.setattr(local_memory, "call", lambda *asked: launches.append(asked))
    monkeypatch.setattr(local_memory, "Stream", NotedStream)
    monkeypatch.setattr(local_memory, "device", lambda index: index)
    NotedStream.did.clear()
    memory = local_memory.LocalMemory(7)
    for num_bytes in (1024, 0, 1000, 1025, 1040, 5000):
        memory.reserve(num_bytes)
    assert sizes == ["1024", "1040", "5008"]
    assert memory.num_bytes == 5008
    assert len(launches) == 3
    assert NotedStream.did == ["made", "waited for", "closed"] * 3


@pytest.mark.parametrize("num_bytes", [1024, 8192, 120_000])
def test_the_kernel_that_makes_it_grow_needs_so_many_bytes(tmp_path: Path, num_bytes: int) -> None:
    triton = pytest.importorskip("triton")
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.exists():
        pytest.skip("needs ptxas")
    source = tmp_path / "kernel.ptx"
    source.write_text(local_memory._PTX % num_bytes)
    command = [ptxas, "-v", "-arch=sm_90", "-o", tmp_path / "kernel.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{num_bytes} bytes stack frame" in done.stderr
