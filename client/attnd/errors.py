"""Every error that attnd raises: one class per thing that a caller can do about it.

    AttndError
    ├── InvalidRequest      correct the request: the message names field, value and rule
    ├── Unsupported         ask for something else: this server, plane or backend cannot do it, and says why
    ├── CacheLost           create another cache and store again: this one has gone
    ├── Exhausted           free something or wait: the message names limit, use and what is free
    ├── PermissionDenied    use other credentials; Unauthenticated: the server asks who you are
    ├── DeadlineExceeded    retry with more time
    ├── Disconnected        reconnect: the server is away, or the client closed or made in another process
    └── ServerFault         report it: a bug, with the id under which the server logged it

The server raises the same classes, so an `inproc://` client sees what a remote one sees.
"""

from __future__ import annotations

import math
from typing import Any

import grpc

from attnd.v1 import error_pb2

# Trailer in which gRPC carries google.rpc.Status (the grpc-status convention of unary calls).
STATUS_DETAILS_KEY = "grpc-status-details-bin"


class AttndError(Exception):
    """Base of all errors of attnd.

    Attributes:
        field: the request's field that is at fault, or "".
        retry_after_s: None; or the request was not started and may be sent again, best after so many seconds.
        reason: the wire's `ErrorReason`.
        code: the gRPC status code that carries it.
    """

    reason: error_pb2.ErrorReason.ValueType = error_pb2.ERROR_REASON_UNSPECIFIED
    code = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(AttndError, ValueError):
    """The request breaks a rule; nothing was changed. Correct it."""

    reason = error_pb2.ERROR_REASON_INVALID_REQUEST
    code = grpc.StatusCode.INVALID_ARGUMENT


class Unsupported(AttndError):
    """The request is sound, but this server, plane or backend cannot serve it. Ask for another."""

    reason = error_pb2.ERROR_REASON_UNSUPPORTED
    code = grpc.StatusCode.UNIMPLEMENTED


class CacheLost(AttndError):
    """The cache is unknown, deleted, expired, or of an earlier life of the server. Create another and store again."""

    reason = error_pb2.ERROR_REASON_CACHE_NOT_FOUND
    code = grpc.StatusCode.NOT_FOUND


class EpochMismatch(CacheLost):
    """The server was restarted since the cache was created, so its KV is gone.

    Unless the message says that the server has restored it: then `cache.adopt()` goes on with it.
    """

    reason = error_pb2.ERROR_REASON_EPOCH_MISMATCH
    code = grpc.StatusCode.FAILED_PRECONDITION


class Exhausted(AttndError):
    """A limit is reached: pages, memory, queue or message size. Free something or wait.

    Where waiting helps, `retry_after_s` says how long. The clients send such a request again by themselves while its
    timeout lasts, except for `StoreKv` and `ReadKv`.
    """

    reason = error_pb2.ERROR_REASON_EXHAUSTED
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class PermissionDenied(AttndError):
    """The credentials do not allow this."""

    reason = error_pb2.ERROR_REASON_PERMISSION_DENIED
    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(PermissionDenied):
    """The server asks who calls, and no or an unknown token, or a certificate without a name, is no answer."""

    reason = error_pb2.ERROR_REASON_UNAUTHENTICATED
    code = grpc.StatusCode.UNAUTHENTICATED


class DeadlineExceeded(AttndError, TimeoutError):
    """The answer did not come in time. Any request may be sent again."""

    reason = error_pb2.ERROR_REASON_DEADLINE_EXCEEDED
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Disconnected(AttndError, ConnectionError):
    """The server cannot be reached, or is starting or draining. Reconnect.

    Attributes:
        is_final: whether nothing more can come of this connection: it was closed, or is another process'.
    """

    is_final = False

    reason = error_pb2.ERROR_REASON_UNAVAILABLE
    code = grpc.StatusCode.UNAVAILABLE


class ServerFault(AttndError):
    """A bug of the server."""

    reason = error_pb2.ERROR_REASON_INTERNAL
    code = grpc.StatusCode.INTERNAL


_BY_REASON: dict[int, type[AttndError]] = {
    cls.reason: cls
    for cls in (
        InvalidRequest,
        Unsupported,
        CacheLost,
        EpochMismatch,
        Exhausted,
        PermissionDenied,
        Unauthenticated,
        DeadlineExceeded,
        Disconnected,
        ServerFault,
    )
}

# What a status without our details means: sent by gRPC itself, a proxy or another server.
_BY_CODE: dict[grpc.StatusCode, type[AttndError]] = {
    **{cls.code: cls for cls in _BY_REASON.values()},
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.CANCELLED: Disconnected,
    grpc.StatusCode.UNKNOWN: ServerFault,
    grpc.StatusCode.DATA_LOSS: ServerFault,
    # Ours always come with details. Without them they are gRPC's word for a broken stream and a proxy's for "not now".
    grpc.StatusCode.INTERNAL: Disconnected,
    grpc.StatusCode.FAILED_PRECONDITION: Disconnected,
}


def ended(message: str) -> Disconnected:
    """The error for what was closed, or belongs to another process: no attempt will succeed any more."""
    error = Disconnected(message)
    error.is_final = True
    return error


def to_message(error: AttndError) -> error_pb2.Error:
    """The wire's form of `error`."""
    retry_after_ms = 0 if error.retry_after_s is None else max(1, math.ceil(error.retry_after_s * 1e3))
    return error_pb2.Error(reason=error.reason, message=str(error), field=error.field, retry_after_ms=retry_after_ms)


def from_message(message: error_pb2.Error) -> AttndError:
    """The exception that `message` stands for."""
    retry_after_s = message.retry_after_ms / 1e3 if message.retry_after_ms else None
    return _BY_REASON.get(message.reason, ServerFault)(
        message.message, field=message.field, retry_after_s=retry_after_s
    )


def from_rpc(error: grpc.RpcError) -> AttndError:
    """The exception that a failed RPC stands for."""
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == STATUS_DETAILS_KEY:
            for detail in error_pb2.Status.FromString(value).details:
                message = error_pb2.Error()
                if detail.Unpack(message):
                    return from_message(message)
    return _BY_CODE.get(error.code(), ServerFault)(error.details() or error.code().name)
