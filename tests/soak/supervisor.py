"""Keeps a server and its clients running, and kills or stops one of them after the other."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import attnd
from attnd_server.identity.tokens import add_token
from benchmarks.attackers import ATTACKS
from tests.servers import ROOT, ServerProcess
from tests.soak.counts import Counts, new_counts, new_shared, now_ns
from tests.soak.load import TIMEOUT_S, TTL_S, run_client
from tests.soak.resources import Resources, resources, rss_mib
from tests.soak.result import FAULTS, Result

DEADLY_TO_SERVER = ("server SIGKILL", "server SIGTERM")
# Seconds after which somebody who has not recovered never will.
RECOVERY_LIMIT_S = 60.0
# Shortest and longest attack, in seconds.
ATTACK_S = 0.5, 2.0
# Longest stop, in seconds: longer than a request's deadline, shorter than a lease.
LONGEST_STOP_S = 2 * TIMEOUT_S


class Soak:
    """A server, its clients, and what is done to them. Use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        num_clients: int,
        seed: int,
        snapshots: bool = True,
        longest_stop_s: float = LONGEST_STOP_S,
    ) -> None:
        """Starts nothing.

        Args:
            folder: for logs and the socket.
            num_clients: every other one uses shared memory.
            seed: of the order of faults and of what the clients send.
            snapshots: whether servers write their caches to files at SIGTERM and restore them.
            longest_stop_s: of SIGSTOP.
        """
        self.result = Result()
        self._longest_stop_s = longest_stop_s
        self._folder, self._sockets = folder, folder / "sockets"
        self._options = ("--device", "cpu", "--threads", "1", "--socket-dir", str(self._sockets), "--drain-s", "2")
        self._options += ("--region-bytes", str(4 << 20), "--kv-bytes", str(1 << 28))
        tokens = str(folder / "tokens")
        self._token, self._attackers_token = (add_token(tokens, name) for name in ("soak", "attacker"))
        self._options += ("--tokens", tokens)
        if snapshots:
            self._options += ("--snapshot-dir", str(folder / "snapshots"), "--restore")
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.soak.load"])
        self._counts: list[Counts] = [new_counts() for _ in range(num_clients)]
        self._clients: list[ForkServerProcess] = []
        self._shared = new_shared()
        self._shared.has_snapshots = snapshots
        self._num_started = 0

    def __enter__(self) -> Soak:
        """Starts the server and the clients, and waits until each had an answer."""
        self._server = ServerProcess(self._folder / "server.log", *self._options)
        self._port = self._server.port
        self.start_clients()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends them, however far they are."""
        for client in self._clients:
            client.kill()
            client.join()
        self._server.stop()

    # --- clients -----------------------------------------------------------------------------------------------

    def start_clients(self) -> None:
        """Starts every client, and waits until each had a right answer."""
        self._shared.stop = 0
        since = now_ns()
        self._clients = [self._start_client(index) for index in range(len(self._counts))]
        self._wait_for_answers(since)

    def _start_client(self, index: int) -> ForkServerProcess:
        self._num_started += 1
        plane = "shm" if index % 2 else "inline"
        log = str(self._folder / "clients.log")
        seed = self._num_started
        arguments = (self._server.address, self._token, plane, self._counts[index], self._shared, seed, log)
        client = self._context.Process(target=run_client, args=arguments, daemon=True)
        client.start()
        return client

    def stop_clients(self) -> None:
        """Has the clients end in good order."""
        self._shared.stop = 1
        for client in self._clients:
            client.join(30)
            if client.exitcode != 0:
                self.result.totals["unexpected"] += 1
        self._clients = []

    def _wait_for_answers(self, since_ns: int) -> bool:
        """Waits until every client had a right answer after `since_ns`; False: one had none in time."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        while time.monotonic() < deadline:
            if all(counts.last_ok_ns > since_ns for counts in self._counts):
                return True
            time.sleep(0.002)
        return False

    # --- faults ------------------------------------------------------------------------------------------------

    def run(self, seconds: float, num_kills: int, server_dies: bool, told: Callable[[], None]) -> None:
        """Injects faults for so long, and until there were so many kills in all."""
        names = [name for name in FAULTS if server_dies or name not in DEADLY_TO_SERVER]
        weights = [FAULTS[name] for name in names]
        until = time.monotonic() + seconds
        while time.monotonic() < until or self.result.num_kills < num_kills:
            self.inject(self._random.choices(names, weights)[0])
            if not server_dies:
                self.result.rss.append((time.monotonic(), rss_mib(self._server.pid)))
            told()
            time.sleep(self._random.expovariate(1 / 0.4))

    def inject(self, name: str) -> None:
        """One fault, and waits until everybody has recovered from it."""
        target, _, what = name.partition(" ")
        number = signal.Signals[what] if target != "attack" else None
        index = self._random.randrange(len(self._clients))
        started = time.monotonic()
        if number is None:
            started = self._attack(what, self._random.uniform(*ATTACK_S))
        elif target == "client" and number != signal.SIGSTOP:
            client = self._clients[index]
            os.kill(client.pid or 0, number)
            client.join()
            self._clients[index] = self._start_client(index)
        elif target == "client":
            started = self._stop_for_a_while(self._clients[index].pid or 0)
        elif number == signal.SIGSTOP:
            started = self._stop_for_a_while(self._server.pid)
        else:
            self._restart_server(number)
        ready = time.monotonic()
        has_recovered = self._wait_for_answers(time.monotonic_ns())
        now = time.monotonic()
        self.result.faults[name] += 1
        self.result.not_recovered += not has_recovered
        self.result.recovery_s.setdefault(name, []).append(now - started)
        if name in DEADLY_TO_SERVER:
            self.result.reconnect_s.append(now - ready)

    def _stop_for_a_while(self, pid: int) -> float:
        """Returns when it went on."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(0.1, self._longest_stop_s))
        os.kill(pid, signal.SIGCONT)
        return time.monotonic()

    def _attack(self, name: str, seconds: float) -> float:
        """Lets another principal do its worst for so long. Returns when it was over."""
        command = [sys.executable, "-m", "benchmarks.attackers", self._server.address, name]
        attacker = subprocess.Popen(
            [*command, "--token", self._attackers_token],
            cwd=ROOT,
            env=ServerProcess.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        with attacker:
            assert attacker.stdout is not None
            if attacker.stdout.readline() != "ready\n":
                raise RuntimeError(f"the attack {name} ended with {attacker.wait()} before it began")
            time.sleep(seconds)
            attacker.terminate()
            attacker.communicate(timeout=60)  # it says what came of it
        return time.monotonic()

    def _restart_server(self, number: signal.Signals) -> None:
        self._shared.server_life += 1
        if number == signal.SIGKILL or not self._shared.has_snapshots:
            self._shared.last_loss = self._shared.server_life
        if number == signal.SIGKILL:
            self._server.kill()
        else:
            self._server.terminate()
            self.result.exit_codes[self._server.wait(60)] += 1
        self._server.stop()
        self._server = ServerProcess(self._folder / "server.log", *self._options, port=self._port)

    # --- what stays behind -------------------------------------------------------------------------------------

    def renew_server(self) -> None:
        """Restarts the server, lets each client and each attack run for a moment, and notes what it holds at rest."""
        self.stop_clients()
        self._restart_server(signal.SIGTERM)
        for _ in range(2):  # gRPC's threads come with the load
            self.start_clients()
            time.sleep(2)
            self.stop_clients()
        for name in ATTACKS:  # what a process has had from the system it keeps
            self._attack(name, ATTACK_S[1])
        self.result.before = self._at_rest()
        self.start_clients()

    def finish(self, until_leases_end: bool = True) -> None:
        """Ends the clients, waits until the leases of those that were killed have ended, and looks what is left."""
        self.stop_clients()
        if until_leases_end:
            self._wait_for_leases()
        self.result.after = self._at_rest()
        self._server.terminate()
        self.result.exit_codes[self._server.wait(60)] += 1
        self._sum_up()

    def _wait_for_leases(self) -> None:
        with attnd.connect(self._server.address, credentials=attnd.Credentials(self._token, tls=False)) as client:
            deadline = time.monotonic() + TTL_S + 10
            while client.list_caches() and time.monotonic() < deadline:
                time.sleep(0.2)
            self.result.caches_left = len(client.list_caches())

    def _sum_up(self) -> None:
        self.result.totals["sockets_left"] += len(list(self._sockets.iterdir()))
        log = (self._folder / "server.log").read_text().splitlines()
        self.result.server_faults = [line for line in log if "internal error" in line or "Traceback" in line]
        for counts in self._counts:
            for name, _ in counts._fields_:
                if name != "last_ok_ns":
                    self.result.totals[name] += getattr(counts, name)

    def _at_rest(self) -> Resources:
        """What the server holds when it holds least within some seconds."""
        found = []
        for _ in range(5):
            time.sleep(0.3)
            found.append(resources(self._server.pid, self._sockets))
        return min(found, key=lambda held: (held.regions, held.descriptors, held.threads))
