"""The resident steps of one cuda plane: made ready by a message, paused for others, refused and resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from attnd.errors import AttndError, InvalidRequest, Unsupported, to_message
from attnd.protocol.cuda.layout import Place, StepLayout
from attnd.protocol.cuda.resident import resident_places
from attnd.v1 import attention_pb2, backend_pb2, tensor_pb2
from attnd_server.device.cuda_graph import Launches
from attnd_server.device.faults import is_device_fault
from attnd_server.device.memory import is_memory_error
from attnd_server.execution.cost import cost_of
from attnd_server.execution.work import on_cache
from attnd_server.identity import refuse_if_revoked
from attnd_server.planes.cuda.channel import Channel, Resident
from attnd_server.planes.cuda.checks import geometry_of, layer_options, refuse_costly, refuse_wrong_heads
from attnd_server.planes.cuda.in_turn import run_in_turn
from attnd_server.planes.cuda.resident.books import DONE
from attnd_server.planes.cuda.resident.keeper import KEEPER
from attnd_server.planes.cuda.resident.launches import ResidentLaunches
from attnd_server.planes.cuda.resident.making import (
    bytes_of_token,
    graph_of,
    kernels_of,
    longest_step,
    num_bytes_of,
    only_group,
)
from attnd_server.planes.cuda.resident.told import StepsDone, Told
from attnd_server.service import validation
from attnd_server.service.service import AttentionService

log = logging.getLogger(__name__)


class ResidentSession:
    """Resident steps that are ready: their graph, their launches, and what the session is told of them."""

    def __init__(
        self,
        service: AttentionService,
        principal: str,
        channel: Channel,
        message: attention_pb2.ResidentSteps,
        num_done: int,
        tell: Callable[[attention_pb2.AttendResponse | Exception], None],
        count: Callable[[StepsDone], None],
    ) -> None:
        """Makes them ready, on the executor's thread and the stream of all other work.

        Args:
            service: that they are of.
            principal: whose they are.
            channel: of the session.
            message: what they have in common.
            num_done: resident steps of the plane's life up to now.
            tell: sends a message to the worker; an exception ends the plane, too.
            count: counts what is done.

        Raises:
            AttndError: they break a rule, or there is no memory for them.
            Unsupported: their metadata cannot be planned on the device.
            KernelMissing: a kernel is not there yet.
        """
        self._service, self._principal, self._channel = service, principal, channel
        self._tell = tell
        self._replay: Launches | None = None
        self.cache = service.caches.get(message.cache, principal)
        self._group = only_group(self.cache)
        config = self._group.config
        self.sizes = validation.resident_sizes(message, config, service.config)
        refuse_wrong_heads(message.num_heads, config)
        self.options = layer_options(service, message.options, config, message.num_heads, config.window)
        layouts, self.where = resident_places(
            self.sizes.max_reqs,
            self.sizes.max_pages,
            self.sizes.query_len,
            message.num_heads,
            geometry_of(config),
            channel.num_bytes,
            message.layout_tokens,
        )
        self._bytes_of_token = bytes_of_token(layouts[0], self.options, self.sizes)
        longest, device = longest_step(self.sizes), self._group.device
        refuse_costly(self.options, lambda each: cost_of(config, longest, each, device), service.executor.most_work)
        kernels = kernels_of(service, self._group, self.options, self.sizes)
        self._num_bytes = num_bytes_of(kernels, self._group, self.sizes)
        service.caches.reserve(self.cache, self._num_bytes, "resident steps of a cuda plane take memory, which")
        try:
            self.graph = graph_of(kernels, self._group, self.options, self.sizes)
            self._resident = self._ready(layouts, num_done)
        except BaseException:
            service.caches.release(self.cache, self._num_bytes)
            raise
        self._num_settled = num_done
        told = Told(count, self._tell_refused, tell)
        self.launches = ResidentLaunches(
            self._enqueue,
            self._resident.books,
            channel.flags,
            self.cache,
            service.executor.quiet,
            self._resident.wake,
            self._refuse,
            told,
            self._come_after,
            service.executor.prepare_thread,
        )
        self._group.watch(self)
        self.cache.when_closed(self.launches.leave)
        KEEPER.keep(self.launches)

    def reply(self) -> bytes:
        """Says where their metadata lies."""
        reply = attention_pb2.ResidentStepsReply(
            metadata_offset=self.where.word,
            max_reqs=self.where.max_reqs,
            max_pages=self.where.max_pages,
            backend=backend_pb2.Backend.Value(f"BACKEND_{self.graph.backend.name}"),
        )
        return attention_pb2.AttendResponse(resident_steps=reply).SerializeToString()

    def num_bytes(self, num_reqs: int) -> tuple[int, int]:
        """Bytes that come and go with a step of so many requests."""
        num_tokens = num_reqs * self.sizes.query_len
        return num_tokens * self._bytes_of_token[0], num_tokens * self._bytes_of_token[1]

    def resume(self) -> bytes:
        """Takes the refusal back; what the worker has counted is done."""
        self.launches.pause(after=0)
        with self._channel.alone():
            self._resident.gates.resume(self._channel.handle)
        self._channel.mark()()
        self.launches.go_on(resumed=True)
        reply = attention_pb2.ResidentResumeReply()
        return attention_pb2.AttendResponse(resident_resume=reply).SerializeToString()

    def close(self) -> None:
        """Ends them, when nothing waits for the worker any more."""
        KEEPER.forget(self.launches)
        self.launches.close()
        self._replay = None  # the graph goes now, and not when some garbage is collected
        self.cache.when_closed_no_more(self.launches.leave)
        self._group.watch_no_more(self)
        self._service.caches.release(self.cache, self._num_bytes)

    def _ready(self, layouts: tuple[StepLayout, StepLayout], num_done: int) -> Resident:
        """Captures the launches."""
        channel, graph, where = self._channel, self.graph, self.where
        resident = channel.resident(graph.buffers.state, where.word)
        assert channel.capture_for is not None
        resident.books.start(num_done)
        word = Place(where.word, tensor_pb2.DTYPE_INT64, (1, 1), 8, is_result=False)
        channel.tensor(word).fill_(num_done)  # whatever lay there
        from attnd_server.attention.kernels.resident import state as words

        graph.buffers.state[words.STEP] = num_done
        try:
            self._replay = graph.capture(channel.capture_for, channel, resident.gates, layouts, where)
        except RuntimeError as error:  # CUDA's; by message the steps may do
            if is_device_fault(error) or is_memory_error(error):
                raise
            log.warning("resident steps cannot be captured", exc_info=error)
            raise Unsupported(f"they cannot be captured: {error}") from None
        with channel.current():  # after all that was done for it
            pass
        return resident

    def _enqueue(self) -> Callable[[], None]:
        assert self._replay is not None
        self._replay()
        return self._channel.mark()

    def make_way(self) -> None:
        """Launches nothing until the cache's work that has the device is done; see `layer_group.Writer`."""
        self.launches.make_way()

    def _come_after(self) -> None:
        """Lets launches come after all work of the cache that has had the device."""

        def order() -> bytes:
            with self._channel.current():
                return b""

        run_in_turn(self._service.executor, on_cache(self.cache, order))

    def written_pages(self) -> npt.NDArray[np.int64]:
        """The pages into which steps have stored; none again while no step was done. See `layer_group.Writer`."""
        num_done, self._num_settled = self._num_settled, self._resident.books.read(DONE)
        if num_done == self._num_settled:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self._channel.host_copy(self.graph.buffers.written))

    def _refuse(self) -> None:
        refuse_if_revoked(self._principal)
        self._service.executor.faults.refuse()
        self.cache.refuse_if_closed()

    def _tell_refused(self, step: int) -> None:
        """Says why a step was refused: what the host's own validation says of the GPU's copy."""
        buffers, sizes = self.graph.buffers, self.sizes
        on_device = buffers.page_tables[: sizes.max_reqs * sizes.max_pages].view(sizes.max_reqs, sizes.max_pages)
        error: AttndError
        try:
            lens, tables = self._channel.host_copy(buffers.lens), self._channel.host_copy(on_device)
            validation.resident_step(lens, tables, sizes, self._group.config, self._service.config)
            rule = "steps may be counted once the first layer of the step before is handed back, one at a time"
            error = InvalidRequest(f"resident step {step} was counted too early, but {rule}", field="step")
        except AttndError as refusal:
            error = refusal
        error = self._service.told(error, self._principal)
        refusal_message = attention_pb2.ResidentRefusal(step=step, error=to_message(error))
        self._tell(attention_pb2.AttendResponse(resident_refusal=refusal_message))


def refusal(reason: AttndError, *, is_late: bool = False) -> bytes:
    """Says that there are no resident steps, and why; if it is late, none yet."""
    reply = attention_pb2.ResidentStepsReply(reason=str(reason), is_late=is_late)
    return attention_pb2.AttendResponse(resident_steps=reply).SerializeToString()
