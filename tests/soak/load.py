"""One client process: steps without end over a small cache, each answer and each stored slot checked."""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path

import numpy as np

import attnd
from tests.descriptors import open_links
from tests.soak.counts import Counts, Shared, now_ns
from tests.soak.used_cache import GEOMETRY, LAYERS, UsedCache

# Longer than any process is stopped for, so that a lease that ends is a fault.
TTL_S = 15.0
# Deadline of a request: shorter than a server is stopped for now and then, so that deadlines pass too.
TIMEOUT_S = 1.5
# How far an answer in float32 may be from one in float64, for numbers of order 1.
TOLERANCE = 2e-5


def run_client(address: str, token: str, plane: str, counts: Counts, shared: Shared, seed: int, log_path: str) -> None:
    """Runs until it is told to stop, through every restart of the server."""
    client = SoakClient(address, token, plane, counts, shared, seed)
    while not shared.stop:
        try:
            client.live()
        except (attnd.Disconnected, attnd.DeadlineExceeded):
            counts.reconnects += 1
            time.sleep(0.02)
        except Exception:
            counts.unexpected += 1
            with open(log_path, "a") as log:
                log.write(f"client {plane} {os.getpid()}:\n{traceback.format_exc()}\n")
            time.sleep(0.2)
    counts.leaks += num_left()


def num_left() -> int:
    """Shared regions that this process still has, mappings and descriptors."""
    left = Path("/proc/self/maps").read_text().count("memfd:attnd")
    return left + sum("memfd:attnd" in link for link in open_links(os.getpid()))


class SoakClient:
    """What one process does, and what it knows of its cache."""

    def __init__(self, address: str, token: str, plane: str, counts: Counts, shared: Shared, seed: int) -> None:
        """Connects to nothing yet."""
        self._address = address
        self._credentials = attnd.Credentials(token, tls=False)
        self._plane = plane
        self._counts = counts
        self._shared = shared
        self._numbers = np.random.default_rng(seed)
        self._random = random.Random(seed)
        self._status = 0, 0  # epoch, and calls that were served

    def live(self) -> None:
        """A connection and its caches, until it breaks or it is time to stop.

        Raises:
            Disconnected: the server is away.
        """
        with attnd.connect(
            self._address,
            plane=self._plane,
            timeout_s=TIMEOUT_S,
            connect_timeout_s=60,
            credentials=self._credentials,
        ) as client:
            while not self._shared.stop:
                life = self._shared.server_life
                with client.create_cache(**GEOMETRY, ttl_s=TTL_S, name=f"soak {os.getpid()}") as cache:
                    self._use(client, UsedCache(cache, self._numbers, life))

    def _use(self, client: attnd.Client, used: UsedCache) -> None:
        """Fills a cache and uses it for a while; a stream that breaks is opened again."""
        num_left = self._random.randint(1, 8)
        while num_left and not self._shared.stop:
            try:
                self._run_session(used)
                self._read_back(used)
                self._look_at_status(client)
                num_left -= 1
            except (attnd.Disconnected, attnd.DeadlineExceeded):
                self._counts.reconnects += 1
                time.sleep(0.02)  # a server that drains still answers
                client.capabilities()  # waits for it
            except attnd.CacheLost:
                if not self._adopt(used):
                    return

    def _look_at_status(self, client: attnd.Client) -> None:
        """What the server counts only rises, as long as it lives."""
        told = client.status()
        (own,) = told.principals
        if told.epoch == self._status[0] and own.served.calls < self._status[1]:
            self._counts.wrong_answers += 1
        self._status = told.epoch, own.served.calls

    def _run_session(self, used: UsedCache) -> None:
        with used.cache.session() as session:
            for _ in range(self._random.randint(5, 60)):
                if self._shared.stop:
                    return
                self._step(session, used)

    def _adopt(self, used: UsedCache) -> bool:
        """Goes on with a cache after a restart; all that was acknowledged is there. False: it is lost."""
        life = self._shared.server_life
        if self._shared.has_snapshots:
            try:
                used.cache.adopt()
            except attnd.CacheLost:
                pass
            else:
                used.life = life
                self._counts.adoptions += 1
                self._read_back(used)
                return True
        if self._shared.last_loss <= used.life:
            self._counts.caches_lost += 1
        return False

    def _step(self, session: attnd.Session, used: UsedCache) -> None:
        """A step, or the last one again if it was not done to its end."""
        planned = used.planned or used.plan(self._random)
        step = session.step(planned.metadata)
        for layer in range(LAYERS):
            q, k, v = planned.tensors[layer]
            output = step.attend(layer, q, k, v)
            self._counts.answers += 1
            if np.abs(output - used.expected(planned, layer)).max() < TOLERANCE:
                self._counts.last_ok_ns = now_ns()
            else:
                self._counts.wrong_answers += 1
            used.acknowledged(planned, layer)
        used.done()
        self._counts.steps += 1

    def _read_back(self, used: UsedCache) -> None:
        for layer in range(LAYERS):
            slots = used.slots_written(layer)
            if not slots:
                continue
            k, v = used.cache.read_kv(layer, slots, like=np.zeros(1, np.float32))
            same = (k == used.k[layer, slots]).all((1, 2)) & (v == used.v[layer, slots]).all((1, 2))
            self._counts.writes += len(slots)
            self._counts.lost_writes += int((~same).sum())
