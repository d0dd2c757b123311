"""The kernels of a device: which it has, which are on their way, and which cannot be had.

A kernel is looked for in Triton's cache on disk, compiled if that does not have it, loaded, and put where its function
looks for it when it is launched. That takes a thread of the library's own and its compiler's processes; whoever needs
a kernel gets a future.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from queue import PriorityQueue
from typing import Any, Protocol

import torch

from attnd.errors import AttndError, Disconnected, Exhausted, ServerFault
from attnd_server.device.kernels import launch
from attnd_server.device.kernels.compiler import CompilationFailed, Compiler
from attnd_server.device.kernels.disk import has_kernel
from attnd_server.device.kernels.loading import NotNow
from attnd_server.device.kernels.spec import KernelSpec
from attnd_server.device.kernels.states import KernelStates, State, label
from attnd_server.device.memory import is_memory_error

log = logging.getLogger(__name__)

# Seconds until a kernel that could not be had is tried again, if somebody needs it.
RETRY_S = 10.0
_END, _URGENT, _BACKGROUND = range(3)
# Seconds until a kernel that cannot be loaded now is tried again.
_LATER_S = 0.5
# Launches that are collected at a time, tens of milliseconds: then come kernels that somebody waits for.
_COLLECTED = 4
Launches = Iterable[Callable[[], None]]  # each makes launches by `launch_kernel`


class Loader(Protocol):
    """Brings compiled kernels to the device; see `loading.KernelLoader`."""

    def load(self, compiled: Any) -> Any:
        """Brings a kernel there. Returns what its function is to launch. On the library's thread."""

    def close(self) -> None:
        """Ends a `load` that waits."""


@dataclass(eq=False)
class _Kernel:
    """A kernel that somebody has asked for.

    Attributes:
        spec: of it.
        state: where it is.
        since: when that began, `time.monotonic`.
        ready: of those who wait for it.
        must_compile: likewise, of those who would launch another one meanwhile.
        is_urgent: whether anybody does.
        is_found: whether the cache on disk had it.
        places: functions that look for it, and their keys.
        handle: what they find, once it is loaded.
        error: why it cannot be had.
    """

    spec: KernelSpec
    state: State = State.WAITING
    since: float = field(default_factory=time.monotonic)
    ready: Future[None] = field(default_factory=Future)
    must_compile: Future[bool] = field(default_factory=Future)
    is_urgent: bool = False
    is_found: bool = False
    places: list[tuple[Any, str]] = field(default_factory=list)
    handle: Any = None
    error: str = ""


class KernelLibrary:
    """The kernels of one device. Any thread may use it."""

    def __init__(
        self, device: torch.device, compiler: Compiler, loader_for: Callable[[Callable[[Any, Any], None]], Loader]
    ) -> None:
        """Has none yet, and starts its thread.

        Args:
            device: where they run, with its index.
            compiler: brings them into Triton's cache on disk; it is closed with this.
            loader_for: makes what loads them, likewise, and is given `replace`.
        """
        self._device, self._number = device, device.index or 0
        self._compiler, self._loader = compiler, loader_for(self.replace)
        self._lock = threading.Lock()
        self._kernels: dict[KernelSpec, _Kernel] = {}
        self._num_compiled = self._num_found = 0
        self._is_closed = False
        self._order = count()
        self._todo: PriorityQueue[tuple[int, int, _Kernel | Iterator[Callable[[], None]] | None]] = PriorityQueue()
        self._thread = threading.Thread(target=self._run, name=f"kernels-{device}", daemon=True)
        self._thread.start()

    def install(self) -> None:
        """Kernels of the device come from here from now on."""
        launch.install(self._number, self)

    def close(self) -> None:
        """Ends the thread and the compiler. Who waits is told."""
        launch.uninstall(self._number, self)
        with self._lock:
            self._is_closed = True
            waiting = [each for each in self._kernels.values() if not each.ready.done()]
        self._todo.put((_END, next(self._order), None))
        self._loader.close()
        self._compiler.close()
        for each in waiting:
            self._fail(each, Disconnected("the server is shutting down"))

    def collect(self, launches: Launches) -> None:
        """Brings the kernels of launches to the device, those of the first ones first. It makes none of them.

        Args:
            launches: called on the library's thread, a few at a time, when nobody waits for a kernel. Their tensors
                need no data.
        """
        self._todo.put((_BACKGROUND, next(self._order), iter(launches)))

    def wanted(self, specs: Iterable[KernelSpec], *, is_urgent: bool = False) -> list[Future[None]]:
        """Brings kernels to the device, when nobody waits for another unless somebody waits for these. See `ask`."""
        return [self._wanted(spec, is_urgent).ready for spec in specs]

    def ask(self, kernel: Any, key: str, spec: KernelSpec) -> launch.Asked:
        """See `launch.Library`."""
        entry = self._wanted(spec, is_urgent=True)
        with self._lock:
            if (kernel, key) not in entry.places:
                entry.places.append((kernel, key))
            if entry.state is State.LOADED:
                self._put(entry)
        return launch.Asked(entry.ready, entry.must_compile)

    def ask_for_all(self, specs: Mapping[KernelSpec, KernelSpec | None]) -> None:
        """See `launch.Library`."""
        for spec, sooner in specs.items():
            told = self._wanted(spec, is_urgent=True).must_compile
            if sooner is not None:
                told.add_done_callback(partial(self._stand_in, sooner))

    def _stand_in(self, sooner: KernelSpec, must_compile: Future[bool]) -> None:
        if must_compile.result():  # else the kernel itself is there in milliseconds
            self.wanted([sooner], is_urgent=True)

    def _wanted(self, spec: KernelSpec, is_urgent: bool) -> _Kernel:
        with self._lock:
            entry = self._kernels.get(spec)
            if entry is None or (entry.state is State.FAILED and time.monotonic() - entry.since > RETRY_S):
                places = [] if entry is None else entry.places
                entry = self._kernels[spec] = _Kernel(spec, is_urgent=is_urgent, places=places)
                entry.ready.set_running_or_notify_cancel()  # it is shared: nobody may cancel it
                self._do(entry)
            elif is_urgent and not (entry.is_urgent or entry.ready.done()):
                entry.is_urgent = True
                self._do(entry)
            if self._is_closed and not entry.ready.done():
                entry.state = State.FAILED
                _say(entry, must_compile=False)
                entry.ready.set_exception(Disconnected("the server is shutting down"))
            return entry

    def _do(self, entry: _Kernel) -> None:
        self._todo.put((_URGENT if entry.is_urgent else _BACKGROUND, next(self._order), entry))

    def replace(self, handle: Any, by: Any) -> None:
        """Has what the loader gave replaced, where functions look for it."""
        with self._lock:
            for entry in self._kernels.values():
                if entry.handle is handle:
                    entry.handle = by
                    self._put(entry)

    def _put(self, entry: _Kernel) -> None:
        """Puts a loaded kernel where its functions look for it. With the lock."""
        for kernel, key in entry.places:
            kernel.device_caches[self._number][0][key] = entry.handle

    def states(self) -> KernelStates:
        """How many there are in each state, and what is under way."""
        now, compiling = time.monotonic(), self._compiler.compiling()
        with self._lock:
            entries, counts = list(self._kernels.values()), (self._num_compiled, self._num_found)
        of = {state: [each for each in entries if each.state is state] for state in State}
        under_way = [each for each in of[State.COMPILING] if each.spec in compiling] + of[State.COMPILED]
        return KernelStates(
            num_loaded=len(of[State.LOADED]),
            num_waiting=len(entries) - len(of[State.LOADED]) - len(of[State.FAILED]) - len(under_way),
            compiling=[(label(each.spec), now - each.since) for each in under_way],
            failed=[(label(each.spec), each.error) for each in of[State.FAILED]],
            num_compiled=counts[0],
            num_found=counts[1],
        )

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (each := self._todo.get()[2]) is not None:
            if not isinstance(each, _Kernel):
                self._collect(each)
                continue
            try:
                self._go_on(each)
            except Exception as error:  # of the kernel; the thread must live
                self._fail(each, error)

    def _collect(self, launches: Iterator[Callable[[], None]]) -> None:
        try:
            with launch.collecting() as specs:
                few = [make() for make in islice(launches, _COLLECTED)]
        except Exception:  # whoever needs a kernel will ask for it
            log.exception("kernels that may be needed cannot be told")
            return
        self.wanted(specs)
        if few:
            self.collect(launches)

    def _go_on(self, entry: _Kernel) -> None:
        """Does the next thing for a kernel."""
        if entry.state is State.WAITING:
            is_found = has_kernel(entry.spec)
            _say(entry, must_compile=not is_found)
            if is_found:
                with self._lock:
                    self._num_found += not entry.is_found
                    entry.is_found = True
                self._finish(entry)
            else:
                self._move(entry, State.COMPILING)
                self._compiler.submit(entry.spec, entry.is_urgent).add_done_callback(partial(self._compiled, entry))
        elif entry.state is State.COMPILING:
            self._compiler.submit(entry.spec, urgent=True)  # somebody waits by now
        elif entry.state is State.COMPILED:
            self._finish(entry)

    def _compiled(self, entry: _Kernel, asked: Future[None]) -> None:
        """On a thread of the compiler's. If that has gone, this process compiles."""
        error = asked.exception()
        if isinstance(error, CompilationFailed):
            self._fail(entry, error)
            return
        with self._lock:
            if self._is_closed or entry.state is not State.COMPILING:
                return
            self._num_compiled += 1
            entry.state = State.COMPILED
            self._do(entry)

    def _finish(self, entry: _Kernel) -> None:
        try:
            handle = self._loader.load(entry.spec.compile())
        except NotNow:  # others need not wait for it
            again = threading.Timer(_LATER_S, self._do, (entry,))
            again.daemon = True
            again.start()
            return
        with self._lock:
            if entry.ready.done():  # closed meanwhile
                return
            entry.handle, entry.state = handle, State.LOADED
            self._put(entry)
        entry.ready.set_result(None)

    def _move(self, entry: _Kernel, state: State) -> None:
        entry.state, entry.since = state, time.monotonic()

    def _fail(self, entry: _Kernel, error: BaseException) -> None:
        name = label(entry.spec)
        with self._lock:
            if entry.ready.done():
                return
            self._move(entry, State.FAILED)
            entry.error = str(error)
        _say(entry, must_compile=False)  # nothing stands in for what will never be
        if isinstance(error, AttndError):
            entry.ready.set_exception(error)
            return
        log.error("kernel %s cannot be had", name, exc_info=error)
        told: AttndError = ServerFault(f"kernel {name} cannot be had on this server, whose log says why")
        if is_memory_error(error):
            told = Exhausted(f"there is no memory left to load kernel {name}", retry_after_s=RETRY_S)
        told.__cause__ = error
        entry.ready.set_exception(told)


def _say(entry: _Kernel, must_compile: bool) -> None:
    """Tells who would launch another kernel meanwhile, if nobody has told them yet."""
    if not entry.must_compile.done():
        entry.must_compile.set_result(must_compile)
