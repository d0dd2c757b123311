"""`inproc://`: the server's own objects in the client's process, without a socket. For notebooks, tests, debugging.

The client finds `connect` through the entry point group `attnd.transports`, so it never imports the server.
"""

from __future__ import annotations

import atexit
import queue
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from google.protobuf.message import Message

from attnd import forks, traces
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, ended
from attnd.planes.retries import retried
from attnd.planes.transport import Stream
from attnd.protocol import requests
from attnd.threads import start_thread
from attnd.v1 import attention_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call
from attnd_server.execution.work import Work
from attnd_server.observe.verify import Verifier
from attnd_server.service.service import AttentionService, error_response

PRINCIPAL = "inproc"
# Steps a second that are traced at the most, unless the configuration says how many.
TRACES_PER_S = 100
# Seconds that the process' end waits for what runs, which was told to end.
END_S = 60.0
# Whose threads the end of the process must find outside torch: it aborts otherwise.
_AT_WORK: weakref.WeakSet[Executor | Verifier] = weakref.WeakSet()


def connect(config: ServerConfig | None = None) -> InprocTransport:
    """A transport to a new server in this process. It traces where the client does, and to the same provider."""
    config, spans = config or ServerConfig(), None
    if traces.provider is not None:
        from attnd_server.observe.traces.spans import SpanWriter  # with a library that only this needs

        config, spans = replace(config, traces=config.traces or TRACES_PER_S), SpanWriter(traces.provider)
    service = build_service(config, spans=spans)
    _AT_WORK.add(service.executor)
    if service.verifier is not None:
        _AT_WORK.add(service.verifier)
    return InprocTransport(service)


@atexit.register
def _end_all() -> None:
    at_work = list(_AT_WORK)
    for each in at_work:
        if isinstance(each, Executor):
            each.end_running("the process ends")
    for each in at_work:
        each.close(END_S)


class InprocTransport:
    """Implements `attnd.planes.transport.Transport` over an AttentionService."""

    def __init__(self, service: AttentionService) -> None:
        """Owns `service`."""
        self._service = service
        self._made = forks.generation
        self._end = weakref.finalize(self, _close, service, self._made)
        self._end.atexit = False

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method."""
        self._refuse_if_ended()
        method_of_service = self._service.unary[method]
        return retried(lambda left_s: self._finish(method_of_service(request, PRINCIPAL), left_s), timeout_s)

    def attend(self) -> InprocStream:
        """Opens an Attend stream."""
        self._refuse_if_ended()
        return InprocStream(self, self._service.open_session(PRINCIPAL).request)

    def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
        """Calls StoreKv."""
        self._refuse_if_ended()
        for request in requests:
            yield self._answer(self._service.kv.store_kv(request, PRINCIPAL), attention_pb2.StoreKvResponse, timeout_s)

    def read_kv(self, request: bytes, timeout_s: float) -> Iterator[bytes]:
        """Calls ReadKv."""
        self._refuse_if_ended()
        for work in self._service.kv.read_kv(request, PRINCIPAL):
            yield self._finish(work, timeout_s)

    def may_close(self) -> bool:
        """Whether it is this process that has the server's threads."""
        return self._made == forks.generation

    def close(self) -> None:
        """Ends the server."""
        if self._end.detach() is not None:
            self._service.close()

    def _refuse_if_ended(self) -> None:
        forks.refuse("client", self._made)
        if not self._end.alive:
            raise ended("the client was closed, and its server with it; connect again")

    def _finish(self, answer: bytes | Work, timeout_s: float) -> bytes:
        if isinstance(answer, bytes):
            return answer
        executor = self._service.executor
        if executor.device.type == "cuda" and isinstance(answer, Call) and answer.is_small:
            with torch.no_grad():  # as on the executor's thread
                result = executor.run_now(answer)
            if result is not None:
                return result
        results: queue.SimpleQueue[tuple[bytes | None, BaseException | None]] = queue.SimpleQueue()
        job = executor.submit(answer, lambda *settled: results.put(settled), timeout_s)
        try:
            result, error = results.get(timeout=timeout_s)
        except queue.Empty:
            executor.cancel(job)
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        if error is not None:
            raise error
        return result or b""

    def _answer(self, answer: bytes | Work, reply: type[Message], timeout_s: float) -> bytes:
        try:
            return self._finish(answer, timeout_s)
        except AttndError as error:
            return error_response(reply, error)


def _close(service: AttentionService, made: int) -> None:
    """Ends the server of a client that nobody has any more: on a thread, for it waits for those of the server."""
    if made == forks.generation:
        start_thread(service.close, "attnd-inproc-end")
    else:
        forks.keep(service)


class InprocStream(Stream):
    """Implements `attnd.planes.transport.Stream`: a request runs when its answer is asked for."""

    def __init__(self, transport: InprocTransport, request: Any) -> None:
        """Sends to `request`, an AttendSession's method."""
        self._transport = transport
        self._request = request
        self._pending: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closed = False

    def send(self, request: bytes) -> None:
        """Queues a message."""
        self._pending.put(request)

    def receive(self, timeout_s: float) -> requests.AttendReply:
        """The answer to the oldest message without one."""
        if self._closed:
            raise Disconnected("the session is closed")
        self._transport._refuse_if_ended()
        return requests.attend_reply(self._receive(timeout_s))

    def _receive(self, timeout_s: float) -> bytes:
        try:
            answer = self._request(self._pending.get_nowait())
        except AttndError as error:
            return error_response(attention_pb2.AttendResponse, error)
        return self._transport._answer(answer, attention_pb2.AttendResponse, timeout_s)

    def close(self) -> None:
        """Ends the stream."""
        self._closed = True
