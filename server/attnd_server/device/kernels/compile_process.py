"""The process in which kernels are compiled: it imports them once, and forks for each.

`ProcessCompiler` starts it, and is all that it listens to. It ends when the other end of its socket is closed, and with
it everything that it has started. No process here has anything to do with the GPU.
"""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, NoReturn

from attnd_server.device.kernels import launchers
from attnd_server.device.kernels.compile_child import Child
from attnd_server.device.kernels.folder import KernelFolder
from attnd_server.device.kernels.named_gpu import NamedGpu
from attnd_server.device.kernels.spec import KernelSpec, hash_callees_first

# What the program that is started runs: with the module path of its parent, and never with the folder it stands in.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from attnd_server.device.kernels.compile_process import main; main()"
)
# How much less than the service the processes may claim of busy cores.
_NICE, _MORE_NICE = 5, 10
# How often it is looked whether the parent is there.
_LOOK_S = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What the process is told first.

    Attributes:
        target: the `GPUTarget` to compile for.
        modules: that have kernels.
        folder: to keep them in; None: Triton's own.
        scratch: a folder for files that compilers leave, which it removes.
        timeout_s: that one compilation may take.
        num_beside: of those that no call waits for, how many go on while a call waits.
    """

    target: Any
    modules: tuple[str, ...]
    folder: KernelFolder | None
    scratch: str
    timeout_s: float
    num_beside: int


@dataclass(frozen=True)
class Request:
    """A kernel to compile; for a number that is being compiled: that a call waits for it by now."""

    number: int
    spec: KernelSpec
    is_urgent: bool


@dataclass(frozen=True)
class Answer:
    """How a compilation ended; of number -1: how the start of the process did.

    Attributes:
        number: of the request.
        error: what went wrong, or "".
    """

    number: int
    error: str


def main() -> None:
    """Serves the parent at the other end of the standard input."""
    # The parent says when to end: a Ctrl-C, or the end of a control group, is for it.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    os.nice(_NICE)
    parent = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        setup = parent.recv()
        with _removed(setup.scratch):
            try:
                _prepare(setup)
            except Exception as error:  # whatever an import may raise
                parent.send(Answer(-1, f"{type(error).__name__}: {error}"))
                return
            parent.send(Answer(-1, ""))
            _ForkServer(parent, setup).serve()
    except (EOFError, OSError):
        pass  # the parent has gone


@contextmanager
def _removed(folder: str) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(setup: Setup) -> None:
    """Does once what every compilation needs, before processes are forked that have it."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if setup.folder is not None:
        setup.folder.install()
    hash_callees_first()
    driver.set_active(NamedGpu(setup.target))
    for module in setup.modules:
        for value in vars(import_module(module)).values():
            if isinstance(value, JITFunction):
                _ = value.cache_key  # of its source and of all that it calls; kept
    triton_key()
    backend = make_backend(setup.target)
    backend.hash()
    backend.parse_options({}).hash()
    backend.get_module_map()
    import_module("triton.compiler.code_generator")
    launchers.look_for_driver()
    gc.collect()
    gc.freeze()


class _ForkServer:
    """Forks for each request, and says how it ended. It has one thread, so that it may fork."""

    def __init__(self, parent: Connection, setup: Setup) -> None:
        self._parent, self._setup = parent, setup
        self._parent_process = os.getppid()
        self._children: dict[int, Child] = {}  # by their descriptors
        self._last_number = -1  # of a request

    def serve(self) -> None:
        """Until the parent has gone."""
        try:
            while os.getppid() == self._parent_process:
                self._wait()
        finally:
            for child in self._children.values():
                child.kill()

    def _wait(self) -> None:
        """Looks at whatever comes next, for a while."""
        left_s = [left for child in self._children.values() if (left := child.left_s()) is not None]
        patience = max(0.0, min([*left_s, _LOOK_S]))
        for descriptor in select.select([self._parent.fileno(), *self._children], [], [], patience)[0]:
            if (child := self._children.pop(descriptor, None)) is not None:
                self._parent.send(Answer(child.number, child.ended()))
            else:
                self._take(self._parent.recv())
        self._share()
        for child in self._children.values():
            child.end_if_late()

    def _take(self, request: Request) -> None:
        """Of the parent: starts a compilation, or knows that a call waits for one, unless it has just ended."""
        if request.number > self._last_number:
            self._last_number = request.number
            run = partial(_compile, request, self._setup, os.getpid())
            child = Child(request.number, request.is_urgent, self._setup.scratch, self._setup.timeout_s, run)
            self._children[child.descriptor] = child
        for child in self._children.values():
            child.is_urgent |= request.is_urgent and child.number == request.number

    def _share(self) -> None:
        """While a call waits, few others go on, the oldest: what has another core still shares caches and memory."""
        children = sorted(self._children.values(), key=lambda child: (not child.is_urgent, child.number))
        num_urgent = sum(child.is_urgent for child in children)
        may_go_on = num_urgent + self._setup.num_beside if num_urgent else len(children)
        for index, child in enumerate(children):
            if index < may_go_on:
                child.go_on()
            else:
                child.stand()


def _compile(request: Request, setup: Setup, server: int, log: int, scratch: str) -> NoReturn:
    """In a process of its own: compiles one kernel into Triton's cache."""
    code = 1
    try:
        os.setpgid(0, 0)
        _end_with(server)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not request.is_urgent:
            os.nice(_MORE_NICE)
        tempfile.tempdir = os.environ["TMPDIR"] = scratch
        _compile_and_build(request.spec, setup.target)
        code = 0
    except BaseException as error:
        # Of a device function's error, Triton's own says only where it was called.
        error = error.__cause__ or error
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def _compile_and_build(spec: KernelSpec, target: Any) -> None:
    """Compiles a kernel, and builds its launcher meanwhile."""
    if not launchers.has_launchers():
        spec.compile(target)
        return
    # It may fail where there is no driver to link with; if so, the call below fails again and says why.
    ahead = Thread(target=_tried, args=(spec.source(),), daemon=True)
    ahead.start()
    compiled = spec.compile(target)
    ahead.join()
    launchers.build_launcher(compiled.src, getattr(compiled.metadata, "tensordesc_meta", None) or [])


def _tried(source: Any) -> None:
    try:
        launchers.build_launcher(source)
    except Exception:
        pass


def _end_with(parent: int) -> None:
    """Has the system end this process when its parent ends."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
