"""The library of a device's kernels: what it does for whom, with stand-ins for Triton, compiler and driver."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnd.errors import Disconnected, Exhausted, ServerFault
from attnd_server.attention.config import AttentionConfig
from attnd_server.config import ServerConfig
from attnd_server.device.kernels import launch
from attnd_server.device.kernels import library as library_module
from attnd_server.device.kernels.compiler import CompilationFailed, CompilerUnavailable
from attnd_server.device.kernels.library import KernelLibrary
from attnd_server.device.kernels.spec import KernelSpec
from attnd_server.kv.caches import CacheTable
from attnd_server.service.needed_kernels import NeededKernels
from attnd_server.service.warm_up import WarmUp

CPU = torch.device("cpu")
PATIENCE_S = 30.0


def spec(name: str) -> KernelSpec:
    return KernelSpec("module", name, {"x": "*fp32", "DIM": "constexpr"}, {(1,): 64}, {}, {}, key=name)


class StandInCompiler:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.futures: dict[str, Future[None]] = {}
        self.is_closed = False

    def submit(self, spec: KernelSpec, urgent: bool) -> Future[None]:
        self.asked.append((spec.name, urgent))
        return self.futures.setdefault(spec.name, Future())

    def compiling(self) -> set[KernelSpec]:
        """The first that is not compiled."""
        names = [name for name, future in self.futures.items() if not future.done()]
        return {spec(name) for name in names[:1]}

    def close(self) -> None:
        self.is_closed = True


def loading(load: Callable[[str], Any]) -> Callable[[Any], Any]:
    """What makes a loader."""
    return lambda replace: types.SimpleNamespace(load=load, close=lambda: None)


class Function:
    """Stands for a `JITFunction`."""

    def __init__(self) -> None:
        self.device_caches: dict[int, tuple[dict[str, Any]]] = {0: ({},)}

    def finds(self, key: str) -> Any:
        return self.device_caches[0][0].get(key)


@pytest.fixture
def compiler() -> StandInCompiler:
    return StandInCompiler()


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that Triton's cache has."""
    names: set[str] = set()
    monkeypatch.setattr(library_module, "has_kernel", lambda spec: spec.name in names)
    monkeypatch.setattr(KernelSpec, "compile", lambda spec: f"compiled {spec.name}")
    return names


@pytest.fixture
def library(compiler: StandInCompiler, on_disk: set[str]) -> Iterator[KernelLibrary]:
    made = KernelLibrary(CPU, compiler, loading(lambda compiled: types.SimpleNamespace(of=compiled)))
    yield made
    made.close()


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_kernel_on_disk_is_loaded_and_put_where_its_function_looks(
    library: KernelLibrary, on_disk: set[str], compiler: StandInCompiler
) -> None:
    on_disk.add("a")
    function = Function()
    library.ask(function, "one", spec("a")).ready.result(PATIENCE_S)
    assert function.finds("one").of == "compiled a"
    library.ask(function, "other", spec("a")).ready.result(0)  # at once: it is there
    assert function.finds("other") is function.finds("one")
    assert compiler.asked == []
    states = library.states()
    assert (states.num_loaded, states.num_found, states.num_compiled) == (1, 1, 0)


def test_all_kernels_of_a_call_come_at_once_and_stand_ins_only_for_what_must_compile(
    library: KernelLibrary, on_disk: set[str], compiler: StandInCompiler
) -> None:
    on_disk.add("a")
    library.ask_for_all({spec("a"): spec("instead of a"), spec("b"): spec("instead of b"), spec("c"): None})
    eventually(lambda: len(compiler.asked) == 3)
    assert sorted(compiler.asked) == [("b", True), ("c", True), ("instead of b", True)]
    eventually(lambda: library.states().num_loaded == 1)


def test_others_are_compiled_once_and_are_urgent_once_somebody_waits(
    library: KernelLibrary, compiler: StandInCompiler
) -> None:
    (background,) = library.wanted([spec("a")])
    eventually(lambda: compiler.asked == [("a", False)])
    function = Function()
    urgent = library.ask(function, "key", spec("a")).ready
    assert urgent is background
    eventually(lambda: compiler.asked == [("a", False), ("a", True)])
    library.wanted([spec("b")])
    eventually(lambda: len(compiler.asked) == 3)
    ((name, seconds),) = library.states().compiling
    assert library.states().num_waiting == 1
    assert (name, 0 <= seconds < PATIENCE_S) == ("a[DIM=64]", True)
    compiler.futures["a"].set_result(None)
    urgent.result(PATIENCE_S)
    assert function.finds("key").of == "compiled a"
    assert (library.states().num_compiled, library.states().num_loaded) == (1, 1)


def test_it_says_early_whether_a_kernel_must_be_compiled(
    library: KernelLibrary, on_disk: set[str], compiler: StandInCompiler
) -> None:
    on_disk.add("a")
    found, compiled, failing = (library.ask(Function(), "key", spec(name)) for name in "abc")
    assert not found.must_compile.result(PATIENCE_S)
    assert compiled.must_compile.result(PATIENCE_S)
    assert failing.must_compile.result(PATIENCE_S)
    eventually(lambda: len(compiler.asked) == 2)
    assert not compiled.ready.done()
    compiler.futures.pop("c").set_exception(CompilationFailed("no such layout"))
    with pytest.raises(ServerFault):
        failing.ready.result(PATIENCE_S)


def test_a_function_that_asks_again_is_remembered_once(library: KernelLibrary, compiler: StandInCompiler) -> None:
    function = Function()
    asked = [library.ask(function, "key", spec("a")) for _ in range(3)]
    assert asked == asked[:1] * 3
    assert [entry.places for entry in library._kernels.values()] == [[(function, "key")]]


def test_what_somebody_waits_for_goes_before_the_rest(
    compiler: StandInCompiler, on_disk: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, loaded = threading.Event(), []

    def load(compiled: str) -> str:
        go_on.wait(PATIENCE_S)
        loaded.append(compiled)
        return compiled

    library = KernelLibrary(CPU, compiler, loading(load))
    on_disk |= {"first", "later", "urgent"}
    futures = library.wanted([spec("first"), spec("later")])
    eventually(lambda: library.states().num_found == 1)
    futures += library.wanted([spec("urgent")], is_urgent=True)
    assert library.states().num_waiting == 3
    go_on.set()
    for future in futures:
        future.result(PATIENCE_S)
    library.close()
    assert loaded == ["compiled first", "compiled urgent", "compiled later"]


def test_a_kernel_that_does_not_compile_is_named_and_tried_again_later(
    library: KernelLibrary, compiler: StandInCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = library.ask(Function(), "key", spec("a")).ready
    eventually(lambda: len(compiler.asked) == 1)
    compiler.futures.pop("a").set_exception(CompilationFailed("no such layout"))
    with pytest.raises(ServerFault, match=r"kernel a\[DIM=64\] cannot be had on this server, whose log says why"):
        failing.result(PATIENCE_S)
    assert "no such layout" in caplog.text
    assert library.states().failed == [("a[DIM=64]", "no such layout")]
    assert library.ask(Function(), "key", spec("a")).ready is failing  # not in a loop
    monkeypatch.setattr(library_module, "RETRY_S", 0.0)
    function = Function()
    again = library.ask(function, "key", spec("a")).ready
    eventually(lambda: len(compiler.asked) == 2)
    compiler.futures["a"].set_result(None)
    again.result(PATIENCE_S)
    assert function.finds("key").of == "compiled a"
    assert library.states().failed == []


def test_without_a_compiler_this_process_compiles(library: KernelLibrary, compiler: StandInCompiler) -> None:
    asked = library.ask(function := Function(), "key", spec("a")).ready
    eventually(lambda: len(compiler.asked) == 1)
    compiler.futures["a"].set_exception(CompilerUnavailable("it has gone"))
    asked.result(PATIENCE_S)
    assert function.finds("key").of == "compiled a"
    assert library.states().num_compiled == 1


def test_no_memory_for_a_kernel_says_so(compiler: StandInCompiler, on_disk: set[str]) -> None:
    def load(compiled: str) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    library = KernelLibrary(CPU, compiler, loading(load))
    on_disk.add("a")
    with pytest.raises(Exhausted, match="no memory left to load kernel a"):
        library.ask(Function(), "key", spec("a")).ready.result(PATIENCE_S)
    library.close()


def test_a_stand_in_is_replaced_where_functions_look(library: KernelLibrary, on_disk: set[str]) -> None:
    on_disk.add("a")
    function = Function()
    library.ask(function, "key", spec("a")).ready.result(PATIENCE_S)
    library.replace(function.finds("key"), "itself")
    assert function.finds("key") == "itself"


class Collectable:
    """A kernel whose variant on the device "meta" is `spec(name)`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def warmup(self, grid: tuple[int, ...]) -> None:
        collected = launch.here.collected
        assert collected is not None
        collected[spec(self.name)] = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[[], None]:
        raise AssertionError("it was launched")

    def __call__(self) -> None:
        launch.launch_kernel(self, (1,))


def test_what_a_cache_can_need_is_brought_once_for_each_geometry(
    library: KernelLibrary, on_disk: set[str], compiler: StandInCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ask_before_compiling", lambda: True)
    asked: list[AttentionConfig] = []
    on_disk |= {f"kernel {index}" for index in range(9)}

    def launches(config: AttentionConfig) -> Iterator[Callable[[], None]]:
        asked.append(config)
        yield from (Collectable(f"kernel {index}") for index in range(10))

    needed = NeededKernels(library, launches)
    config = AttentionConfig(num_layers=1, num_kv_heads=2, head_dim=64, num_pages=8, page_size=16)
    needed.ask(config)
    needed.ask(replace(config, num_layers=3, num_pages=2))
    eventually(lambda: compiler.asked == [("kernel 9", False)])
    assert library.states().num_loaded == 9
    assert asked == [config]
    needed.ask(replace(config, head_dim=128))
    eventually(lambda: len(asked) == 2)


def test_each_layer_group_of_a_new_cache_is_told() -> None:
    table, told = CacheTable(ServerConfig(), CPU, 1 << 20), []
    table.created = told.append
    config = AttentionConfig(num_layers=1, num_kv_heads=1, head_dim=16, num_pages=2, page_size=4)
    for _ in range(2):  # the second time it is there
        table.create(config, principal="alice", ttl_s=60.0, name="", key=b"the same request, once")
    assert told == [config]


def test_a_warm_up_asks_for_all_its_kernels_before_it_waits_for_one(
    library: KernelLibrary, compiler: StandInCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ask_before_compiling", lambda: True)
    launched: list[str] = []

    def launches() -> None:
        for name in ("a", "b"):
            if launch.here.collected is None:
                launched.append(name)
            else:
                Collectable(name)()

    warm_up: Any = types.SimpleNamespace(_executor=types.SimpleNamespace(kernels=library))
    thread = threading.Thread(target=WarmUp._launch, args=(warm_up, launches))
    thread.start()
    eventually(lambda: compiler.asked == [("a", True), ("b", True)])
    assert launched == []
    for future in compiler.futures.values():
        future.set_result(None)
    thread.join(PATIENCE_S)
    assert launched == ["a", "b"]


def test_who_waits_is_told_when_the_library_closes(library: KernelLibrary, compiler: StandInCompiler) -> None:
    waiting = library.ask(Function(), "key", spec("a"))
    library.close()
    for late in (waiting, library.ask(Function(), "key", spec("b"))):
        with pytest.raises(Disconnected, match="shutting down"):
            late.ready.result(PATIENCE_S)
        assert late.must_compile.done()
    assert compiler.is_closed
