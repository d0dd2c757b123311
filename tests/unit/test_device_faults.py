"""Which errors mean that a device has failed, and what an executor does then."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.errors import AttndError, Disconnected, Exhausted
from attnd.protocol.cuda.driver import CudaError
from attnd_server.attention.config import FP8, AttentionConfig
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device import faults as device_faults
from attnd_server.device.faults import DeviceFaults, is_device_fault, watch
from attnd_server.execution.executor import Executor
from attnd_server.execution.work import CacheWork, SideWork, Work
from attnd_server.kv import layer_group
from attnd_server.kv.addresses import HostAddresses
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.page_space import SharedSpace
from attnd_server.planes.cuda.watchdog import Watch, Watchdog
from tests import host_channels, interpreter
from tests.shared_calls import Caller, Waiting
from tests.unit.test_decode_graphs import Captures, new_cache, serving

CPU = torch.device("cpu")
CONFIG = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=4, page_size=4, dtype=torch.float32)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
ADVICE = """
Search for `cudaErrorIllegalAddress' in the documentation for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL + ADVICE),
        RuntimeError(ILLEGAL + ADVICE),
        RuntimeError("CUDA error: device-side assert triggered" + ADVICE),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("CUDA error: unknown error"),
        RuntimeError("CUDA error: the launch timed out and was terminated"),
        RuntimeError("CUDA driver error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error 700: an illegal memory access was encountered"),
        torch.AcceleratorError("the accelerator is not there"),
        CudaError("cuStreamQuery", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        CudaError("cuEventQuery", "CUDA_ERROR_LAUNCH_FAILED"),
        CudaError("cuMemMap", "CUDA_ERROR_ECC_UNCORRECTABLE"),
        CudaError("cuCtxSynchronize", "CUDA_ERROR_UNKNOWN"),
    ],
    ids=str,
)
def test_a_device_that_has_failed(error: BaseException) -> None:
    assert is_device_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.OutOfMemoryError(ILLEGAL),  # whatever it says
        MemoryError(),
        RuntimeError("CUDA error: out of memory" + ADVICE),
        torch.AcceleratorError("CUDA error: out of memory" + ADVICE),
        torch.AcceleratorError("CUDA error: invalid argument" + ADVICE),
        torch.AcceleratorError("CUDA error: invalid configuration argument" + ADVICE),
        torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing" + ADVICE),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device" + ADVICE),
        torch.AcceleratorError("CUDA error: too many resources requested for launch"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("CUDA error 712: part or all of the requested memory range is already mapped"),
        CudaError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY"),
        CudaError("cuMemCreate", "CUDA_ERROR_NOT_SUPPORTED"),
        CudaError("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE"),
        RuntimeError("the graphs were closed, but something still uses them"),
        ValueError(ILLEGAL),  # of whoever repeats what others said
        attnd.InvalidRequest("layer is 7, but must be 0..3"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_a_device_that_has_not(error: BaseException) -> None:
    assert not is_device_fault(error)


def chained(how: str) -> Exception:
    try:
        try:
            raise RuntimeError(ILLEGAL)
        except RuntimeError as error:
            if how == "cause":
                raise Exhausted("no memory") from error
            if how == "hidden":
                raise Exhausted("no memory") from None
            raise Exhausted("no memory")  # noqa: B904  # while the first was handled
    except Exhausted as error:
        return error


@pytest.mark.parametrize("how", ["cause", "hidden", "context"])
def test_what_an_error_came_from_counts(how: str) -> None:
    assert is_device_fault(chained(how))


def test_a_circle_of_errors_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert not is_device_fault(first)


def test_listeners_are_told_once_and_late_ones_at_once(caplog: pytest.LogCaptureFixture) -> None:
    faults, told = DeviceFaults(CPU), []
    faults.listen(told.append)
    faults.refuse()
    assert not faults.look_at(ValueError("a bug"))
    assert faults.look_at(RuntimeError(ILLEGAL + ADVICE))
    assert faults.look_at(RuntimeError("CUDA error: unknown error"))
    faults.listen(told.append)
    assert told == [ILLEGAL] * 2
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    with pytest.raises(Disconnected, match=f"cpu failed, and the server ends: {ILLEGAL}"):
        faults.refuse()


def broken(*_: object) -> bytes:
    raise torch.AcceleratorError(ILLEGAL + ADVICE)


def executor() -> Executor:
    config = ServerConfig()
    return Executor(CPU, CacheTable(config, CPU, 1 << 20), config)


class Held:
    """An executor that is busy, and what came of what waits for it."""

    def __init__(self, running: Work) -> None:
        self.executor = executor()
        self._go_on, began = threading.Event(), threading.Event()
        self.outcomes: list[tuple[str, bytes | None, BaseException | None]] = []

        def run() -> bytes:
            began.set()
            assert self._go_on.wait(30)
            return running()

        self.submit("running", run)
        assert began.wait(30)

    def submit(self, name: str, work: Work) -> None:
        self.executor.submit(work, lambda result, error: self.outcomes.append((name, result, error)))

    def end(self) -> None:
        self._go_on.set()
        self.executor.close()


def test_what_runs_and_all_that_waits_is_told_and_nothing_begins_any_more() -> None:
    held = Held(broken)
    ran: list[int] = []
    for number in range(3):
        held.submit(f"waiting {number}", CacheWork(bytes([number]), "", lambda: bytes(ran)))
    held.end()
    assert [name for name, _, _ in held.outcomes] == ["running", "waiting 0", "waiting 1", "waiting 2"]
    assert all(isinstance(error, Disconnected) and "illegal memory" in str(error) for _, _, error in held.outcomes)
    assert not ran


def test_a_failed_executor_takes_nothing() -> None:
    mine = executor()
    with pytest.raises(Disconnected, match="illegal memory"):
        mine.run_now(broken)
    for refused in (lambda: mine.run_now(lambda: b""), lambda: mine.submit(lambda: b"", lambda *_: None)):
        with pytest.raises(Disconnected, match="cpu failed"):
            refused()
    mine.close()


def test_other_errors_are_what_they_were() -> None:
    mine, outcomes = executor(), []

    def bug() -> bytes:
        raise ZeroDivisionError("a bug")

    def full() -> bytes:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ZeroDivisionError):
        mine.run_now(bug)
    with pytest.raises(Exhausted, match="cpu has no memory left for this call"):
        mine.run_now(full)
    mine.submit(bug, lambda result, error: outcomes.append(error))
    mine.submit(lambda: b"fine", lambda result, error: outcomes.append(result))
    mine.close()
    assert isinstance(outcomes[0], ZeroDivisionError)
    assert outcomes[1] == b"fine"
    assert not mine.faults.reason


def test_side_work_is_told_too() -> None:
    mine, told = executor(), threading.Event()
    outcomes: list[BaseException | None] = []
    mine.submit(
        SideWork("anybody", lambda: bytes(mine.take_turn(broken) or 0)),
        lambda result, error: (outcomes.append(error), told.set()),
    )
    assert told.wait(30)
    assert isinstance(outcomes[0], Disconnected)
    mine.close()


def test_an_executor_outlives_what_it_cannot_tidy_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "EXPIRY_PERIOD_S", 0.01)
    errors, seen = [ValueError("a bug"), RuntimeError(ILLEGAL)], threading.Event()

    def expire(table: CacheTable) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(CacheTable, "expire", expire)
    mine = executor()
    mine.faults.listen(lambda reason: seen.set())
    assert seen.wait(30)
    assert not errors
    assert mine._thread.is_alive()
    with pytest.raises(Disconnected):
        mine.submit(lambda: b"", lambda *_: None)
    mine.close()


def test_calls_that_share_a_broken_launch_are_not_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 24))
    with attnd.Client(attnd_inproc(service), timeout_s=30) as client:
        workers = [Caller(Waiting(service, client), [5], seed=number) for number in range(3)]
        for worker in workers:
            worker.open()
        monkeypatch.setattr(service.executor.runner._shared, "attend", broken)
        alone: list[int] = []
        monkeypatch.setattr(service.executor.runner, "attend", lambda call: alone.append(1))
        answers = workers[0].server.together([worker.call(0, attnd.AttentionOptions()) for worker in workers])
        assert all(isinstance(answer, Disconnected) for answer in answers)
        assert not alone


def attnd_inproc(service: Any) -> Any:
    from attnd_server.inproc import InprocTransport

    return InprocTransport(service)


def test_a_service_refuses_everything() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    service.executor.faults.fail("it is tired")
    for name, method in service.unary.items():
        if name == "GetStatus":  # which says so
            continue
        with pytest.raises(Disconnected, match="it is tired"):
            method(b"", "somebody")
        assert name
    with pytest.raises(Disconnected, match="it is tired"):
        service.open_session("somebody")
    service.close()


def test_a_fault_that_a_planes_thread_sees_is_one(caplog: pytest.LogCaptureFixture) -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    told = service.told(CudaError("cuStreamQuery", "CUDA_ERROR_ILLEGAL_ADDRESS"))
    assert isinstance(told, Disconnected)
    assert service.executor.faults.reason == "cuStreamQuery failed: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert "internal error" not in caplog.text
    service.close()


@pytest.mark.skipif(
    interpreter.reason_against() is not None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
@pytest.mark.parametrize("where", ["mark", "drain"])
def test_a_step_of_a_cuda_plane_tells_of_it(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.AcceleratorError(ILLEGAL)

    def bug(*_: object) -> Any:
        raise ValueError("a bug, upon which the stream is drained")

    geometry = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 4, "dtype": "float32"}
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    with interpreter.interpreter(), host_channels.serving(tmp_path, monkeypatch) as (client, _, server):
        with client.create_cache(**geometry, backend="triton_grouped") as cache, cache.session() as session:
            monkeypatch.setattr(host_channels.HostChannel, "mark", lambda channel: fails if where == "mark" else bug)
            if where == "drain":
                monkeypatch.setattr(host_channels.HostChannel, "drain", fails)
            step = session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode"), num_heads=4)
            with pytest.raises(AttndError, match="illegal memory access"):  # noqa: PT012  # where is the socket's choice
                step.attend(0, q, k, v)
                step.finish()
            assert server._service.executor.faults.reason == ILLEGAL
            monkeypatch.setattr(host_channels.HostChannel, "drain", lambda channel: channel.flags.stop())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no more"), MemoryError("no more"), RuntimeError("no more")])
def test_a_cache_that_cannot_be_made_leaves_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    table = CacheTable(ServerConfig(), CPU, kv_bytes=10 * CONFIG.num_bytes)
    first = table.create(CONFIG, principal="a", ttl_s=9, name="")
    (space,) = next(iter(table._spaces._spaces.values()))
    assert isinstance(space, SharedSpace)
    free, num_bytes, commits = list(space._free), CONFIG.num_bytes, []

    def commit(addresses: HostAddresses, start: int, end: int) -> None:
        commits.append(start)
        if len(commits) == 2:  # K's memory is there, V's is not
            raise error

    monkeypatch.setattr(HostAddresses, "commit", commit)
    use = (
        rf"{num_bytes} bytes: of the server's {10 * num_bytes} bytes .* {num_bytes} are in use and {9 * num_bytes} are"
    )
    with pytest.raises(Exhausted, match=use + " free, but cpu cannot allocate them: no more"):
        table.create(CONFIG, principal="a", ttl_s=9, name="")
    assert (table.num_bytes, table.all(), table._reserved) == (num_bytes, [first], {})
    assert space._free == free
    assert table.create(CONFIG, principal="a", ttl_s=9, name="").groups[0].pages.space is space


def test_half_a_cache_takes_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    table = CacheTable(ServerConfig(), CPU, kv_bytes=10 * CONFIG.num_bytes)
    monkeypatch.setattr(layer_group, "_scales", no_memory)
    with pytest.raises(Exhausted, match="no more"):
        table.create(replace(CONFIG, kv_dtype=FP8, v_dtype=None), principal="a", ttl_s=9, name="")
    assert not table._spaces._spaces
    assert not table._reserved


def test_a_device_that_breaks_while_a_cache_is_made_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.AcceleratorError(ILLEGAL)

    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 24))
    monkeypatch.setattr(HostAddresses, "__init__", fails)
    with attnd.Client(attnd_inproc(service)) as client, pytest.raises(Disconnected, match="illegal memory"):
        client.create_cache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=1)


def test_a_device_that_breaks_in_a_capture_is_not_a_reason_to_do_without() -> None:
    class Breaking(Captures):
        def __call__(self, launches: Any) -> Any:
            raise torch.AcceleratorError(ILLEGAL)

    with serving(Breaking()) as server:
        cache = new_cache(server.client)
        with pytest.raises(Disconnected, match="illegal memory"):
            cache.warm_up(num_heads=4, max_reqs=1)


def test_work_that_never_ends_is_a_fault() -> None:
    held = Held(lambda: b"late")
    assert held.executor.busy_s > 0
    failed = threading.Event()
    held.executor.faults.listen(lambda reason: failed.set())
    watch(held.executor.faults, lambda: held.executor.busy_s, limit_s=0.01, period_s=0.005)
    assert failed.wait(30)
    assert held.executor.faults.reason == "a piece of work has not ended within 0.01 s"
    held.end()
    assert held.executor.busy_s == 0


def test_short_work_is_none() -> None:
    mine, looks = DeviceFaults(CPU), threading.Event()
    times = iter([0.0, 4.9, 0.0, 5.0, 5.1])

    def busy_s() -> float:
        busy = next(times)
        if busy == 5.1:
            looks.set()
        assert not mine.reason
        return busy

    watch(mine, busy_s, limit_s=5.0, period_s=0.001)
    assert looks.wait(30)


def test_the_process_ends_with_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, ended = [], threading.Event()
    monkeypatch.setattr(device_faults.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(device_faults, "EXIT_AFTER_S", 0.0)
    device_faults.end_process("it is tired")
    assert ended.wait(30)
    assert codes == [75]


def test_a_stream_that_does_not_end_when_it_is_let_go_is_a_fault() -> None:
    faults, failed = DeviceFaults(CPU), threading.Event()
    faults.listen(lambda reason: failed.set())
    near, far = socket.socketpair()
    flags = host_channels.EventFlags(threading.Semaphore(0), threading.Semaphore(0))
    watch_of_step = Watch(flags, near, lambda: faults.fail("it does not end"), stuck_s=0.05)
    with near, Watchdog().watching(watch_of_step):
        assert not flags.is_stopped
        far.close()
        assert failed.wait(30)
    assert (flags.is_stopped, faults.reason) == (True, "it does not end")
