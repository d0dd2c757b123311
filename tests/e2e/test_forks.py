"""After a fork the child is told so at once, whatever it calls, and the parent goes on as if there were no child."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnd
from tests.dying import GEOMETRY
from tests.interrupted import ONE_TOKEN, some_v
from tests.servers import ROOT, ServerProcess

MADE = r"the (client|session) was made in another process, \d+; connect again after the fork"
# Seconds after which a child that hangs is killed, by a signal that it cannot hold.
HANGS_S = 30


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with shared memory."""
    folder = tmp_path_factory.mktemp("s")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder)) as server:
        yield server


def in_child(what: Callable[[], None]) -> None:
    """Does it in a fork of this process. Fails if it raises, or hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads, which is what is tested
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(HANGS_S)
            what()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refused(*calls: Callable[[], Any]) -> None:
    for call in calls:
        with pytest.raises(attnd.Disconnected, match=MADE):
            call()


def attends(step: attnd.Step) -> None:
    v = some_v()
    np.testing.assert_array_equal(step.attend(0, v, v, v), v)


@pytest.mark.parametrize("plane", ["inline", "shm", "inproc"])
def test_a_child_is_refused_at_once_and_the_parent_goes_on(both: ServerProcess, plane: str) -> None:
    inproc = plane == "inproc"
    address = "inproc://" if inproc else both.address
    with attnd.connect(address, plane="inline" if inproc else plane) as client:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        step = session.step(ONE_TOKEN)
        attends(step)
        v = some_v()
        pending = step.submit(1, v, v, v)

        def child() -> None:
            refused(
                lambda: session.step(ONE_TOKEN),
                lambda: attends(step),
                lambda: step.submit(0, v, v, v),
                pending.wait,
                cache.renew,
                cache.info,
                cache.delete,
                cache.written_pages,
                cache.adopt,
                lambda: cache.copy_pages([0], [1]),
                lambda: cache.store_kv(0, [0], v, v),
                lambda: cache.read_kv(0, [0], v),
                lambda: cache.warm_up(num_heads=2, max_reqs=1),
                lambda: cache.session().step(ONE_TOKEN),
                client.capabilities,
                client.list_caches,
                lambda: client.create_cache(**GEOMETRY),
                lambda: client.open_cache(cache.ref.id),
                lambda: client.prefill(cache, ONE_TOKEN, 0, v, v, v),
            )
            with client, cache, session:
                pass  # what ends at the end of a block ends nothing of the parent's
            session.close()
            client.close()

        in_child(child)
        np.testing.assert_array_equal(pending.wait(), v)
        attends(step)
        cache.delete()


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_what_a_child_lets_go_of_ends_nothing_of_the_parents(both: ServerProcess, plane: str) -> None:
    owned: list[Any] = []
    client = attnd.connect(both.address, plane=plane)
    owned += [client, client.create_cache(**GEOMETRY)]
    owned.append(owned[1].session())
    owned.append(owned[2].step(ONE_TOKEN))
    attends(owned[3])

    def child() -> None:
        nonlocal client
        del client
        owned.clear()
        gc.collect()

    in_child(child)
    attends(owned[3])
    owned[1].delete()
    client.close()


def test_a_child_connects_anew_and_has_what_the_parent_has(both: ServerProcess) -> None:
    with attnd.connect(both.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            attends(session.step(ONE_TOKEN))

            def child() -> None:
                with (
                    attnd.connect(both.address, plane="inline") as own,
                    own.create_cache(**GEOMETRY, ttl_s=1.0) as more,
                ):
                    with more.session() as its:
                        attends(its.step(ONE_TOKEN))
                        threading.Event().wait(2.5)  # longer than the lease: the child renews it
                        attends(its.step(ONE_TOKEN))
                    own.open_cache(cache.ref.id).renew()

            in_child(child)
            attends(session.step(ONE_TOKEN))


def test_a_fork_while_other_threads_are_in_calls(both: ServerProcess) -> None:
    """Whatever locks they hold, the child needs none of them."""
    with attnd.connect(both.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        stop = threading.Event()
        faults: list[BaseException] = []

        def load() -> None:
            try:
                with cache.session() as session:
                    while not stop.is_set():
                        attends(session.step(ONE_TOKEN))
                        cache.renew()
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        with cache.session() as session:
            step = session.step(ONE_TOKEN)
            attends(step)
            for _ in range(8):
                in_child(lambda: refused(cache.renew, lambda: attends(step), lambda: session.step(ONE_TOKEN)))
            stop.set()
            for thread in threads:
                thread.join()
            assert faults == []
            attends(step)


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_an_asyncio_client_in_a_child(both: ServerProcess, plane: str) -> None:
    async def parent() -> None:
        async with await attnd.aio.connect(both.address, plane=plane) as client:
            cache = await client.create_cache(**GEOMETRY)
            session = cache.session()
            step = await session.step(ONE_TOKEN)
            v = some_v()
            np.testing.assert_array_equal(await step.attend(0, v, v, v), v)

            def child() -> None:
                refused(
                    lambda: at_once(client.capabilities()),
                    lambda: at_once(cache.renew()),
                    lambda: at_once(cache.delete()),
                    lambda: at_once(cache.store_kv(0, [0], v, v)),
                    lambda: at_once(cache.read_kv(0, [0], v)),
                    lambda: at_once(session.step(ONE_TOKEN)),
                    lambda: at_once(step.attend(0, v, v, v)),
                )
                at_once(session.close())
                at_once(client.close())

            in_child(child)
            np.testing.assert_array_equal(await step.attend(1, v, v, v), v)
            await cache.delete()

    asyncio.run(parent())


def at_once(coroutine: Coroutine[Any, Any, object]) -> None:
    """Runs what must not wait: the child is inside the parent's loop still, as far as it knows."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        coroutine.close()
        pytest.fail("it waits")


PROGRAM = """
import multiprocessing, os, sys, threading
import attnd
from tests.dying import GEOMETRY
from tests.e2e.test_forks import attends, refused
from tests.interrupted import ONE_TOKEN

client = attnd.connect(sys.argv[1], plane=sys.argv[2])
cache = client.create_cache(**GEOMETRY)
session = cache.session()
attends(session.step(ONE_TOKEN))

def child():
    refused(cache.renew, lambda: session.step(ONE_TOKEN))

if sys.argv[3] == "multiprocessing":
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0, process.exitcode
else:
    if os.fork() == 0:
        child()
        sys.exit(0)  # with all that an interpreter does at its end
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
attends(session.step(ONE_TOKEN))
print("the parent goes on", flush=True)
"""


@pytest.mark.parametrize("way", ["multiprocessing", "exit"])
@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_child_ends_as_any_process(both: ServerProcess, tmp_path: Path, plane: str, way: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, both.address, plane, way]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
    assert (result.returncode, result.stdout) == (0, "the parent goes on\n"), result.stderr
    assert "Traceback" not in result.stderr  # gRPC's own words aside


def test_a_parents_cache_outlives_its_children(both: ServerProcess) -> None:
    """A child that ends takes no lease with it, and renews none."""
    with attnd.connect(both.address) as client, client.create_cache(**GEOMETRY, ttl_s=1.0) as cache:
        in_child(lambda: refused(cache.renew))
        threading.Event().wait(2.5)
        cache.renew()
