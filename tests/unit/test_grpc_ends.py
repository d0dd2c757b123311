"""RPCs whose client has gone, or whose server has stopped, end in silence, in our log and in gRPC's own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from attnd_server.rpc.handlers import GONE, GRPC_LOGGER, is_worth_telling, reads_late

NO_STATUS = "Failed grpc_call_start_batch: 8 with grpc_ops (<SendStatusFromServerOperation object at 0x7f>,)"


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    log = logging.getLogger(GRPC_LOGGER)
    log.addFilter(is_worth_telling)
    yield log
    log.removeFilter(is_worth_telling)


def told(log: logging.Logger, caplog: pytest.LogCaptureFixture, error: Exception) -> int:
    """How many lines gRPC's own way of logging an error gives."""
    try:
        raise error
    except type(error):
        log.exception("Unexpected [%s] raised by servicer method [%s]", type(error).__name__, "/Attend")
    return len(caplog.records)


def test_a_status_that_nobody_waits_for_is_not_told(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    assert told(log, caplog, cygrpc.ExecuteBatchError(NO_STATUS)) == 0


@pytest.mark.parametrize(
    "error",
    [
        cygrpc.ExecuteBatchError("Failed: 8 with grpc_ops (<SendMessageOperation object at 0x7f>,)"),
        grpc.aio.InternalError(NO_STATUS),
        ValueError(NO_STATUS),
    ],
)
def test_what_else_fails_is_told(log: logging.Logger, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    assert told(log, caplog, error) == 1


def test_a_line_without_an_error_is_told(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    log.error("SendStatusFromServerOperation is what it sends")
    assert len(caplog.records) == 1


class Context:
    """gRPC's, of an RPC that is over."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def read(self) -> bytes:
        raise self.error

    async def write(self, _: bytes) -> None:
        raise self.error


async def read(context: Any) -> bytes:
    return await context.read()  # type: ignore[no-any-return]


async def no_request(_: Any) -> bytes:
    return b""


async def write(data: bytes, context: Any) -> None:
    await context.write(data)


@pytest.mark.parametrize("error", GONE)
@pytest.mark.parametrize("reading", [read, no_request])
@pytest.mark.parametrize("streams", [False, True])
def test_nobody_to_talk_to_ends_an_rpc_as_a_cancellation_does(error: Any, reading: Any, streams: bool) -> None:
    handler = reads_late(write, reading, streams=streams)
    method = handler.stream_stream if streams else handler.stream_unary
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(method(None, Context(error("Server already shutdown"))))


def test_our_own_faults_are_told() -> None:
    with pytest.raises(ValueError, match="ours"):
        asyncio.run(reads_late(write, read).stream_unary(None, Context(ValueError("ours"))))
