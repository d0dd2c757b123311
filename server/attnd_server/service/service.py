"""What the service does, protobuf in and protobuf out, whatever the transport.

Each method takes the bytes of a request and checks all of it. It returns the bytes of the response or, where KV memory
is touched, the work that gives them, for the executor. Errors are those of `attnd.errors`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from google.protobuf.message import Message

from attnd.errors import AttndError, Disconnected, InvalidRequest, to_message
from attnd.protocol import frames
from attnd.protocol.tensors import Array
from attnd.v1 import attention_pb2, cache_pb2, step_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call, Step
from attnd_server.execution.work import CacheWork, SideWork, Work, new_cache
from attnd_server.identity import OpenByToken, refuse_if_revoked
from attnd_server.identity.quota import Quota
from attnd_server.kv.caches import CacheTable
from attnd_server.observe.callers import Callers
from attnd_server.observe.counts import Metrics
from attnd_server.observe.traces import Traces
from attnd_server.observe.verify import Verifier
from attnd_server.service import validation
from attnd_server.service.capabilities import capabilities
from attnd_server.service.kept_steps import HeldBytes, StepRoom, step_bytes
from attnd_server.service.kv_requests import KvRequests
from attnd_server.service.plane_offer import PlaneOffer
from attnd_server.service.refusals import refusal_of
from attnd_server.service.replies import InlineReplies, Replies
from attnd_server.service.session import AttendSession
from attnd_server.service.status import Status
from attnd_server.service.warm_up import WarmUp

# Checked options that are kept, and how long their messages may be: 1024 heads with slopes and sinks fit.
MAX_KEPT_OPTIONS, MAX_KEPT_OPTION_BYTES = 1_024, 9 << 10


class AttentionService:
    """The operations on one device's caches.

    Attributes:
        callers: what each was served.
        sessions: who holds how many streams and planes; whoever serves one takes it there, and gives it back.
        opened: the streams and planes that tokens have opened; whoever serves one holds it there.
        kv: the requests that read and write KV without attention.
        verifier: looks at some of the calls again; None: nobody does.
    """

    def __init__(
        self,
        config: ServerConfig,
        executor: Executor,
        caches: CacheTable,
        planes: PlaneOffer,
        metrics: Metrics | None = None,
        verifier: Verifier | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Serves `caches` with `executor`.

        Args:
            config: the limits.
            executor: of the device of the caches.
            caches: of the server.
            planes: what it offers besides the inline plane.
            metrics: count what is refused; None: nobody counts.
            verifier: of the executor's calls, to be closed with it; None: there is none.
            traces: of steps, likewise; None: none has any.
        """
        self.config = config
        self.executor = executor
        self.caches = caches
        self.metrics = metrics
        self._planes = planes
        self.verifier = verifier
        self._traces = traces
        self.step_room = StepRoom(config.max_step_bytes, caches.share.step_bytes)
        remedy = "close one, or wait until one is closed"
        self.callers = Callers()
        self.sessions = Quota("sessions", "are open", config.max_sessions, caches.share.sessions, remedy)
        self.opened = OpenByToken()
        # Not an LRU: several threads share it, each step of which must be one of Python's own.
        self._options: dict[tuple[object, ...], AttentionOptions] = {}
        self.kv = KvRequests(config, caches)
        self.unary: dict[str, Callable[[bytes, str], bytes | Work]] = {
            "GetCapabilities": self.get_capabilities,
            "CreateCache": self.create_cache,
            "RenewCache": self.kv.renew_cache,
            "AdoptCache": self.adopt_cache,
            "DeleteCache": self.delete_cache,
            "ListCaches": self.list_caches,
            "CopyPages": self.kv.copy_pages,
            "WarmUp": self.warm_up,
            "Prefill": self.prefill,
            "Decode": self.decode,
            "OpenPlane": self.open_plane,
            "ClosePlane": planes.close,
        }
        self.unary = {name: self._while_sound(method) for name, method in self.unary.items()}
        self.status = Status(config, executor, caches, self.sessions, self.callers)
        self.unary["GetStatus"] = self.status.get_status  # of a server whose device has failed, too

    def _while_sound(self, method: Callable[[bytes, str], bytes | Work]) -> Callable[[bytes, str], bytes | Work]:
        def checked(data: bytes, principal: str) -> bytes | Work:
            self.executor.faults.refuse()
            return method(data, principal)

        return checked

    def close(self) -> None:
        """Ends the threads, after what waits."""
        self.executor.close()
        if self.verifier is not None:
            self.verifier.close()
        if self._traces is not None:
            self._traces.close()

    def get_capabilities(self, data: bytes, principal: str) -> bytes:
        """GetCapabilities."""
        return capabilities(self.config, self.executor, self.caches, self._planes.reasons()).SerializeToString()

    def create_cache(self, data: bytes, principal: str) -> Work:
        """CreateCache. Allocates on the executor, so that nothing else runs into a full device meanwhile."""
        self.refuse_if_draining()
        request = frames.parse(cache_pb2.CreateCacheRequest, data)
        shape, ttl_s, name = validation.create_cache(request, self.config)

        def work() -> bytes:
            cache = self.caches.create(shape, principal=principal, ttl_s=ttl_s, name=name, key=request.key)
            return cache_pb2.CreateCacheResponse(cache=cache.info()).SerializeToString()

        return new_cache(principal, work)

    def adopt_cache(self, data: bytes, principal: str) -> bytes:
        """AdoptCache."""
        cache = self.caches.adopt(frames.parse(cache_pb2.AdoptCacheRequest, data).cache, principal)
        return cache_pb2.AdoptCacheResponse(cache=cache.info()).SerializeToString()

    def delete_cache(self, data: bytes, principal: str) -> Work:
        """DeleteCache. Calls that came before it still run."""
        ref = frames.parse(cache_pb2.DeleteCacheRequest, data).cache
        self.caches.get(ref, principal)

        def work() -> bytes:
            cache = self.caches.delete(ref, principal)
            return cache_pb2.DeleteCacheResponse(num_bytes=cache.shape.num_bytes).SerializeToString()

        return CacheWork(ref.id, principal, work)

    def list_caches(self, data: bytes, principal: str) -> bytes:
        """ListCaches."""
        caches = [cache.info(with_id=False) for cache in self.caches.owned(principal)]
        return cache_pb2.ListCachesResponse(caches=caches).SerializeToString()

    def warm_up(self, data: bytes, principal: str) -> Work:
        """WarmUp. Compiles beside the executor, so that others are served meanwhile."""
        self.refuse_if_draining()
        request = frames.parse(attention_pb2.WarmUpRequest, data)
        cache = self.caches.get(request.cache, principal)
        group = cache.groups[validation.group(request.group, cache.shape)]
        steps = validation.warm_up(request, group.config, self.config)
        return SideWork(principal, WarmUp(self.executor, self.caches, cache, group, steps, self.config, principal))

    def prefill(self, data: bytes, principal: str) -> Work:
        """Prefill: a step and one call of it."""
        return self._step_and_call(
            data, principal, frames.PREFILL_REQUEST, frames.PREFILL_RESPONSE, step_pb2.STEP_KIND_PREFILL
        )

    def decode(self, data: bytes, principal: str) -> Work:
        """Decode: a step and one call of it."""
        return self._step_and_call(
            data, principal, frames.DECODE_REQUEST, frames.DECODE_RESPONSE, step_pb2.STEP_KIND_DECODE
        )

    def _step_and_call(
        self, data: bytes, principal: str, frame: frames.Frame, reply: frames.Frame, kind: step_pb2.StepKind.ValueType
    ) -> Work:
        request = frame.decode(data, max_header_bytes=self.config.max_header_bytes)
        if request.message.step.kind != kind:
            given, must = request.message.step.kind, step_pb2.StepKind.Name(kind)
            raise InvalidRequest(f"step.kind is {given}, but must be {kind} ({must})", field="step.kind")
        steps = self.step(request.message.step, principal)
        served = self.callers.unary_step(principal, steps[0].metadata.num_tokens).served
        call = self.call(steps, request.message.call, request.tensors)
        call.step.counts = served
        replies = InlineReplies(reply)
        return replies.answered(call, request.message.call)

    def step(
        self,
        message: step_pb2.Step,
        principal: str,
        open_steps: validation.OpenSteps = validation.NO_STEPS,
        plane: str = "inline",
        take: Callable[[int], HeldBytes] | None = None,
    ) -> tuple[Step, ...]:
        """Checks a step that may build on `open_steps` and gets its room by `take`; its cache's lease starts again.

        Returns:
            The step, as one for each layer group of its cache.
        """
        began_ns = time.time_ns()
        self.refuse_if_draining()
        refuse_if_revoked(principal)  # here, so that no plane can forget it
        cache = self.caches.get(message.cache, principal)
        num_bytes = step_bytes(message, self.config, [group.window for group in cache.shape.groups])
        held = take(num_bytes) if take is not None else self.step_room.take(principal, num_bytes)
        metadata = validation.steps(message, cache.shape.groups, self.config, open_steps)
        timeout_s = message.call_timeout_ms / 1e3 or None
        executor = self.executor
        # A request's own step has one call, and its plan goes with it.
        kept, most_work = executor.kept_plans if take is not None else None, executor.most_work
        steps = tuple(
            Step(message.id, cache, group, each, timeout_s, executor.graphs, kept, most_work, held=held)
            for group, each in zip(cache.groups, metadata, strict=True)
        )
        if self._traces is not None:
            self._traces.begin(message.traceparent, steps, plane, began_ns)
        return steps

    def call(self, steps: Sequence[Step], message: step_pb2.Call, tensors: Mapping[str, Array]) -> Call:
        """Checks a call of a step, which is given for each layer group of its cache."""
        cache = steps[0].cache
        cache.renew()
        group, layer = validation.place(message.layer, cache.shape)
        step = steps[group]
        config = step.group.config
        checked = validation.call(message, tensors, config, step.metadata)
        options = self.checked_options(message.options, config, checked.num_heads, step.metadata.window)
        step.cost(options)  # or it is refused
        return Call(step, layer, options, checked.q, checked.k, checked.v)

    def checked_options(
        self, message: step_pb2.AttentionOptions, config: AttentionConfig, num_heads: int, window: int = 0
    ) -> AttentionOptions:
        """The options of a layer, checked unless the same bytes were before: layers send the same few again and again.

        `window`: that of the step, which is that of its calls.

        Raises:
            InvalidRequest: they are wrong.
        """
        key = (message.SerializeToString(), num_heads, config.num_kv_heads, config.head_dim, config.backend, window)
        options = self._options.get(key)
        if options is None:
            options = validation.options(message, config, num_heads, window)
            if len(self._options) >= MAX_KEPT_OPTIONS:
                self._options.clear()
            if len(key[0]) <= MAX_KEPT_OPTION_BYTES:
                self._options[key] = options
        return options

    def open_session(self, principal: str, replies: Replies | None = None) -> AttendSession:
        """The state of one Attend stream, or of what is like it on a plane."""
        self.refuse_if_draining()
        return AttendSession(self, principal, replies or InlineReplies(frames.ATTEND_RESPONSE))

    def open_plane(self, data: bytes, principal: str) -> bytes:
        """OpenPlane."""
        self.refuse_if_draining()
        return self._planes.open(data, principal)

    def told(self, error: Exception, principal: str = "") -> AttndError:
        """What a client is told, and counts as refused. Of a bug it learns an id; the log has the rest under that.

        Args:
            error: what was raised.
            principal: who is told; "": nobody knows.
        """
        refusal = refusal_of(error, self.executor.faults)
        self.callers.refused(principal, refusal)
        if self.metrics is not None:
            self.metrics.refused(refusal)
        return refusal

    def drain(self) -> None:
        """Refuses new caches, steps and planes from now on; what runs goes on."""
        self.status.is_draining = True

    def refuse_if_draining(self) -> None:
        """Raises Disconnected once the server drains, or its device has failed."""
        self.executor.faults.refuse()
        if self.status.is_draining:
            raise Disconnected("the server is draining: it takes no new steps; reconnect elsewhere or later")


def error_response(message_type: type[Message], error: BaseException) -> bytes:
    """A stream's message that carries `error` in-band: an AttendResponse or a StoreKvResponse."""
    return message_type(error=to_message(error)).SerializeToString()  # type: ignore[arg-type]
