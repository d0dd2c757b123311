"""Fixtures that every kind of test shares."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import attnd
from tests.servers import ServerProcess


def pytest_configure() -> None:
    """What is started in the background inherits that Ctrl-C is ignored, and so would all that the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """A kernel that a test imports where Triton does not interpret is of no use to those that have it interpreted."""
    if torch.cuda.is_available() or "triton" not in sys.modules:
        return
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("attnd_server.attention.kernels."):
            compiled = [each for each, value in vars(module).items() if isinstance(value, JITFunction)]
            if compiled and ".hopper." not in name:
                raise pytest.UsageError(f"{name} was imported outside of `tests.interpreter.interpreter()`: {compiled}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line a reason, not one for each place that skips: without a GPU those are hundreds."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        _, _, reason = report.longrepr
        reasons[reason.removeprefix("Skipped: ")] += 1
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"skipped {number}: {reason}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One real server for all tests that do it no harm."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "log") as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture(scope="session")
def server_address(server: ServerProcess) -> str:
    return server.address


@pytest.fixture
def client(server_address: str) -> Iterator[attnd.Client]:
    with attnd.connect(server_address) as connected:
        yield connected


@pytest.fixture(scope="session")
def _inproc() -> Iterator[attnd.Client]:
    with attnd.connect("inproc://") as connected:
        yield connected


@pytest.fixture(params=["grpc", "inproc"])
def any_client(request: pytest.FixtureRequest) -> attnd.Client:
    """A client of a real server, and one of a server in this process."""
    return request.getfixturevalue("client" if request.param == "grpc" else "_inproc")
