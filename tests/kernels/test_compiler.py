"""Kernels are compiled in processes beside this one, and found by others in Triton's cache; with real processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from attnd_server.device.kernels.compiler import CompilationFailed, CompilerUnavailable, ProcessCompiler
from attnd_server.device.kernels.folder import KernelFolder
from attnd_server.device.kernels.launchers import stand_in_for_driver
from attnd_server.device.kernels.spec import KernelSpec
from tests.kernels.test_compile import reason_against

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))

MODULE = "tests.kernels.sample_kernels"
LONG_S = 600
# Of kernels, in another process: for each "True" if Triton's cache has it.
LOOK_UP = """
import pickle, sys
from triton import knobs
knobs.compilation.listener = lambda *, cache_hit, **_: print(cache_hit)
target, folder, specs = pickle.loads(sys.stdin.buffer.read())
if folder is not None:
    folder.install()
for spec in specs:
    spec.compile(target)
"""

Start = Callable[..., ProcessCompiler]


def sample(name: str, value: float = 1, num_warps: int = 1) -> KernelSpec:
    """A variant of a sample kernel."""
    function = SimpleNamespace(fn=SimpleNamespace(__module__=MODULE, __qualname__=name))
    parameter = "SECONDS" if name == "slow" else "FACTOR"
    return KernelSpec.of(
        function,
        {"output": "*fp32", parameter: "constexpr"},
        {(1,): value},
        {(0,): [["tt.divisibility", 16]]},
        SimpleNamespace(num_warps=num_warps),
    )


def target() -> Any:
    """A GPU that is not here."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


def found(*specs: KernelSpec, folder: KernelFolder | None = None) -> list[bool]:
    """Whether another process finds each kernel compiled; it is afterwards."""
    given = pickle.dumps((target(), folder, specs))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOOK_UP]
    printed = subprocess.run(command, input=given, env=environment, stdout=subprocess.PIPE, timeout=60, check=True)
    return [{"True": True, "False": False}[line] for line in printed.stdout.decode().split()]


def is_there(process: psutil.Process) -> bool:
    """Whether a process has not ended, though nobody may have asked how."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Of other tests of this process, whose servers go on.
others: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def _others() -> None:
    others.clear()
    others.update(psutil.Process().children(recursive=True))


def processes(recursive: bool = True) -> list[psutil.Process]:
    """The process that forks and, unless only that is asked for, all that it has started."""
    return [each for each in psutil.Process().children(recursive) if each not in others and is_there(each)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Until something holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What takes the driver's place where a launcher is linked."""
    return stand_in_for_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Path) -> Iterator[Start]:
    """Starts compilers that share an empty cache, and ends them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(driver))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    started: list[ProcessCompiler] = []

    def start_one(**options: Any) -> ProcessCompiler:
        started.append(ProcessCompiler(target(), [MODULE], **options))
        return started[-1]

    yield start_one
    for each in started:
        each.close()
    wait_until(lambda: not processes())


def test_a_kernel_is_compiled_beside_and_found(start: Start) -> None:
    start().submit(sample("add"), urgent=False).result(60)
    assert found(sample("add"), sample("add", 2)) == [True, False]


def test_a_second_process_compiles_nothing(start: Start) -> None:
    """Each is asked for twice, and compiled once."""
    specs = [sample("add", value) for value in (1, 2, 1, True)]
    first = start(places=2)
    futures = [first.submit(spec, urgent=False) for spec in specs]
    assert futures[0] is futures[2]
    assert futures[0] is not futures[3]  # Triton does not take True for 1
    assert not wait(futures, 60).not_done
    assert found(*specs) == [True] * 4


def test_a_kernel_is_kept_in_a_folder_and_compiled_again_if_it_is_spoilt(start: Start, tmp_path: Path) -> None:
    """What another server finds, or one after a restart."""
    folder = KernelFolder.open(str(tmp_path / "kernels"), "sm_90")
    specs = [sample("add", value) for value in (1, 2)]
    compiler = start(folder=folder)
    assert not wait([compiler.submit(spec, urgent=False) for spec in specs], 60).not_done
    assert found(*specs, folder=KernelFolder.open(str(tmp_path / "kernels"), "sm_90")) == [True, True]
    assert not (tmp_path / "cache").exists()
    for cubin in Path(folder.path).glob("*/*.cubin"):
        cubin.write_bytes(b"")
    assert found(*specs, folder=folder) == [False, False]
    assert found(*specs, folder=folder) == [True, True]


def test_a_kernel_that_calls_others_is_found(start: Start) -> None:
    """Though the other process has looked at what it calls in another order."""
    start().submit(sample("calling"), urgent=False).result(60)
    assert found(sample("calling")) == [True]


def test_a_kernel_that_does_not_compile_says_why(start: Start) -> None:
    compiler = start()
    with pytest.raises(CompilationFailed, match=r"(?s)sample_kernels\.broken could not be compiled: .*no_such_name"):
        compiler.submit(sample("broken"), urgent=False).result(60)
    compiler.submit(sample("add"), urgent=False).result(60)


def test_a_crash_fails_one_kernel_alone(start: Start) -> None:
    compiler = start(places=2)
    crashing = compiler.submit(sample("crashing"), urgent=False)
    others = [compiler.submit(sample("add", value), urgent=False) for value in range(3)]
    with pytest.raises(CompilationFailed, match=f"its process was ended by signal {signal.SIGSEGV:d}"):
        crashing.result(60)
    assert not wait(others, 60).not_done
    assert [each.exception() for each in others] == [None] * 3


def test_a_kernel_that_takes_too_long_is_given_up(start: Start) -> None:
    compiler = start(places=1, timeout_s=1)
    hanging = compiler.submit(sample("slow", LONG_S), urgent=False)
    with pytest.raises(CompilationFailed, match="its process took longer than 1 s"):
        hanging.result(60)
    compiler.submit(sample("add"), urgent=False).result(60)


def test_urgent_kernels_do_not_wait_for_others(start: Start) -> None:
    """Nor for those that fill all places."""
    compiler = start(places=1)
    slow = [compiler.submit(sample("slow", LONG_S + i), urgent=False) for i in range(3)]
    wait_until(lambda: len(processes()) >= 2)
    compiler.submit(sample("add"), urgent=True).result(60)
    assert not any(each.done() for each in slow)


def test_others_do_not_begin_while_urgent_kernels_have_all_places(start: Start) -> None:
    compiler = start(places=1)
    compiler.submit(sample("add"), urgent=False).result(60)  # it has started
    compiler.submit(sample("slow", LONG_S), urgent=True)
    compiler.submit(sample("add", 2), urgent=False)
    assert compiler.compiling() == {sample("slow", LONG_S)}


def test_a_kernel_becomes_urgent_when_a_call_waits_for_it(start: Start) -> None:
    compiler = start(places=1)
    compiler.submit(sample("slow", LONG_S), urgent=False)
    waiting = compiler.submit(sample("add"), urgent=False)
    time.sleep(0.2)
    assert not waiting.done()
    assert compiler.submit(sample("add"), urgent=True) is waiting
    waiting.result(60)


def compilations() -> list[str]:
    """The states of the processes that compile, in the order in which they were started."""
    (server,) = processes(recursive=False)
    return [each.status() for each in sorted(server.children(), key=psutil.Process.create_time)]


def test_others_stand_while_a_call_waits_and_then_go_on(start: Start) -> None:
    compiler = start(places=2)
    compiler.submit(sample("add"), urgent=False).result(60)  # it has started
    others = [compiler.submit(sample("slow", 3 + i / 10), urgent=False) for i in range(2)]
    wait_until(lambda: len(compilations()) == 2)
    assert psutil.STATUS_STOPPED not in compilations()
    urgent = [compiler.submit(sample("slow", 1 + i / 10), urgent=True) for i in range(2)]
    wait_until(lambda: compilations()[:2] == [psutil.STATUS_STOPPED] * 2)
    urgent.append(compiler.submit(sample("slow", 1.5), urgent=True))  # begins when one of the others has ended
    assert not wait(urgent, 60).not_done
    assert not any(each.done() for each in others)
    assert not wait(others, 60).not_done
    assert [each.exception() for each in [*urgent, *others]] == [None] * 5


def test_the_oldest_of_others_goes_on_where_there_are_cores(start: Start) -> None:
    compiler = start(places=4)
    compiler.submit(sample("add"), urgent=False).result(60)
    first, *others = (compiler.submit(sample("slow", seconds), urgent=False) for seconds in (2, LONG_S, LONG_S + 1))
    wait_until(lambda: len(compilations()) == 3)
    compiler.submit(sample("slow", LONG_S + 2), urgent=True)
    stopped = psutil.STATUS_STOPPED
    wait_until(lambda: [each == stopped for each in compilations()] == [False, True, True, False])
    first.result(60)
    wait_until(lambda: [each == stopped for each in compilations()] == [False, True, False])
    assert not any(each.done() for each in others)


def test_what_a_call_waits_for_by_now_does_not_stand(start: Start) -> None:
    compiler = start(places=3)
    compiler.submit(sample("add"), urgent=False).result(60)
    first, second = (compiler.submit(sample("slow", LONG_S + i), urgent=False) for i in range(2))
    wait_until(lambda: len(compilations()) == 2)
    compiler.submit(sample("slow", LONG_S + 2), urgent=True)
    wait_until(lambda: compilations()[:2] == [psutil.STATUS_STOPPED] * 2)
    assert compiler.submit(sample("slow", LONG_S + 1), urgent=True) is second
    wait_until(lambda: [each == psutil.STATUS_STOPPED for each in compilations()] == [True, False, False])
    assert compiler.submit(sample("slow", LONG_S), urgent=True) is first
    wait_until(lambda: psutil.STATUS_STOPPED not in compilations())


def test_closing_ends_what_stands(start: Start) -> None:
    compiler = start(places=1)
    compiler.submit(sample("add"), urgent=False).result(60)
    compiler.submit(sample("slow", LONG_S), urgent=False)
    wait_until(lambda: len(compilations()) == 1)
    compiler.submit(sample("slow", LONG_S + 1), urgent=True)
    wait_until(lambda: psutil.STATUS_STOPPED in compilations())
    compiler.close()
    assert not processes()


def test_the_process_is_started_again_if_it_is_killed(start: Start) -> None:
    """What it compiled is compiled again."""
    compiler = start(places=1)
    compiler.submit(sample("add"), urgent=False).result(60)
    (server,) = processes()
    slow = compiler.submit(sample("slow", 3), urgent=False)
    wait_until(lambda: len(processes()) == 2)
    child = server.children()[0]
    server.kill()
    wait_until(lambda: not is_there(child), 5)
    slow.result(60)
    assert found(sample("slow", 3)) == [True]


def test_a_process_that_is_always_killed_is_given_up(start: Start) -> None:
    compiler = start(places=1)
    slow = compiler.submit(sample("slow", LONG_S), urgent=False)
    while not slow.done():
        for each in processes(recursive=False):
            each.kill()
        time.sleep(0.05)
    with pytest.raises(CompilerUnavailable, match="has ended 4 times"):
        slow.result()
    with pytest.raises(CompilerUnavailable, match="has ended 4 times"):
        compiler.submit(sample("add"), urgent=True).result()


def test_a_process_that_cannot_start_says_why(start: Start) -> None:
    compiler = ProcessCompiler(target(), ["no_such_module"])
    with pytest.raises(CompilerUnavailable, match=r"does not start: ModuleNotFoundError: .*no_such_module"):
        compiler.submit(sample("add"), urgent=False).result(60)
    compiler.close()


def test_closing_ends_everything_at_once(start: Start) -> None:
    compiler = start(places=2)
    compiler.submit(sample("add"), urgent=False).result(60)
    slow = [compiler.submit(sample("slow", LONG_S + i), urgent=i > 2) for i in range(4)]
    wait_until(lambda: len(processes()) >= 4)
    began = time.monotonic()
    compiler.close()
    assert time.monotonic() - began < 2
    assert not processes()
    for each in slow:
        with pytest.raises(CompilerUnavailable, match="is closed"):
            each.result(1)
    with pytest.raises(CompilerUnavailable, match="is closed"):
        compiler.submit(sample("add"), urgent=False).result(1)


def test_closing_before_the_process_is_ready(start: Start) -> None:
    compiler = start()
    waiting = compiler.submit(sample("add"), urgent=False)
    compiler.close()
    with pytest.raises(CompilerUnavailable, match="is closed"):
        waiting.result(1)
    assert not processes()


def test_signals_to_all_processes_are_for_the_service(start: Start) -> None:
    """As the end of a control group sends them."""
    compiler = start(places=1)
    compiler.submit(sample("add"), urgent=False).result(60)
    slow = compiler.submit(sample("slow", 1), urgent=False)
    wait_until(lambda: len(processes()) == 2)
    for each in processes():
        each.send_signal(signal.SIGTERM)
        each.send_signal(signal.SIGINT)
    slow.result(60)


SERVICE = """
import pickle, sys, time
from attnd_server.device.kernels.compiler import ProcessCompiler
target, module, specs = pickle.loads(sys.stdin.buffer.read())
compiler = ProcessCompiler(target, [module])
print("started", flush=True)
futures = [compiler.submit(spec, urgent=True) for spec in specs]
futures[0].result()
print("compiled", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("line", [b"started", b"compiled"])
def test_nothing_outlives_the_service(start: Start, sent: int, line: bytes) -> None:
    """Whatever ends it, and whenever; a Ctrl-C reaches its whole group."""
    specs = [sample("add"), sample("slow", LONG_S)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pickle.dumps((target(), MODULE, specs)))
        process.stdin.close()
        while process.stdout.readline().strip() != line:
            pass
        service = psutil.Process(process.pid)
        wait_until(lambda: len(service.children(recursive=True)) >= (2 if line == b"compiled" else 1))
        theirs = service.children(recursive=True)
        os.killpg(process.pid, sent)
        process.wait(20)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    wait_until(lambda: not any(map(is_there, theirs)))
    assert errors.count("Traceback") == (sent == signal.SIGINT)  # of the service itself, which catches nothing
