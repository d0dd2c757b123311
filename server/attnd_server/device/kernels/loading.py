"""How a compiled kernel gets to the GPU without waiting for steps that wait for their workers.

The driver loads a kernel when all that runs in the context is over, and lets nothing be launched meanwhile. So it is
loaded in a moment in which no step on a cuda plane is under way. If there is none at once, it is loaded into a second
context, where it can be launched until such a moment comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnd.errors import Unsupported
from attnd.protocol.cuda.driver import CudaError, call, driver
from attnd.protocol.cuda.driver import device as gpu
from attnd_server.device.kernels.local_memory import local_memory
from attnd_server.device.kernels.second_context import SecondContext, second_context, triton_driver
from attnd_server.device.quiet import quiet_gpu

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

log = logging.getLogger(__name__)

# Seconds that a kernel waits for a moment in which it can be loaded where it belongs, unless a step has stalled; that
# new steps are held back for one at a time; and between two tries.
_PATIENCE_S, _TRY_S, _PAUSE_S = 0.2, 0.05, 0.02

_standing_in: Counter[torch.device] = Counter()
_counting = threading.Lock()


def num_standing_in(device: torch.device) -> int:
    """Kernels of a device, given with its index, that are launched in the second context at present."""
    return _standing_in[device]


class NotNow(Exception):
    """A kernel cannot be loaded while a step waits: in the second context there is not enough local memory for it."""


class StandIn:
    """Launches a kernel in the second context until it is loaded in the primary one. Stands where Triton has a kernel.

    Attributes:
        packed_metadata: of the kernel, for its launcher.
        function: nothing: `run` knows its own.
        loaded: the kernel, once it is loaded.
    """

    function = 0

    def __init__(self, compiled: CompiledKernel, launcher: Any, function: int, context: SecondContext) -> None:
        """Of a kernel whose function is loaded in a context, and launched by Triton's launcher."""
        self.packed_metadata = compiled.packed_metadata
        self.loaded: CompiledKernel | None = None
        self._launcher, self._function, self._context = launcher, function, context

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *args: Any) -> None:
        """None: nobody profiles what stands in."""

    def run(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        """Launches it on a stream of the primary context, as Triton asks its own kernels to."""
        grid, hooks = (grid_x, grid_y, grid_z), (launch_metadata, enter_hook, exit_hook)
        if (loaded := self.loaded) is not None:
            loaded.run(*grid, stream, loaded.function, packed_metadata, *hooks, *args)
            return
        # Addresses: of a tensor the launcher would ask where it lies, and the answer is the primary context's.
        plain = [each.data_ptr() if hasattr(each, "data_ptr") else each for each in args]
        self._context.launch(
            stream, lambda own: self._launcher(*grid, own, self._function, packed_metadata, *hooks, *plain)
        )


class KernelLoader:
    """Loads the kernels of one device."""

    def __init__(
        self, device: torch.device, on_loaded: Callable[[StandIn, CompiledKernel], None] = lambda *_: None
    ) -> None:
        """Loads none yet.

        Args:
            device: with its index.
            on_loaded: told, on another thread, when a kernel is loaded for which something stood in until then.
        """
        self._device, self._on_loaded = device, on_loaded
        self._quiet = quiet_gpu(device)
        self._context: SecondContext | None = None
        self._has_bindings = self._may_have_context = _has_bindings()
        self._making = threading.Lock()
        self._is_closed = False

    def load(self, compiled: CompiledKernel) -> Any:
        """Brings a kernel to the GPU, on a thread for which nobody waits but who wants this kernel.

        Returns:
            What Triton is to launch: the kernel, or a StandIn that `on_loaded` is told of later.

        Raises:
            NotNow: it cannot be loaded before no step waits.
            RuntimeError: it cannot be loaded, or the loader was closed.
        """
        with torch.cuda.device(self._device):
            # Made before, because it may have to be compiled.
            launcher = triton_driver().launcher_cls(compiled.src, compiled.metadata)
            deadline = time.monotonic() + _PATIENCE_S
            while True:
                with self._quiet.moment(_TRY_S) as is_quiet:
                    if is_quiet:
                        self._load_here(compiled)
                        return compiled
                if self._is_closed:
                    raise RuntimeError("the server is shutting down")
                is_late = time.monotonic() >= deadline or self._quiet.has_stalled()
                if is_late and (context := self._second_context()) is not None:
                    return self._standing_in(compiled, launcher, context)
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Nothing waits for a moment any more."""
        self._is_closed = True

    def _load_here(self, compiled: CompiledKernel) -> None:
        """Loads a kernel into the primary context, in a quiet moment."""
        compiled._init_handles()
        if self._has_bindings:
            gpu(self._device.index).make_current()
            call("cuFuncLoad", driver().CUfunction(compiled.function))
            local_memory(self._device.index).reserve(compiled.n_spills * 4)  # registers of 32 bits

    def _standing_in(self, compiled: CompiledKernel, launcher: Any, context: SecondContext) -> StandIn:
        function = context.load(compiled, self._quiet)
        if function is None:
            raise NotNow
        stand_in = StandIn(compiled, launcher, function, context)
        log.info("kernel %s is launched in the second context until no step waits", compiled.name)
        with _counting:
            _standing_in[self._device] += 1
        self._quiet.later(partial(self._replace, stand_in, compiled))
        return stand_in

    def _replace(self, stand_in: StandIn, compiled: CompiledKernel) -> None:
        """In a quiet moment."""
        with torch.cuda.device(self._device):
            self._load_here(compiled)
        stand_in.loaded = compiled
        with _counting:
            _standing_in[self._device] -= 1
        self._on_loaded(stand_in, compiled)

    def _second_context(self) -> SecondContext | None:
        """None: there can be none, and whoever asks has to wait."""
        with self._making:
            if not self._may_have_context:
                return None
            try:
                return second_context(self._device.index)
            except CudaError as error:
                self._may_have_context = False
                log.warning("kernels wait for steps on cuda planes, as there is no second context: %s", error)
                return None


def _has_bindings() -> bool:
    """Whether there are cuda-bindings; without, no step waits, as there are no cuda planes."""
    try:
        driver()
    except Unsupported:
        return False
    return True
