"""The workers that are compared: the same model, each with attention from somewhere else.

A way is a subclass of `Way` and a name in `WAYS`. It says what its attention enqueues (`begin` once a step, `attend` in
each layer) and what its host does in a step (`step`); all of them end a step by reading the sampled tokens on the host,
as a decode loop does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import attnd
from benchmarks.worker_contexts import Batch, Contexts
from benchmarks.worker_kernels import Split
from benchmarks.worker_local import LocalAttention, LocalPages
from benchmarks.worker_model import Model, State


@dataclass(frozen=True, eq=False)
class Cell:
    """What the ways of a cell have in common.

    Attributes:
        model: of all workers.
        contexts: of the requests.
        cache: on the server, filled already.
        local_attention: of the way `local`.
        has_cuda_plane: whether there is one. Without, ways of the cuda plane run on shm, to show that they work.
    """

    model: Model
    contexts: Contexts
    cache: attnd.Cache
    local_attention: LocalAttention
    has_cuda_plane: bool

    @property
    def batch(self) -> Batch:
        """The requests."""
        return self.contexts.batch


def captured(
    run: Callable[[], None], device: torch.device, stream: torch.cuda.Stream | None = None
) -> Callable[[], None]:
    """What does all that `run` enqueues, again and again: on a GPU a CUDA graph, which has not run yet.

    Args:
        run: was called once before, so that its kernels are loaded.
        device: that it enqueues on.
        stream: to capture on; None: one of the device.
    """
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream or torch.cuda.Stream(device)):
        run()
    return graph.replay


class SampledTokens:
    """The tokens of a step on the host."""

    def __init__(self, state: State) -> None:
        self._source = state.tokens
        on_gpu = state.tokens.device.type == "cuda"
        self.host = torch.zeros(state.tokens.shape, dtype=torch.int64, pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None

    def fetch(self) -> None:
        """Enqueues their copy, behind the step."""
        self.host.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def are_there(self) -> bool:
        """Whether a `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Returns once they are there."""
        if self._event is not None:
            self._event.synchronize()


class Way:
    """A worker. `prepare` it before its first step, and `close` it.

    Attributes:
        name: of the way.
        attends: whether it has any attention, to be checked.
        state: of its steps.
        context_len: tokens before the next step's, as its host counts them.
    """

    name: ClassVar[str]
    attends: ClassVar[bool] = True

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.state = State(cell.batch.num_reqs, cell.model.shape, cell.model.device)
        self.tokens = SampledTokens(self.state)
        self.context_len = 0
        self.replay: Callable[[], None] = self.forward

    def begin(self) -> None:
        """Enqueues what comes before a step's layers. May run in a capture."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Enqueues attention of a layer. Likewise."""
        raise NotImplementedError

    def into(self, layer: int) -> Split | None:
        """Where q, k and v of a layer are to be written; None: anywhere."""
        return None

    def forward(self) -> None:
        """Enqueues a step. Likewise."""
        self.begin()
        self.cell.model.forward(self.state, self.attend, self.into)

    def go_in_place(self) -> bool:
        """Spares copies from now on, so that what attention got and gave is not kept. False: there is no such thing."""
        return False

    def restart(self, tokens: torch.Tensor) -> None:
        """Goes back to the state behind the contexts; no step is under way."""
        self.context_len = self.cell.batch.context_len
        self.state.restart(tokens, self.context_len)

    def prepare(self) -> None:
        """Runs a step by itself, which loads its kernels, and captures another."""
        with self._a_step():
            self.forward()
        with self._a_step():
            self.replay = captured(self.forward, self.cell.model.device)
            self.replay()

    @contextmanager
    def _a_step(self) -> Iterator[None]:
        """Around a step that is not timed."""
        self.restart(torch.zeros_like(self.state.tokens))
        yield
        self.tokens.fetch()
        self.tokens.wait()

    def step(self, more: bool) -> None:
        """A step to its end: the next tokens are on the host.

        Args:
            more: whether another follows at once.
        """
        self.replay()
        self.tokens.fetch()
        self.tokens.wait()
        self.context_len += 1

    def close(self) -> None:
        """Frees what it has on the server."""


class NoAttention(Way):
    """The floor: attention gives q."""

    name = "none"
    attends = False

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return q


class Local(Way):
    """KV on the worker's own GPU. Slots and the kernel's plan come from lengths that lie there, once a step."""

    name = "local"

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self._attention = cell.local_attention
        self._pages = LocalPages(cell.contexts)
        self._slots = torch.empty(0)
        self._plan: Any = None

    def begin(self) -> None:
        """Slots and plan."""
        positions = self.state.positions
        self._slots = self._pages.slots(positions)
        self._plan = self._attention.plan(self.cell.batch, self.cell.model.shape, (positions + 1).int())

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores, then attends."""
        self._pages.store(layer, k, v, self._slots)
        return self._attention.attend(self._plan, q, self._pages.layers[layer], self._pages.page_tables)


class AnsweredStep:
    """A step whose calls return their outputs: when the last has, nothing is left to be waited for."""

    def __init__(self, step: Any) -> None:
        self.attend = step.attend

    def finish(self) -> None:
        """Nothing."""


class RemoteSession:
    """A session of either kind, whose steps have `attend` and `finish`. They go by message, unless it is said."""

    def __init__(self, cache: attnd.Cache, plane: str, num_heads: int, *, uses_resident_steps: bool = False) -> None:
        self._session: Any = cache.session(plane=plane)
        self._is_queued, self._num_heads = plane == "cuda", num_heads
        if self._is_queued:
            self._session.uses_resident_steps = uses_resident_steps

    def step(self, metadata: attnd.StepMetadata) -> Any:
        """Opens a step; on a cuda plane the server has all of it then."""
        if self._is_queued:
            return self._session.step(metadata, num_heads=self._num_heads)
        return AnsweredStep(self._session.step(metadata))

    @property
    def num_resident(self) -> int:
        """Resident steps up to now."""
        return int(self._session.timings().resident)

    def resident(self, num_heads: int, max_reqs: int, max_pages: int) -> attnd.ResidentSteps:
        """Makes resident steps ready."""
        steps: attnd.ResidentSteps = self._session.resident(num_heads, max_reqs=max_reqs, max_pages=max_pages)
        return steps

    def close(self) -> None:
        """Ends it."""
        self._session.close()


class Cuda(Way):
    """The cuda plane; the server learns of a step when it is to be computed."""

    name = "cuda"
    plane: ClassVar[str] = "cuda"
    uses_resident_steps: ClassVar[bool] = False

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        plane = self.plane if cell.has_cuda_plane else "shm"
        is_wanted = self.uses_resident_steps
        self.session = RemoteSession(cell.cache, plane, cell.model.shape.num_heads, uses_resident_steps=is_wanted)
        self.opened: Any = None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The session's. A graph has it of the step that was captured, and serves all others."""
        output: torch.Tensor = self.opened.attend(layer, q, k, v)
        return output

    def open(self, context_len: int) -> Any:
        """Tells the server of a step."""
        return self.session.step(self.cell.batch.decode(context_len))

    @contextmanager
    def _a_step(self) -> Iterator[None]:
        with super()._a_step():
            self.opened = self.open(self.context_len)
            yield
        self.opened.finish()

    def step(self, more: bool) -> None:
        """Tells, computes, and waits for both sides."""
        self.opened = self.open(self.context_len)
        super().step(more)
        self.opened.finish()

    def close(self) -> None:
        """Ends the session."""
        self.session.close()


class Steps(Cuda):
    """The same calls, and steps that the session takes as resident ones by itself: their metadata is the host's."""

    name = "steps"
    uses_resident_steps = True

    def step(self, more: bool) -> None:
        """As `Cuda`, and sees to it that nothing goes by message."""
        before = self.session.num_resident
        super().step(more)
        if self.cell.has_cuda_plane and self.session.num_resident != before + 1:
            raise RuntimeError("a step went by message, but must be resident")


class Ahead(Cuda):
    """The same, but the server learns of the next step while it computes this one."""

    name = "ahead"

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self._next: Any = None

    def step(self, more: bool) -> None:
        """Computes a step that was told, tells the next one, and waits."""
        self.opened = self._next or self.open(self.context_len)
        self.replay()
        self.tokens.fetch()
        self.context_len += 1
        self._next = self.open(self.context_len) if more else None
        self.tokens.wait()
        self.opened.finish()


class Resident(Cuda):
    """Resident steps: the metadata comes from lengths on the device, inside the graph, and nobody tells the server."""

    name = "resident"

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self._steps: attnd.ResidentSteps | None = None
        self._is_in_place = False
        if cell.has_cuda_plane:
            batch, num_heads = cell.batch, cell.model.shape.num_heads
            self._steps = self.session.resident(num_heads, batch.num_reqs, batch.pages_per_req)
            self._steps.page_tables.copy_(batch.page_tables)

    def begin(self) -> None:
        """Brings the server the lengths."""
        if self._steps is not None:
            self._steps.context_lens.copy_(self.state.positions)
            self._steps.begin(self.cell.batch.num_reqs)
            self.opened = self._steps

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `Cuda`, with a result that is read at once."""
        if self._steps is None:
            return super().attend(layer, q, k, v)
        output: torch.Tensor = self._steps.attend(layer, q, k, v, copies=not self._is_in_place)
        return output

    def into(self, layer: int) -> Split | None:
        """Memory of the server's GPU."""
        return self._steps.inputs(layer, self.cell.batch.num_reqs) if self._steps and self._is_in_place else None

    def go_in_place(self) -> bool:
        """Captures another graph."""
        if self._steps is None:
            return False
        self._is_in_place = True
        self.prepare()
        return True

    def open(self, context_len: int) -> Any:
        """Nothing, where there are resident steps."""
        return super().open(context_len) if self._steps is None else self._steps


class Shm(Cuda):
    """A worker without a cuda plane: its tensors go through host memory, layer by layer, and nothing is captured."""

    name = "shm"
    plane = "shm"

    def prepare(self) -> None:
        """Loads the kernels."""
        with self._a_step():
            self.forward()


WAYS: Mapping[str, Callable[[Cell], Way]] = {
    way.name: way for way in (NoAttention, Local, Resident, Steps, Cuda, Ahead, Shm)
}
"""By name, in the order of the table."""
