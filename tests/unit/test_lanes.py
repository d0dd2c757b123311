"""Where calls that are under way lie in a shm plane's region."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnd
from attnd.planes.shm.lanes import Lanes, PlacedCall
from attnd.protocol.shm.placed_tensors import INPUTS, PlacedTensors
from attnd.protocol.tensors import Array, to_array

NUM_BYTES = 1 << 16


def arrays(num_tokens: int) -> dict[str, Array]:
    """128 bytes of q for each token, and 64 of each k and v."""
    shapes = {"q": (num_tokens, 4, 8), "k": (num_tokens, 2, 8), "v": (num_tokens, 2, 8)}
    return {name: to_array(torch.zeros(shape), name) for name, shape in shapes.items()}


def send(lanes: Lanes, num_tokens: int, *, return_lse: bool = False) -> PlacedCall:
    options = bytes([num_tokens, return_lse])
    call = lanes.repeatable()
    if call is None or call.options != options:
        lane, place = lanes.place(arrays(num_tokens), return_lse=return_lse)
        call = PlacedCall(lane, options, PlacedTensors({}, INPUTS), place)
    lanes.sent(call)
    return call


def test_a_place_holds_the_tensors_and_the_reply() -> None:
    lanes = Lanes(NUM_BYTES, head_dim_v=16)
    assert send(lanes, 3).place == range(3 * (128 + 64 + 64 + 256))
    lse = send(lanes, 3, return_lse=True)
    assert (lse.lane, lse.place) == (1, range(1536, 1536 + 1536 + 64))  # 48 bytes of lse, and up to a multiple of 64


def test_calls_that_alternate_keep_lane_and_place() -> None:
    lanes = Lanes(NUM_BYTES, head_dim_v=8)
    pair = [send(lanes, 3), send(lanes, 5)]
    for index in range(6):
        assert lanes.oldest == index % 2
        assert lanes.answered() == index % 2
        assert send(lanes, (3, 5)[index % 2]) is pair[index % 2]


def test_steps_take_no_lane() -> None:
    lanes = Lanes(NUM_BYTES, head_dim_v=8)
    lanes.sent(None)
    assert send(lanes, 3).lane == 0
    assert (lanes.answered(), lanes.answered(), lanes.answered()) == (-1, 0, -1)


def test_a_call_that_is_alone_has_a_place_and_a_second_without_room_is_told() -> None:
    lanes = Lanes(1024, head_dim_v=8)
    lanes.sent(None)
    big = send(lanes, 100)
    assert big.place.start == 0
    with pytest.raises(
        attnd.Exhausted, match=r"call needs 384 bytes of the plane's region of 1024, .* 0\.\.38399: wait"
    ):
        send(lanes, 1)
    lanes.answered()
    lanes.answered()
    assert send(lanes, 1).place == range(384)


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 40), st.booleans())), max_size=60))
def test_calls_under_way_never_overlap_nor_share_a_lane(events: list[tuple[int, bool] | None]) -> None:
    lanes = Lanes(NUM_BYTES // 2, head_dim_v=8)
    under_way: list[PlacedCall] = []
    for event in events:
        if event is None or len(under_way) == 4:
            assert lanes.answered() == (under_way.pop(0).lane if under_way else -1)
            continue
        try:
            call = send(lanes, event[0], return_lse=event[1])
        except attnd.Exhausted:
            assert under_way
            continue
        assert call.place.stop <= NUM_BYTES // 2
        assert call.place.start % 64 == 0
        for other in under_way:
            assert call.lane != other.lane
            assert call.place.stop <= other.place.start or other.place.stop <= call.place.start
        under_way.append(call)


def test_whoever_finds_no_lane_is_told_to_wait() -> None:
    lanes = Lanes(NUM_BYTES, head_dim_v=8)
    for _ in range(4):
        send(lanes, 1)
    with pytest.raises(attnd.Exhausted, match="4 calls of the session are under way, which is the limit; wait for one"):
        send(lanes, 1)
    assert lanes.answered() == 0
    assert send(lanes, 1).lane == 0
