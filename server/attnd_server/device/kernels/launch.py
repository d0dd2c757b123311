"""The one place from which kernels of Triton are launched, and what happens to one that is not on the device yet.

Triton compiles and loads a kernel where it is first launched, and whoever launches waits. For the kernels of this
package it asks here first: where a library has the device's kernels, that brings them there, on threads and processes
of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, Protocol

from attnd_server.device.kernels.spec import KernelSpec

log = logging.getLogger(__name__)

# Whose kernels these are; others' compile as Triton does it.
PACKAGE = "attnd_server"
# What Triton is to compile a kernel with, all versions that were tried: 3.6 and 3.7.
_PARAMETERS = ["self", "key", "signature", "device", "constexprs", "options", "attrs", "warmup"]


class Asked(NamedTuple):
    """A kernel on its way to the device.

    Attributes:
        ready: done once its function finds it, or with the reason why it never will.
        must_compile: done once that is known.
    """

    ready: Future[None]
    must_compile: Future[bool]


class Library(Protocol):
    """Has the kernels of one device."""

    def ask(self, kernel: Any, key: str, spec: KernelSpec) -> Asked:
        """Brings a kernel to the device, before all that nobody waits for.

        Args:
            kernel: the function.
            key: by which it looks for the kernel.
            spec: of the kernel.
        """

    def ask_for_all(self, specs: Mapping[KernelSpec, KernelSpec | None]) -> None:
        """Likewise, several at once, each with what may stand in for it while it compiles, or None."""


class KernelMissing(Exception):
    """A kernel is not on the device yet, and this thread must not wait for it. Nothing of it was launched.

    Attributes:
        ready: done once it is worth trying again; of the kernel's own, once it can be launched, or never will be.
        must_compile: done once it is known whether it has to be compiled; None: nobody will say.
    """

    def __init__(self, name: str, ready: Future[Any], must_compile: Future[bool] | None = None) -> None:
        super().__init__(f"kernel {name} is not on the device yet")
        self.name, self.ready, self.must_compile = name, ready, must_compile


class Here(threading.local):
    """What launches are to do on the calling thread.

    Attributes:
        may_wait: whether it may wait for a kernel that is not there yet. Whoever has the device for others must not:
            what it launches then raises KernelMissing.
        is_for_graphs: whether what it launches may be kept in a graph.
        collected: takes the kernels of what would be launched; None: it is launched.
    """

    may_wait = True
    is_for_graphs = False
    collected: dict[KernelSpec, KernelSpec | None] | None = None


here = Here()
_num_collecting = 0  # threads
_collecting = threading.Lock()
_libraries: dict[int, Library] = {}  # by the device's number


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], *args: Any, sooner: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Launches a kernel on the current stream, once it is on the device.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`.
        grid: programs of each dimension.
        args: of the kernel.
        sooner: options that make a variant of it that gives the same bits, compiles sooner and runs longer. It is
            launched while the kernel itself is compiled, by who must not wait; but see `for_graphs`. None: there is no
            such variant.
        options: the kernel's arguments by name, and Triton's: `num_warps` and so on.

    Raises:
        KernelMissing: it is not there yet, and this thread must not wait.
    """
    if _num_collecting and here.collected is not None:
        _collect(here.collected, kernel, grid, args, options, sooner)
        return
    while True:
        try:
            kernel[grid](*args, **options)
            return
        except KernelMissing as missing:
            if here.may_wait or missing.ready.done():
                missing.ready.result()  # or the reason why it cannot be had
            elif sooner is None or missing.must_compile is None or here.is_for_graphs:
                raise
            elif not missing.must_compile.done():
                raise KernelMissing(missing.name, missing.must_compile) from None
            elif not missing.must_compile.result():
                raise  # it is there in milliseconds
            else:
                launch_kernel(kernel, grid, *args, **{**options, **sooner})
                return


@contextmanager
def for_graphs() -> Iterator[None]:
    """What the calling thread launches inside, a graph may keep: no kernel is another's `sooner`."""
    before, here.is_for_graphs = here.is_for_graphs, True
    try:
        yield
    finally:
        here.is_for_graphs = before


def launch_all(launches: Callable[[], None], device: int | None) -> None:
    """Makes launches. If one misses its kernel, those of all are brought to the device at the same time.

    Else whoever must not wait would learn of the next one only when the first is there.

    Args:
        launches: makes them, by `launch_kernel`.
        device: its number.

    Raises:
        KernelMissing: of the first that is missing.
    """
    try:
        launches()
    except KernelMissing:
        with collecting() as specs:
            launches()
        library = _libraries.get(device or 0)
        if library is not None:
            library.ask_for_all(specs)
        raise


@contextmanager
def collecting() -> Iterator[dict[KernelSpec, KernelSpec | None]]:
    """The kernels that the calling thread would launch and the device does not have yet. It launches none meanwhile.

    The tensors of a launch need no data: see torch's device "meta". Beside a kernel lies its `sooner`, if it has one
    that is not there yet either.
    """
    global _num_collecting
    ask_before_compiling()
    before, specs = here.collected, dict[KernelSpec, KernelSpec | None]()
    with _collecting:
        _num_collecting += 1
    here.collected = specs
    try:
        yield specs
    finally:
        here.collected = before
        with _collecting:
            _num_collecting -= 1


def _collect(
    into: dict[KernelSpec, KernelSpec | None],
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    sooner: Mapping[str, Any] | None,
) -> None:
    """Notes what a launch would miss; see `launch_kernel`."""
    variants: dict[KernelSpec, KernelSpec | None] = {}
    with collecting() as specs:
        kernel.warmup(*args, grid=grid, **options)
    if specs and sooner is not None and not here.is_for_graphs:
        with collecting() as variants:
            kernel.warmup(*args, grid=grid, **{**options, **sooner})
    into.update(dict.fromkeys(specs, next(iter(variants), None)))


def install(device: int, library: Library) -> None:
    """From now on the device's kernels come from a library."""
    if ask_before_compiling():
        _libraries[device] = library


def uninstall(device: int, library: Library) -> None:
    """From now on Triton compiles the device's kernels where they are launched, if they came from this library."""
    if _libraries.get(device) is library:
        del _libraries[device]


@cache
def ask_before_compiling() -> bool:
    """Has Triton ask here before it compiles a kernel of this package. Returns whether it will.

    Not by `triton.knobs.runtime.jit_cache_hook`, for which Triton writes every kernel of the process as JSON, and fails
    where a kernel's constants are no JSON.
    """
    from triton.runtime.jit import JITFunction

    compile_at_once = JITFunction._do_compile
    if list(signature(compile_at_once).parameters) != _PARAMETERS:
        log.warning("this version of triton compiles kernels where they are launched")
        return False

    def ask(
        kernel: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        library, collected = _libraries.get(device), here.collected
        if (collected is None and library is None) or kernel.module.partition(".")[0] != PACKAGE:
            return compile_at_once(kernel, key, signature, device, constexprs, options, attrs, warmup)
        spec = KernelSpec.of(kernel, signature, constexprs, attrs, options)
        if collected is not None:
            collected[spec] = None
            return None
        assert library is not None
        raise KernelMissing(spec.name, *library.ask(kernel, key, spec))

    JITFunction._do_compile = ask
    return True
