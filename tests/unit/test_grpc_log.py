"""What of gRPC's own log an operator gets to read."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc
import pytest
from grpc._cython import cygrpc

from attnd_server.rpc.handlers import GRPC_LOGGER, is_worth_telling

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
