"""Calls of every RPC and with every kind of frame of a shm plane, by public names, and always with the same inputs."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

import attnd
from attnd.v1 import plane_pb2

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 8
GEOMETRY: dict[str, Any] = {
    "num_layers": 2,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_pages": 6,
    "page_size": 4,
}
OPTIONS = attnd.AttentionOptions(
    scale=0.5, softcap=30.0, window=3, alibi_slopes=[0.5, 0.25], sinks=[0.0, -1.0], return_lse=True, backend="naive"
)
# Two requests: one begins with 3 tokens, one goes on after 4 with 2.
PROMPTS = attnd.StepMetadata([3, 2], [0, 4], [[0, -1], [1, 2]], [0, 1, 2, 8, 9])
NEXT_TOKENS = attnd.StepMetadata([1, 1], [3, 6], [[0, -1], [1, 2]], [3, 10], kind="decode")
# Every field that a step can have, but those of the two kinds below.
DIFFUSION_BLOCKS = attnd.StepMetadata(
    [2, 2],
    [4, 7],
    [[0, 3], [1, 2]],
    [12, -1, 11, -1],
    kind="decode",
    mask=["block_causal", "prefix_full"],
    block_size=2,
    valid_lens=[2, 1],
    prefix_lens=[1, 2],
    padded_prefix_lens=[2, 4],
    mask_prefix_hole=True,
)
STORE_ONLY = attnd.StepMetadata([1, 1], [5, 8], [[0, 3], [1, 2]], torch.tensor([13, 16]), store_only=True)
CACHE_ONLY = attnd.StepMetadata([1, 1], [5, 8], [[0, 3], [1, 2]], cache_only=True)
NO_SUCH_PAGE = attnd.StepMetadata([1], [1], [[99]])
NO_SUCH_LAYER = 9

Results = dict[str, str]


def make_calls(address: str, socket_dir: Path, restart: Callable[[], None]) -> Results:
    """Makes them all.

    Args:
        address: of a server that has nothing yet.
        socket_dir: the folder of its sockets.
        restart: ends the server, and starts another that has restored its caches.

    Returns:
        What the client made of the answers, by what was called.
    """
    results: Results = {}
    with attnd.connect(address, plane="inline", socket_dir=str(socket_dir)) as client:
        results["capabilities"] = _told(client.capabilities())
        with client.create_cache(
            **GEOMETRY,
            head_dim_v=16,
            dtype="float16",
            layout="distinct",
            backend="sdpa",
            precision="fp32",
            kv_dtype="float8_e4m3fn",
            k_scales=0.5,
            v_scales=[2.0],
            kv_split=attnd.KVSplit(chunk_size=16, max_splits=4, batch_invariant=False),
            ttl_s=30.0,
            name="every field",
            renew=False,
        ) as cache:
            results["list_caches"] = " ".join(map(_told, client.list_caches()))
        cache = client.create_cache(**GEOMETRY, dtype="float32", backend="naive", name="recorded", renew=False)
        results["prefill"] = _told(client.prefill(cache, PROMPTS, 0, *_qkv(5)))
        results["prefill with options"] = _told(client.prefill(cache, PROMPTS, 1, *_qkv(5), OPTIONS))
        results["prefill refused"] = _refused(lambda: client.prefill(cache, PROMPTS, NO_SUCH_LAYER, *_qkv(5)))
        results["decode"] = _told(client.decode(cache, NEXT_TOKENS, 0, *_qkv(2)))
        results["decode with options"] = _told(client.decode(cache, NEXT_TOKENS, 1, *_qkv(2), OPTIONS))
        _use_pages(cache, results)
        with cache.session() as session:
            _attend_inline(session, results)
            results["timings"] = _timings(session)
        _open_planes(client, results)
        _ask_status(client)
        with cache.session(plane="shm") as session:
            _attend_shm(session, results)
            results["shm, timings"] = _timings(session)
        restart()
        results["renewed after restart"] = _refused(cache.info)
        results["adopted"] = _told(cache.adopt())
        results["read after restart"] = _told(cache.read_kv(0, [0, 8], torch.empty(0)))
        cache.delete()
        results["deleted twice"] = _refused(cache.delete)
    return results


def ask_with_wrong_ticket(path: Path) -> bytes:
    """What a server answers at the socket `path` to a ticket that it did not give."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(bytes(32))
        answer = b""
        while chunk := connection.recv(1 << 16):
            answer += chunk
    return answer


def _use_pages(cache: attnd.Cache, results: Results) -> None:
    _, k, v = _qkv(3)
    results["stored"] = str(cache.store_kv(1, [20, 21, 23], k, v))
    results["store refused"] = _refused(lambda: cache.store_kv(1, [20, 21, 24], k, v))
    results["read"] = _told(cache.read_kv(1, [23, 20], torch.empty(0)))
    cache.copy_pages([5, 0], [4, 3])
    results["info"] = _told(cache.info())
    results["written pages"] = str(cache.written_pages())
    warm_up = cache.warm_up(num_heads=HEADS, max_reqs=2, query_len=1, max_context_len=12, options=OPTIONS)
    results["warm-up"] = f"{warm_up.num_graphs} {warm_up.num_bytes} {warm_up.backend} {warm_up.reason}"


def _attend_inline(session: attnd.Session, results: Results) -> None:
    step = session.step(PROMPTS)
    results["prompts, layer 0"] = _told(step.attend(0, *_qkv(5)))
    results["prompts, layer 1"] = _told(step.attend(1, *_qkv(5), OPTIONS))
    results["no such layer"] = _refused(lambda: step.attend(NO_SUCH_LAYER, *_qkv(5)))
    step, other = session.step(NEXT_TOKENS), session.step(DIFFUSION_BLOCKS)  # whose page tables are told by deltas
    calls = step.submit(0, *_qkv(2)), other.submit(0, *_qkv(4), OPTIONS)
    results["next tokens"], results["diffusion blocks"] = (_told(call.wait()) for call in calls)
    _, k, v = _qkv(2)
    results["store only"] = _told(session.step(STORE_ONLY).attend(0, None, k, v))
    results["cache only"] = _told(session.step(CACHE_ONLY).attend(0, _qkv(2)[0], None, None))
    results["no such page"] = _refused(lambda: session.step(NO_SUCH_PAGE).attend(0, *_qkv(1)))


def _open_planes(client: attnd.Client, results: Results) -> None:
    """Sessions end a plane with its socket, so nothing of the client's public names sends ClosePlane."""
    request = plane_pb2.OpenPlaneRequest().SerializeToString()
    opened = plane_pb2.OpenPlaneResponse.FromString(client.transport.unary("OpenPlane", request, client.timeout_s))
    request = plane_pb2.ClosePlaneRequest(id=opened.id).SerializeToString()
    results["closed"] = client.transport.unary("ClosePlane", request, client.timeout_s).hex()
    results["closed twice"] = _refused(lambda: client.transport.unary("ClosePlane", request, client.timeout_s))


def _ask_status(client: attnd.Client) -> None:
    """What it says changes all the time. No server of 0.1.0 could be asked, so no recording of one has an answer."""
    try:
        client.transport.unary("GetStatus", b"", client.timeout_s)
    except attnd.AttndError:
        pass


def _attend_shm(session: attnd.Session, results: Results) -> None:
    step = session.step(NEXT_TOKENS)
    results["shm, layer 0"] = _told(step.attend(0, *_qkv(2)))
    results["shm, layer 1, repeated"] = _told(step.attend(1, *_qkv(2)))
    for name in ("in two lanes", "repeated in two lanes"):
        calls = [step.submit(layer, *_qkv(2)) for layer in (0, 1)]
        results[f"shm, {name}"] = " ".join(_told(call.wait()) for call in calls)
    results["shm, with options"] = _told(step.attend(1, *_qkv(2), OPTIONS))
    results["shm, with options, repeated"] = _told(step.attend(0, *_qkv(2), OPTIONS))
    results["shm, no such layer"] = _refused(lambda: step.attend(NO_SUCH_LAYER, *_qkv(2)))
    _, k, v = _qkv(2)
    results["shm, store only"] = _told(session.step(STORE_ONLY).attend(0, None, k, v))
    results["shm, no such page"] = _refused(lambda: session.step(NO_SUCH_PAGE).attend(0, *_qkv(1)))


def _qkv(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (num_tokens, HEADS, HEAD_DIM), (num_tokens, KV_HEADS, HEAD_DIM), (num_tokens, KV_HEADS, HEAD_DIM)
    q, k, v = (
        (torch.arange(math.prod(shape)).view(shape) * step % 17 - 8) / 8
        for step, shape in zip((3, 5, 7), shapes, strict=True)
    )
    return q, k, v


def _timings(session: attnd.Session) -> str:
    sums = session.timings()
    times = f"{sums.queue_us} + {sums.copy_in_us} + {sums.kernel_us} + {sums.copy_out_us} us"
    return f"{sums.num_calls} calls by {sums.backend}, {times}, {sums.bytes_sent} and {sums.bytes_received} bytes"


def _told(value: Any) -> str:
    """Every bit of what the client gave."""
    if isinstance(value, tuple):
        return " ".join(map(_told, value))
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} {value.numpy().tobytes().hex()}"
    return value.SerializeToString().hex() if isinstance(value, Message) else str(value)


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except attnd.AttndError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the server has refused nothing")
