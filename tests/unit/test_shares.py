"""What one principal's RPCs hold is counted, and whoever is beyond it waits or is told to come again."""

from __future__ import annotations

import asyncio

import pytest

from attnd.errors import Exhausted
from attnd_server.config import ServerConfig
from attnd_server.rpc import shares
from attnd_server.rpc.reply_order import ReplyOrder
from attnd_server.rpc.shares import ANSWER_BYTES, FREE_ANSWER_BYTES, MAX_WAITING, MOST_ANSWER_BYTES, Share, Shares


def new_share() -> Share:
    return Share(ServerConfig(), num_checks=1, max_unary=3)


async def written(_: bytes) -> None:
    await asyncio.sleep(0)


def test_a_principal_has_one_share_for_as_long_as_somebody_has_it() -> None:
    async def test() -> None:
        table = Shares(ServerConfig(), 1, 3)
        share = table.of("a")
        assert table.of("a") is share
        assert table.of("b") is not share
        share.take_message(100 << 20)
        del share
        assert table.of("a").message_bytes == 0

    asyncio.run(test())


def test_streams_begin_answers_while_there_is_room() -> None:
    async def test() -> None:
        share = new_share()
        assert share.has_room(2 * MOST_ANSWER_BYTES, 0)  # alone
        share.answer_bytes = ANSWER_BYTES
        assert not share.has_room(1 << 20, of_stream=1 << 20)
        assert share.has_room(1 << 20, of_stream=0)
        share.answer_bytes = MOST_ANSWER_BYTES
        assert not share.has_room(1 << 20, of_stream=0)
        assert not share.has_room(1 << 20)
        assert share.has_room(FREE_ANSWER_BYTES, of_stream=0)
        assert not share.has_room(FREE_ANSWER_BYTES)

    asyncio.run(test())


def test_an_answer_that_waits_for_room_is_begun_once_another_was_written_or_given_up() -> None:
    async def test() -> None:
        share = new_share()
        first, second, third = (ReplyOrder(written, lambda _: b"", share) for _ in range(3))
        await first.room(MOST_ANSWER_BYTES)
        waiting = [asyncio.ensure_future(each.room(MOST_ANSWER_BYTES)) for each in (second, third)]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in waiting)
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(b"written")
        await first.put(answer, MOST_ANSWER_BYTES)
        await first.finish()
        await asyncio.sleep(0.01)
        assert [each.done() for each in waiting] == [True, False]
        second.close()
        await asyncio.wait_for(waiting[1], 10)
        third.close()
        assert share.answer_bytes == 0

    asyncio.run(test())


def test_rpcs_that_wait_are_few() -> None:
    async def test() -> None:
        share = new_share()
        share.take_message(1 << 30)
        waiting = [asyncio.ensure_future(share.until_it_reads_on()) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0.01)
        with pytest.raises(Exhausted, match=f"and {MAX_WAITING} RPCs wait until they are less"):
            await share.until_it_reads_on()
        share.give_back_message(1 << 30)
        await asyncio.wait_for(asyncio.gather(*waiting), 10)

    asyncio.run(test())


def test_unary_rpcs_count_until_their_answers_were_taken() -> None:
    async def test() -> None:
        share = new_share()
        for _ in range(3):
            share.begin_unary()
        with pytest.raises(Exhausted, match="3 RPCs of this principal are under way or were not read"):
            share.begin_unary()
        share.finish_unary(None)
        share.begin_unary()

    asyncio.run(test())


def test_small_messages_are_not_counted() -> None:
    async def test() -> None:
        share = new_share()
        assert share.take_message(shares.SMALL_BYTES) == 0
        with share.holding(shares.SMALL_BYTES + 1):
            assert share.message_bytes == shares.SMALL_BYTES + 1
        assert share.message_bytes == 0

    asyncio.run(test())
