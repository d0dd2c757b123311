"""A client of generated stubs alone, as in a language for which there is no attnd: two steps on one Attend stream.

Start a server with `attnd serve`, then run `python examples/plain_grpc.py`, or name another address than localhost:7411
after it. It needs grpcio and protobuf; the stubs are those of `attnd.v1`, which protoc makes from protos/attnd/v1.
"""

from __future__ import annotations

import queue
import struct
import sys
from collections.abc import Sequence

import grpc

from attnd.v1 import attention_pb2, attention_pb2_grpc, cache_pb2, step_pb2, tensor_pb2

NUM_HEADS, HEAD_DIM, PAGE_SIZE = 1, 8, 16
PROMPT_LEN, FACTORS = 3, (0.31, 0.47, 0.73)  # of q, k and v


def ints(*values: int, shape: Sequence[int] = ()) -> tensor_pb2.Tensor:
    """A tensor of lengths, pages or slots."""
    data = struct.pack(f"<{len(values)}i", *values)
    return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=shape or [len(values)], data=data)


def numbers(start: int, num_tokens: int, factor: float) -> list[float]:
    """Some numbers in place of a model's."""
    first = start * NUM_HEADS * HEAD_DIM
    return [(index * factor) % 2.0 - 1.0 for index in range(first, first + num_tokens * NUM_HEADS * HEAD_DIM)]


def floats(values: list[float]) -> tensor_pb2.Tensor:
    """A tensor `[num_tokens, NUM_HEADS, HEAD_DIM]`."""
    shape = [len(values) // (NUM_HEADS * HEAD_DIM), NUM_HEADS, HEAD_DIM]
    return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape, data=struct.pack(f"<{len(values)}f", *values))


def main(address: str = "localhost:7411") -> None:
    """A prompt and one more token of one request, in page 2; prints the output of its last token."""
    config = cache_pb2.CacheConfig(
        num_layers=1,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        num_pages=4,
        dtype=tensor_pb2.DTYPE_FLOAT32,
    )
    requests: queue.SimpleQueue[attention_pb2.AttendRequest | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        stub = attention_pb2_grpc.AttentionServiceStub(channel)
        cache = stub.CreateCache(cache_pb2.CreateCacheRequest(config=config)).cache.cache
        replies = stub.Attend(iter(requests.get, None))
        for step_id, (start, num_tokens) in enumerate([(0, PROMPT_LEN), (PROMPT_LEN, 1)], 1):
            step = step_pb2.Step(
                id=step_id,
                cache=cache,
                kind=step_pb2.STEP_KIND_DECODE if start else step_pb2.STEP_KIND_PREFILL,
                mask=step_pb2.MASK_CAUSAL,
                cu_seqlens_q=ints(0, num_tokens),
                context_lens=ints(start),
                page_tables=ints(2, shape=[1, 1]),
                slot_mapping=ints(*range(2 * PAGE_SIZE + start, 2 * PAGE_SIZE + start + num_tokens)),
            )
            q, k, v = (floats(numbers(start, num_tokens, factor)) for factor in FACTORS)
            requests.put(attention_pb2.AttendRequest(step=step))
            requests.put(attention_pb2.AttendRequest(call=step_pb2.Call(step_id=step_id, layer=0, q=q, k=k, v=v)))
            _, answer = next(replies), next(replies)  # each message has one, in order
            if answer.HasField("error"):  # the call's own, or that of its step
                raise SystemExit(answer.error.message)
        requests.put(None)
        stub.DeleteCache(cache_pb2.DeleteCacheRequest(cache=cache))
    print(*(f"{value:.4f}" for value in struct.unpack(f"<{NUM_HEADS * HEAD_DIM}f", answer.call.output.data)))


if __name__ == "__main__":
    main(*sys.argv[1:])
