"""Several calls of a session under way, on every plane: each gets what it would have got alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnd
from tests.servers import ServerProcess

GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "num_pages": 32, "page_size": 4, "dtype": "float32"}
LSE = attnd.AttentionOptions(window=3, return_lse=True)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("pipelining")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture(params=["inline", "shm", "inproc"])
def client(request: pytest.FixtureRequest, shm_server: ServerProcess) -> Iterator[attnd.Client]:
    if request.param == "inproc":
        yield request.getfixturevalue("_inproc")
    else:
        with attnd.connect(shm_server.address, plane=request.param, timeout_s=10) as connected:
            yield connected


def tensors(num_tokens: int) -> Tensors:
    return torch.randn(num_tokens, 6, 16), torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


def decode(half: int, position: int) -> attnd.StepMetadata:
    """One more token of each of two requests, whose pages are those of a half of the cache."""
    tables = [list(range(16 * half + 8 * request, 16 * half + 8 * request + 8)) for request in (0, 1)]
    slots = [4 * table[0] + position for table in tables]
    return attnd.StepMetadata([1, 1], [position, position], tables, slots, kind="decode")


def test_two_steps_interleaved_over_layers_give_the_bits_of_one_after_the_other(client: attnd.Client) -> None:
    calls = {(position, half, layer): tensors(2) for position in range(4) for half in (0, 1) for layer in range(3)}
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        alone = {}
        for position in range(4):
            for half in (0, 1):
                step = session.step(decode(half, position))
                for layer in range(3):
                    alone[position, half, layer] = step.attend(layer, *calls[position, half, layer])
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        outputs = {}
        for position in range(4):
            steps = [session.step(decode(half, position)) for half in (0, 1)]
            first = {half: steps[half].submit(0, *calls[position, half, 0]) for half in (0, 1)}
            for layer in range(3):
                for half in (0, 1):
                    outputs[position, half, layer] = first[half].wait()
                    if layer < 2:  # the other half's call is under way all the time
                        first[half] = steps[half].submit(layer + 1, *calls[position, half, layer + 1])
        assert session.timings().num_calls == len(outputs) == 24
    assert alone.keys() == outputs.keys()
    assert all(torch.equal(outputs[key], alone[key]) for key in alone)


def test_waits_may_come_in_any_order_and_again(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        # Of two sizes, with and without lse, so that places in a region differ.
        steps = [session.step(decode(0, 0)), session.step(attnd.StepMetadata([5], [0], [list(range(16, 24))]))]
        made = [
            (0, tensors(2), LSE),
            (1, tensors(5), LSE),
            (1, tensors(5), attnd.AttentionOptions()),
            (0, tensors(2), LSE),
        ]
        alone = [steps[which].attend(0, *inputs, options) for which, inputs, options in made]
        for order in ([3, 2, 1, 0], [1, 0, 3, 2], [0, 1, 2, 3]):
            pending = [steps[which].submit(0, *inputs, options) for which, inputs, options in made]
            outputs = {index: pending[index].wait() for index in order}
            for index, expected in enumerate(alone):
                for one, other in zip(flat(outputs[index]), flat(expected), strict=True):
                    assert torch.equal(one, other)
                assert pending[index].wait() is outputs[index]
        assert session.timings().num_calls == 4 + 3 * 4


def flat(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def test_inputs_may_be_overwritten_and_outputs_are_kept(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(attnd.StepMetadata([5], [0], [list(range(8))]))
        q, k, v = tensors(5)
        expected = [step.attend(layer, layer * q, k, v) for layer in range(3)]
        pending, scratch = [], torch.empty_like(q)
        for layer in range(3):
            scratch.copy_(layer * q)
            pending.append(step.submit(layer, scratch, k, v))
            scratch.fill_(torch.nan)
        outputs = [call.wait() for call in pending]
        step.attend(0, *tensors(5))
        assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("wrong_first", [True, False])
def test_an_error_reaches_its_own_wait_and_harms_no_other(client: attnd.Client, wrong_first: bool) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(decode(0, 0))
        inputs = tensors(2)
        expected = step.attend(0, *inputs)
        for _ in range(2):
            layers = (3, 0) if wrong_first else (0, 3)
            calls = {layer: step.submit(layer, *inputs) for layer in layers}
            for layer in reversed(layers):
                if layer == 3:
                    with pytest.raises(attnd.InvalidRequest, match=r"layer is 3, but the cache has layers 0\.\.2"):
                        calls[3].wait()
                else:
                    assert torch.equal(calls[0].wait(), expected)
        assert torch.equal(step.attend(1, *inputs), expected)


def test_a_refused_step_harms_no_other_that_is_under_way(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        inputs = tensors(2)
        expected = session.step(decode(0, 0)).attend(0, *inputs)
        sound = session.step(decode(0, 0))
        before = sound.submit(0, *inputs)
        refused = session.step(attnd.StepMetadata([2], [0], [[99]]))
        of_refused = refused.submit(0, *inputs)
        after = sound.submit(1, *inputs)
        assert torch.equal(after.wait(), expected)
        with pytest.raises(attnd.InvalidRequest, match=r"page_tables\[0, 0\] is 99"):
            of_refused.wait()
        with pytest.raises(attnd.InvalidRequest, match=r"page_tables\[0, 0\] is 99"):
            refused.submit(1, *inputs)
        assert torch.equal(before.wait(), expected)


def test_close_ends_calls_that_are_under_way(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(decode(0, 0))
        inputs = tensors(2)
        answered = step.submit(0, *inputs)
        expected = answered.wait()
        pending = [step.submit(layer, *inputs) for layer in (0, 1)]
        session.close()
        for call in pending:
            with pytest.raises(attnd.Disconnected, match="ended before the call was answered"):
                call.wait()
        assert answered.wait() is expected
        with pytest.raises(attnd.Disconnected, match="open the step again"):
            step.submit(2, *inputs)
        assert torch.equal(session.step(decode(0, 0)).submit(0, *inputs).wait(), expected)


def test_no_more_calls_than_the_limit_are_under_way(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        session.step(decode(0, 0))
        step = session.step(decode(0, 0))
        session.step(decode(1, 0))
        inputs = tensors(2)
        pending = [step.submit(0, *inputs) for _ in range(4)]
        with pytest.raises(attnd.Exhausted, match="4 calls of the session are under way, which is the limit; wait"):
            step.submit(0, *inputs)
        pending[0].wait()
        pending.append(step.submit(0, *inputs))
        assert all(torch.equal(call.wait(), pending[0].wait()) for call in pending)


def test_alternating_calls_stay_a_few_bytes_on_the_shm_plane(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            steps = [session.step(decode(half, 0)) for half in (0, 1)]
            inputs = [tensors(2) for _ in range(6)]
            expected = [steps[index % 2].attend(index // 2, *inputs[index]) for index in range(6)]
            pending = [steps[half].submit(0, *inputs[half]) for half in (0, 1)]  # the second lane's first call is whole
            sent, received = session.timings().bytes_sent, session.timings().bytes_received
            for index in range(6):
                assert torch.equal(pending[index % 2].wait(), expected[index])
                if index < 4:
                    following = index + 2
                    pending[index % 2] = steps[following % 2].submit(following // 2, *inputs[following])
            assert session.timings().bytes_sent - sent == 4 * 20
            # The second lane's first reply is whole.
            assert 5 * 32 < session.timings().bytes_received - received < 5 * 32 + 200


def test_a_region_too_small_for_two_calls_says_so(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--socket-dir", str(tmp_path / "sockets"), "--region-bytes", "4096")
    with ServerProcess(tmp_path / "log", *options) as server, attnd.connect(server.address, plane="shm") as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            step = session.step(attnd.StepMetadata([3], [0], [[0]]))
            inputs = tensors(3)  # 1152 bytes of q and of the output, 384 of each k and v
            expected = step.attend(0, *inputs)
            call = step.submit(0, *inputs)
            told = (
                r"call needs 3072 bytes of the plane's region of 4096, but calls under way have bytes 0\.\.3071: wait"
            )
            for _ in range(2):
                with pytest.raises(attnd.Exhausted, match=told):
                    step.submit(1, *inputs)
            small = session.step(attnd.StepMetadata([1], [0], [[0]]))  # 1024 bytes: just what is left
            beside = small.submit(0, *tensors(1))
            assert torch.equal(call.wait(), expected)
            assert torch.equal(step.submit(1, *inputs).wait(), expected)
            assert beside.wait().shape == (1, 6, 16)


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_wait_that_times_out_ends_all_calls_of_the_session(tmp_path: Path, plane: str) -> None:
    options = ("--device", "cpu", "--socket-dir", str(tmp_path / "sockets"))
    with ServerProcess(tmp_path / "log", *options) as server:
        with attnd.connect(server.address, timeout_s=1, plane=plane) as client:
            with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                inputs = tensors(2)
                step = session.step(decode(0, 0))
                expected = step.attend(0, *inputs)
                server.freeze()
                try:
                    pending = [step.submit(layer, *inputs) for layer in (0, 1)]
                    with pytest.raises(attnd.DeadlineExceeded, match="1 s"):
                        pending[1].wait()
                finally:
                    os.kill(server.pid, signal.SIGCONT)
                for call in pending:
                    with pytest.raises(attnd.Disconnected, match="ended before the call was answered"):
                        call.wait()
                assert torch.equal(session.step(decode(0, 0)).attend(0, *inputs), expected)


def test_two_tasks_interleave_two_steps_of_an_asyncio_session(shm_server: ServerProcess) -> None:
    inputs = {(half, position, layer): tensors(2) for half in (0, 1) for position in range(3) for layer in range(3)}
    with attnd.connect(shm_server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            expected = {}
            for half, position in ((half, position) for half in (0, 1) for position in range(3)):
                step = session.step(decode(half, position))
                for layer in range(3):
                    expected[half, position, layer] = step.attend(layer, *inputs[half, position, layer])

    async def worker(session: attnd.aio.AsyncSession, half: int) -> dict[tuple[int, int, int], torch.Tensor]:
        outputs = {}
        for position in range(3):
            step = await session.step(decode(half, position))
            for layer in range(3):
                outputs[half, position, layer] = await step.attend(layer, *inputs[half, position, layer])
            with pytest.raises(attnd.InvalidRequest, match="layer is 3"):
                await step.attend(3, *inputs[half, position, 0])
        return outputs

    async def run() -> dict[tuple[int, int, int], torch.Tensor]:
        async with await attnd.aio.connect(shm_server.address) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                halves = await asyncio.gather(*(worker(session, half) for half in (0, 1)))
        return {**halves[0], **halves[1]}

    outputs = asyncio.run(run())
    assert expected.keys() == outputs.keys()
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)
