"""Messages made by hand for a cache with four layer groups, and how they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnd.errors import AttndError, ServerFault
from attnd.v1 import attention_pb2, step_pb2
from tests.fuzz.pool import Pool
from tests.fuzz.tensors import ints
from tests.fuzz.world import CALLER, World


def hybrid(world: World) -> Pool:
    """The caller's cache with four groups.

    Layers 0 and 2 have 6 pages of 4 tokens; 1 has 5 and a window of 5; 3 is latent, with 9 pages of 2; 4 has 7 of 4.
    """
    return next(pool for pool in world.own if len(pool.groups) == 4)


def step(pool: Pool, step_id: int = 1) -> step_pb2.Step:
    """One request with 6 tokens of context and 1 new one."""
    message = step_pb2.Step(
        id=step_id,
        cache=pool.info.cache,
        kind=step_pb2.STEP_KIND_PREFILL,
        cu_seqlens_q=ints([0, 1]),
        context_lens=ints([6]),
        mask=step_pb2.MASK_CAUSAL,
    )
    for table, slot in (([1, 2], 10), ([3, 4], 18), ([0, 1, 2, 3], 6), ([5, 6], 26)):
        message.groups.add(page_tables=ints(table, 1, len(table)), slot_mapping=ints([slot]))
    return message


class Stream:
    """A stream of the caller."""

    def __init__(self, world: World) -> None:
        self.session = world.service.open_session(CALLER)

    def step(self, message: step_pb2.Step) -> None:
        self.session.request(attention_pb2.AttendRequest(step=message).SerializeToString())

    def call(self, message: step_pb2.Call) -> Any:
        return self.session.request(attention_pb2.AttendRequest(call=message).SerializeToString())


def verdict(world: World, send: Callable[[], object]) -> AttndError:
    """How something was refused: by a rule, before a byte changed."""
    with pytest.raises(AttndError) as caught:
        send()
    assert not isinstance(caught.value, ServerFault)
    world.check("a hostile message")
    return caught.value
