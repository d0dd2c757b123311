"""What is closed, deleted or gone leaves nothing behind; and what is used after that, elsewhere or by two, says so."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnd
from tests.dying import GEOMETRY
from tests.interrupted import ONE_TOKEN, some_v
from tests.servers import ROOT, ServerProcess, mapped, wait_for

PLANES = ("inline", "shm")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with shared memory."""
    folder = tmp_path_factory.mktemp("s")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder)) as server:
        yield server


def attends(step: attnd.Step) -> None:
    v = some_v()
    np.testing.assert_array_equal(step.attend(0, v, v, v), v)


def num_threads() -> int:
    """Of this process, gRPC's own but those of its pool aside: threads that Python knows."""
    return threading.active_count()


def settles(most: int) -> None:
    """There are no more threads than `most`, once those without a job have ended."""

    def is_so() -> bool:
        gc.collect()
        return num_threads() <= most

    wait_for(is_so, f"more than {most} threads: {threading.enumerate()}")


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("end", ["close", "delete", "garbage"])
def test_sessions_that_nobody_closes_leave_no_thread_and_no_memory(both: ServerProcess, plane: str, end: str) -> None:
    before, memory = num_threads(), mapped(os.getpid())
    kept: list[Any] = []
    for _ in range(10):
        client = attnd.connect(both.address, plane=plane)
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        attends(session.step(ONE_TOKEN))
        if end == "garbage":
            cache.delete()
            del client, cache, session
            continue
        kept.append((client, cache, session))
        if end == "delete":
            cache.delete()
            assert mapped(os.getpid()) == memory
        client.close()
    settles(before)
    wait_for(lambda: mapped(os.getpid()) == memory, "shared memory is kept")


def test_a_call_of_grpcs_goes_at_its_end_and_on_a_thread_of_its_own(both: ServerProcess) -> None:
    """Collected as garbage, it would take a lock of gRPC's in the caller's thread, even at the interpreter's end."""
    gone_on: queue.SimpleQueue[int] = queue.SimpleQueue()
    with attnd.connect(both.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        session = cache.session()
        step: Any = session.step(ONE_TOKEN)
        attends(step)
        watched = weakref.ref(step.stream._call._call, lambda _: gone_on.put(threading.get_ident()))
        gc.disable()
        try:
            session.close()
            assert gone_on.get(timeout=30) != threading.get_ident()
        finally:
            gc.enable()
        assert watched() is None


def test_an_inproc_server_goes_with_its_client() -> None:
    before = num_threads()
    for _ in range(5):
        client = attnd.connect("inproc://")
        cache = client.create_cache(**GEOMETRY)
        attends(cache.session().step(ONE_TOKEN))
        del client, cache
    settles(before)


@pytest.mark.parametrize("plane", PLANES)
def test_an_unclosed_session_goes_while_its_client_lives(both: ServerProcess, plane: str) -> None:
    with attnd.connect(both.address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        attends(cache.session().step(ONE_TOKEN))
        before, memory = num_threads(), mapped(os.getpid())
        for _ in range(20):
            attends(cache.session().step(ONE_TOKEN))
        settles(before)
        wait_for(lambda: mapped(os.getpid()) <= memory, "shared memory is kept")


@pytest.mark.parametrize("plane", PLANES)
def test_asyncio_sessions_that_nobody_closes_leave_no_task(both: ServerProcess, plane: str) -> None:
    async def run() -> None:
        async with await attnd.aio.connect(both.address, plane=plane) as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                v = some_v()
                before = len(asyncio.all_tasks())
                for _ in range(10):
                    step = await cache.session().step(ONE_TOKEN)
                    np.testing.assert_array_equal(await step.attend(0, v, v, v), v)
                del step
                for _ in range(200):
                    gc.collect()
                    await asyncio.sleep(0.05)
                    if len(asyncio.all_tasks()) <= before and mapped(os.getpid()) == 0:
                        return
                pytest.fail(f"{len(asyncio.all_tasks())} tasks, and {before} before")

    asyncio.run(run())


def closed_client(address: str, plane: str) -> tuple[Any, ...]:
    client = attnd.connect(address, plane=plane)
    cache = client.create_cache(**GEOMETRY)
    session = cache.session()
    step = session.step(ONE_TOKEN)
    attends(step)
    client.close()
    return client, cache, session, step


@pytest.mark.parametrize("plane", ["inline", "shm", "inproc"])
def test_calls_after_close_say_so(both: ServerProcess, plane: str) -> None:
    address = "inproc://" if plane == "inproc" else both.address
    client, cache, session, step = closed_client(address, "inline" if plane == "inproc" else plane)
    v = some_v()
    calls: list[Callable[[], Any]] = [
        client.capabilities,
        client.status,
        client.list_caches,
        lambda: client.create_cache(**GEOMETRY),
        lambda: client.open_cache(cache.ref.id),
        lambda: client.prefill(cache, ONE_TOKEN, 0, v, v, v),
        cache.info,
        cache.renew,
        cache.adopt,
        cache.delete,
        cache.written_pages,
        lambda: cache.copy_pages([0], [1]),
        lambda: cache.store_kv(0, [0], v, v),
        lambda: cache.read_kv(0, [0], v),
        lambda: cache.warm_up(num_heads=2, max_reqs=1),
        lambda: session.step(ONE_TOKEN),
        lambda: cache.session().step(ONE_TOKEN),
    ]
    for call in calls:
        with pytest.raises(attnd.Disconnected, match="the client was closed"):
            call()
    with pytest.raises(attnd.Disconnected, match="ended"):
        step.attend(0, v, v, v)
    assert session.timings().num_calls == 1
    session.close()
    client.close()
    with cache:
        pass  # which deletes nothing, and is fine


def test_asyncio_calls_after_close_say_so(both: ServerProcess) -> None:
    async def run() -> None:
        client = await attnd.aio.connect(both.address)
        cache = await client.create_cache(**GEOMETRY)
        sessions = [cache.session(plane=plane) for plane in PLANES]
        steps = [await session.step(ONE_TOKEN) for session in sessions]
        v = some_v()
        for step in steps:
            await step.attend(0, v, v, v)
        await client.close()
        calls: list[Callable[[], Any]] = [
            client.capabilities,
            client.status,
            client.list_caches,
            lambda: client.create_cache(**GEOMETRY),
            cache.info,
            cache.renew,
            cache.delete,
            lambda: cache.store_kv(0, [0], v, v),
            lambda: cache.read_kv(0, [0], v),
            *(lambda session=session: session.step(ONE_TOKEN) for session in sessions),
        ]
        for call in calls:
            with pytest.raises(attnd.Disconnected, match="the client was closed"):
                await call()
        for step in steps:
            with pytest.raises(attnd.Disconnected, match="ended"):
                await step.attend(0, v, v, v)
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("plane", PLANES)
def test_an_asyncio_object_in_another_loop_says_so(both: ServerProcess, plane: str) -> None:
    loops = [asyncio.new_event_loop() for _ in range(2)]
    v = some_v()

    async def made() -> tuple[Any, ...]:
        client = await attnd.aio.connect(both.address, plane=plane)
        cache = await client.create_cache(**GEOMETRY)
        session = cache.session()
        step = await session.step(ONE_TOKEN)
        await step.attend(0, v, v, v)
        return client, cache, session, step

    async def used(client: Any, cache: Any, session: Any, step: Any, state: str) -> None:
        for call in (
            client.capabilities,
            client.list_caches,
            lambda: client.create_cache(**GEOMETRY),
            cache.renew,
            cache.delete,
            lambda: cache.store_kv(0, [0], v, v),
            lambda: cache.read_kv(0, [0], v),
            lambda: session.step(ONE_TOKEN),
            lambda: step.attend(1, v, v, v),
            session.close,
            lambda: cache.session().step(ONE_TOKEN),
            client.close,
        ):
            with pytest.raises(attnd.InvalidRequest, match=f"belongs to an event loop that {state}"):
                await call()

    objects = loops[0].run_until_complete(made())
    loops[1].run_until_complete(used(*objects, "is not this one"))
    np.testing.assert_array_equal(loops[0].run_until_complete(objects[3].attend(1, v, v, v)), v)  # no harm was done
    loops[0].run_until_complete(objects[1].delete())
    loops[0].run_until_complete(objects[0].close())
    again = loops[0].run_until_complete(made())
    loops[0].run_until_complete(again[1].delete())
    for task in asyncio.all_tasks(loops[0]):
        task.cancel()
    loops[0].run_until_complete(asyncio.sleep(0.05))
    loops[0].close()
    loops[1].run_until_complete(used(*again, "has been closed"))
    loops[1].close()


@pytest.mark.parametrize("plane", PLANES)
def test_a_session_that_two_threads_use_says_so(both: ServerProcess, plane: str) -> None:
    """The second is refused at once while the first is inside, whose call is not harmed."""
    with attnd.connect(both.address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            step = session.step(ONE_TOKEN)
            attends(step)
            inside, go_on = threading.Event(), threading.Event()
            result: list[Any] = []

            make = step.stream.call_request

            def slow(*arguments: Any) -> bytes:
                inside.set()
                assert go_on.wait(30)
                return make(*arguments)

            v = some_v()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step.stream, "call_request", slow)
                thread = threading.Thread(target=lambda: result.append(step.attend(0, v, v, v)))
                thread.start()
                assert inside.wait(30)
            for call in (lambda: session.step(ONE_TOKEN), lambda: attends(step), lambda: step.submit(0, v, v, v)):
                with pytest.raises(attnd.InvalidRequest, match="the session is in use by another thread"):
                    call()
            go_on.set()
            thread.join(30)
            np.testing.assert_array_equal(result[0], v)
            attends(step)  # one after the other is fine


@pytest.mark.parametrize("plane", PLANES)
def test_closing_from_another_thread_ends_what_waits(both: ServerProcess, plane: str, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--socket-dir", str(tmp_path)) as server:
        client = attnd.connect(server.address, plane=plane, timeout_s=60)
        session = client.create_cache(**GEOMETRY).session()
        step = session.step(ONE_TOKEN)
        attends(step)
        server.freeze()
        told: list[BaseException] = []

        def wait() -> None:
            try:
                attends(step)
            except attnd.AttndError as error:
                told.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        wait_for(lambda: session._turn.is_anothers, "the thread does not begin")
        session.close()
        thread.join(30)
        assert [type(error) for error in told] == [attnd.Disconnected]
        server.kill()
        client.close()


PROGRAM = """
import sys
import attnd
from tests.dying import GEOMETRY
from tests.interrupted import ONE_TOKEN, some_v

client = attnd.connect(sys.argv[1], plane=sys.argv[2])
sessions = [client.create_cache(**GEOMETRY, ttl_s=5).session() for _ in range(3)]
steps = [session.step(ONE_TOKEN) for session in sessions]
v = some_v()
pending = [step.submit(0, v, v, v) for step in steps]
for call in pending[:2]:
    call.wait()
"""


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_an_interpreter_ends_silently_with_open_sessions(both: ServerProcess, plane: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-W", "default", "-c", PROGRAM, both.address, plane]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
