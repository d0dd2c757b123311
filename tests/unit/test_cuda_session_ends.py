"""Sessions on a cuda plane that are interrupted, forgotten, inherited, or used by two threads; without a GPU."""

from __future__ import annotations

import gc
import os
import threading
import traceback
import warnings
from typing import Any

import pytest

import attnd
from attnd.planes.cuda.plane import CudaPlane
from tests import host_channels
from tests.unit.test_cuda_session import (
    GEOMETRY,
    HEADS,
    _interpreted,
    metadata,
    new_tokens,
    one_step,
    opened,
    wait_until,
)

__all__ = ["_interpreted", "opened"]  # fixtures

Opened = tuple[attnd.Client, host_channels.HostPlanes]


def test_an_interrupt_in_a_hand_over_ends_the_plane_and_the_next_step_opens_another(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, planes = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        one_step(session)
        step = session.step(metadata(0, 1), num_heads=HEADS)
        step.attend(0, *new_tokens(1))
        with monkeypatch.context() as patch:

            def interrupted(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(type(session._plane), "hand_over", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step.attend(1, *new_tokens(1))
        with pytest.raises(attnd.Disconnected, match="a layer of the step was interrupted; open the step again"):
            step.finish()
        one_step(session)
        assert len(planes.channels) == 2


def test_an_interrupt_of_a_wait_leaves_nothing_locked(opened: Opened) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        step = session.step(metadata(0, 1), num_heads=HEADS)
        plane = session._plane
        assert plane is not None

        class Interrupted:
            """What stands for a queue in whose `get` Ctrl-C comes."""

            def get(self, timeout: float) -> None:
                raise KeyboardInterrupt

        news, plane._news = plane._news, Interrupted()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            step.finish()
        plane._news = news
        for layer in range(3):
            step.attend(layer, *new_tokens(1))
        step.finish()


def test_answers_that_nobody_waits_for_leave_nothing_behind(opened: Opened) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        one_step(session)
        plane = session._plane
        assert plane is not None
        for _ in range(5):
            step = session.step(metadata(0, 1), num_heads=HEADS)
            for layer in range(3):
                step.attend(layer, *new_tokens(1))
            assert wait_until(lambda step=step: step.id in plane._answers)  # the next step takes it without a wait
        assert plane._news.qsize() <= 1


def test_a_session_that_nobody_has_any_more_gives_its_plane_back(opened: Opened) -> None:
    client, planes = opened
    with client.create_cache(**GEOMETRY) as cache:
        session = cache.session(plane="cuda")
        one_step(session)
        del session
        gc.collect()
        assert wait_until(lambda: all(channel.is_closed for channel in planes.channels))
        assert wait_until(lambda: "attnd-cuda-plane" not in {thread.name for thread in threading.enumerate()})


def test_a_deleted_cache_ends_its_sessions(opened: Opened) -> None:
    client, planes = opened
    cache = client.create_cache(**GEOMETRY)
    session = cache.session(plane="cuda")
    one_step(session)
    cache.delete()
    assert wait_until(lambda: all(channel.is_closed for channel in planes.channels))
    with pytest.raises(attnd.AttndError):
        one_step(session)


def test_a_step_of_a_deleted_cache_says_that_it_is_lost(opened: Opened) -> None:
    client, _ = opened
    cache = client.create_cache(**GEOMETRY)
    step = cache.session(plane="cuda").step(metadata(0, 1), num_heads=HEADS)
    step.attend(0, *new_tokens(1))
    cache.delete()
    with pytest.raises(attnd.CacheLost, match="deleted"):
        step.attend(1, *new_tokens(1))
    with pytest.raises(attnd.CacheLost, match="deleted"):
        step.finish()


def test_two_threads_in_a_session_are_noticed(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        one_step(session)
        inside, go_on = threading.Event(), threading.Event()
        send = CudaPlane.send

        def slow(*arguments: Any) -> None:
            inside.set()
            assert go_on.wait(30)
            send(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(CudaPlane, "send", slow)
            thread = threading.Thread(target=one_step, args=(session,))
            thread.start()
            assert inside.wait(30)
            with pytest.raises(attnd.InvalidRequest, match="the session is in use by another thread"):
                session.step(metadata(0, 1), num_heads=HEADS)
            go_on.set()
            thread.join(30)
        one_step(session)


def test_a_forked_child_touches_nothing_of_the_gpu(opened: Opened) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        one_step(session)
        step = session.step(metadata(0, 1), num_heads=HEADS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for call in (
                    lambda: session.step(metadata(0, 1)),
                    lambda: step.attend(0, *new_tokens(1)),
                    step.finish,
                ):
                    with pytest.raises(attnd.Disconnected, match="another process"):
                        call()
                session.close()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for layer in range(3):
            step.attend(layer, *new_tokens(1))
        step.finish()
