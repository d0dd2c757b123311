"""Records the bytes of every RPC and of every kind of frame of a shm plane.

    PYTHONPATH=OLD/client:OLD/server python -m tests.record_wire tests/data/VERSION/wire

records those of the client and server of another checkout, OLD: nothing here uses more of them than their public names,
the options of `attnd serve`, and the messages of `attnd.v1`. `tests/e2e/test_recorded_wire.py` holds this checkout
against what was recorded of a release. A release's records change only if the calls that are made do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import ServerProcess
from tests.wire.calls import ask_with_wrong_ticket, make_calls
from tests.wire.grpc_proxy import Proxy, serving
from tests.wire.recording import Recording, write
from tests.wire.shm_relay import Relay

REGION_BYTES = 1 << 16


class Servers:
    """A server in a folder, and after a restart another that goes on with its caches."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sockets = folder / "s"
        self.start()

    def start(self) -> None:
        options = ["--device", "cpu", "--socket-dir", str(self.sockets), "--region-bytes", str(REGION_BYTES)]
        options += ["--snapshot-dir", str(self._folder / "snapshots"), "--restore"]
        self.process = ServerProcess(self._folder / "log", *options)
        (self.socket_path,) = self.sockets.glob("*.sock")

    def restart(self) -> None:
        self.process.stop()
        self.start()


@contextmanager
def running(folder: Path) -> Iterator[Servers]:
    """Servers that are ended."""
    servers = Servers(folder)
    try:
        yield servers
    finally:
        servers.process.stop()


def record() -> Recording:
    """Makes every call of a server of its own."""
    proxy = Proxy()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as servers:
        relay_folder = Path(folder) / "r"
        relay_folder.mkdir()
        relay = Relay(servers.socket_path, relay_folder)
        proxy.go_to(servers.process.address)

        def restart() -> None:
            servers.restart()
            proxy.go_to(servers.process.address)

        ask_with_wrong_ticket(relay_folder / servers.socket_path.name)
        with serving(proxy) as address:
            results = make_calls(address, relay_folder, restart)
        proxy.close()
        relay.close()
    return Recording(proxy.exchanges, relay.connections, results)


if __name__ == "__main__":
    write(record(), Path(sys.argv[1]))
