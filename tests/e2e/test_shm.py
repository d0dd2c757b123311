"""The shm plane through a real server: the same bits as inline, and nothing left behind by whoever is killed."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import attnd
from tests.servers import ServerProcess

GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "num_pages": 32, "page_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("shm")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


def tensors(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, 6, 16), torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


def test_auto_takes_shm_and_says_what_else_there_is_not(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            assert session.plane == ""
            session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")).attend(0, *tensors(1))
            assert session.plane == "shm"
            assert session.timings().plane == "shm"
            assert session.refusals == {"cuda": "the server's device is cpu, and it needs a GPU"}


def test_outputs_are_those_of_inline_bit_for_bit(shm_server: ServerProcess) -> None:
    options = [attnd.AttentionOptions(), attnd.AttentionOptions(window=3, return_lse=True)]
    with attnd.connect(shm_server.address) as client, ExitStack() as stack:
        caches = [client.create_cache(**GEOMETRY) for _ in range(2)]
        planes = zip(caches, ("inline", "shm"), strict=True)
        sessions = [stack.enter_context(cache.session(plane=plane)) for cache, plane in planes]
        kept = []
        context_len = 0
        for num_tokens in (7, 1, 1, 3, 1):
            slots = list(range(context_len, context_len + num_tokens))
            metadata = attnd.StepMetadata([num_tokens], [context_len], [list(range(8))], slots)
            steps = [session.step(metadata) for session in sessions]
            for layer, option in itertools.product(range(3), options):
                q, k, v = tensors(num_tokens)
                inline, shm = (step.attend(layer, q, k, v, option) for step in steps)
                for one, other in zip(*(each if option.return_lse else (each,) for each in (inline, shm)), strict=True):
                    assert torch.equal(one, other)
                    kept.append((one, other, one.clone()))
            context_len += num_tokens
        assert all(torch.equal(one, then) and torch.equal(other, then) for one, other, then in kept)


def decode_metadata(context_len: int) -> attnd.StepMetadata:
    return attnd.StepMetadata([1], [context_len], [list(range(8))], [context_len], kind="decode")


def test_store_only_and_cache_only_steps(shm_server: ServerProcess) -> None:
    slots = [0, 1, 2, 3]
    with attnd.connect(shm_server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            q, k, v = tensors(4)
            store = session.step(attnd.StepMetadata([4], [0], [[0]], slots, store_only=True))
            assert store.attend(0, None, k, v) is None
            assert torch.equal(cache.read_kv(0, slots, like=k)[0], k)
            read = session.step(attnd.StepMetadata([4], [4], [[0]], cache_only=True))
            output = read.attend(0, q, None, None)
        with cache.session(plane="inline") as inline:
            step = inline.step(attnd.StepMetadata([4], [4], [[0]], cache_only=True))
            assert torch.equal(output, step.attend(0, q, None, None))


def test_a_refused_step_or_call_is_told_and_the_session_goes_on(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            refused = session.step(attnd.StepMetadata([1], [0], [[99]], [0], kind="decode"))
            with pytest.raises(attnd.InvalidRequest, match="page_tables"):
                refused.attend(0, *tensors(1))
            step = session.step(decode_metadata(0))
            q, k, v = tensors(1)
            assert torch.equal(step.attend(0, q, k, v), v.repeat_interleave(3, 1))
            with pytest.raises(attnd.InvalidRequest, match=r"layer is 3, but the cache has layers 0\.\.2"):
                step.attend(3, q, k, v)  # like the last call but for the layer
            with pytest.raises(attnd.InvalidRequest, match=r"q has shape \[2, 6, 16\]"):
                step.attend(0, tensors(2)[0], k, v)
            with pytest.raises(attnd.InvalidRequest, match="q has dtype float16"):
                step.attend(0, q.half(), k.half(), v.half())
            assert torch.equal(step.attend(1, q, k, v), v.repeat_interleave(3, 1))
            # The same layer by layer, but of steps for which these tensors are wrong.
            two = session.step(attnd.StepMetadata([2], [0], [[0]], [0, 1]))
            with pytest.raises(attnd.InvalidRequest, match=r"q has shape \[1, 6, 16\], but must be \[2"):
                two.attend(0, q, k, v)
            cache_only = session.step(attnd.StepMetadata([1], [1], [[0]], cache_only=True))
            with pytest.raises(attnd.InvalidRequest, match="k is given, but must be absent in a cache-only step"):
                cache_only.attend(0, q, k, v)
            assert torch.equal(step.attend(2, q, k, v), v.repeat_interleave(3, 1))


def test_a_call_after_the_cache_has_gone_is_refused(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address, plane="shm") as client:
        cache = client.create_cache(**GEOMETRY)
        with cache.session() as session:
            step = session.step(decode_metadata(0))
            q, k, v = tensors(1)
            step.attend(0, q, k, v)
            cache.delete()
            with pytest.raises(attnd.CacheLost):
                step.attend(1, q, k, v)


def test_a_call_beyond_the_region_is_refused_on_either_side(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--socket-dir", str(tmp_path / "sockets"), "--region-bytes", "4096")
    with ServerProcess(tmp_path / "log", *options) as server, attnd.connect(server.address) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            step = session.step(attnd.StepMetadata([7], [0], [[0, 1]]))
            with pytest.raises(attnd.InvalidRequest, match=r"call has offset .* ends at byte 4096"):
                step.attend(0, *tensors(7))  # 2688 bytes of q, 896 of each k and v
            step = session.step(attnd.StepMetadata([5], [0], [[0, 1]]))
            with pytest.raises(attnd.InvalidRequest, match="reply has offset 3200 and needs 1920 bytes"):
                step.attend(0, *tensors(5))  # 1920 of q, 640 of each k and v; there is no room for the output
            q, k, v = tensors(1)
            assert torch.equal(session.step(decode_metadata(0)).attend(0, q, k, v), v.repeat_interleave(3, 1))


def test_a_pinned_plane_that_cannot_be_had_is_an_error_that_says_why(
    server: ServerProcess, shm_server: ServerProcess, tmp_path: Path
) -> None:
    with attnd.connect(server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
        with pytest.raises(attnd.Unsupported, match="plane is shm, but the server was started without --socket-dir"):
            cache.session().step(decode_metadata(0))
        with pytest.raises(attnd.InvalidRequest, match="plane is 'smh', but must be one of auto, inline, shm"):
            cache.session(plane="smh")
    with attnd.connect(shm_server.address, plane="shm", socket_dir=str(tmp_path)) as client:
        with client.create_cache(**GEOMETRY) as cache:
            with pytest.raises(attnd.Unsupported, match=f"socket {tmp_path}/.* cannot be reached: .*No such file"):
                cache.session().step(decode_metadata(0))
            with cache.session(plane="auto") as session:
                session.step(decode_metadata(0)).attend(0, *tensors(1))
                assert session.plane == "inline"
                assert "cannot be reached" in session.refusals["shm"]


def test_auto_without_a_socket_is_inline_with_the_reasons(any_client: attnd.Client) -> None:
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        session.step(decode_metadata(0)).attend(0, *tensors(1))
        assert session.plane == "inline"
        assert session.refusals["shm"] == "the server was started without --socket-dir"


def test_the_folder_may_lie_elsewhere_for_the_client(shm_server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "mounted").symlink_to(shm_server.log_path.parent / "sockets")
    with attnd.connect(shm_server.address, plane="shm", socket_dir=str(tmp_path / "mounted")) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            session.step(decode_metadata(0)).attend(0, *tensors(1))
            assert session.plane == "shm"


def test_whoever_scribbles_over_the_region_gets_wrong_numbers_and_harms_nobody(shm_server: ServerProcess) -> None:
    done = threading.Event()
    with attnd.connect(shm_server.address) as client:
        caches = [client.create_cache(**GEOMETRY) for _ in range(2)]
        with caches[0].session(plane="shm") as scribbler, caches[1].session(plane="shm") as other:
            step = scribbler.step(attnd.StepMetadata([32], [0], [list(range(8))], list(range(32))))
            step.attend(0, *tensors(32))
            memory = step.stream._region._bytes  # type: ignore[attr-defined]

            def scribble() -> None:
                while not done.is_set():
                    memory[: 1 << 16] = os.urandom(1 << 16)

            thread = threading.Thread(target=scribble)
            thread.start()
            try:
                for layer in range(30):
                    output = step.attend(layer % 3, *tensors(32))
                    assert output.shape == (32, 6, 16)
                    q, k, v = tensors(1)
                    assert torch.equal(other.step(decode_metadata(0)).attend(0, q, k, v), v.repeat_interleave(3, 1))
            finally:
                done.set()
                thread.join()
