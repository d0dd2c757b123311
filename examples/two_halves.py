"""A worker that keeps two GPUs at work, its own and the server's: two sessions with half of its batch each.

While the server attends for one half, the worker computes the linear layers of the other. Each half has resident steps,
a stream, and a CUDA graph of a whole decode step, attention included. Both are under way at once, and each is begun
again as soon as its result is on the host. The order in which the halves get a GPU comes about by itself.

Run it with `python examples/two_halves.py`, or with the address of a server: `... two_halves.py localhost:7411`. It
needs `attnd[cuda]`, a GPU for the server and one for itself; see "Resident steps" in docs/planes.md. Where there are no
resident steps it says why, and decodes the same by ordinary steps, one after the other.

It pays with many requests and long contexts, as 64 x 8k on two H200s. With shorter ones, as 64 x 1k, it loses: each
half reads the weights of the linear layers, and to read them twice costs more than attention saves. "Two halves" in
docs/benchmarks.md has the tokens a second a GPU of both, and of one GPU that has the whole batch and its KV.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import attnd

# Resident steps have 16-bit types, and heads of 64, 128 or 256.
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, DTYPE = 4, 8, 2, 64, torch.float16
WIDTH = NUM_HEADS * HEAD_DIM
HALVES, NUM_STEPS = ([0, 1], [2, 3]), 20  # requests of each half of the batch
torch.manual_seed(1)
TO_QKV = torch.randn(NUM_LAYERS, WIDTH, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) * 0.5 * WIDTH**-0.5
FIRST_INPUTS = torch.randn(4, WIDTH)  # one token of each request
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def forward(hidden: torch.Tensor, to_qkv: torch.Tensor, attend: Attend) -> torch.Tensor:
    """A decode step of the model: of `[num_reqs, WIDTH]`, the next step's."""
    for layer in range(NUM_LAYERS):
        qkv = (hidden @ to_qkv[layer]).to(DTYPE).unflatten(1, (-1, HEAD_DIM))
        q, k, v = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), 1)
        hidden = hidden + attend(layer, q, k, v).flatten(1)
    return torch.tanh(hidden)


class Half:
    """One half of the batch. Its first step is done when it is made.

    Attributes:
        result: hidden states of the last step, on the host once `finish` has returned.
    """

    def __init__(self, session: attnd.CudaSession, half: list[int], tables: torch.Tensor, to_qkv: torch.Tensor) -> None:
        self._stream, self._graph, self._to_qkv = torch.cuda.Stream(), torch.cuda.CUDAGraph(), to_qkv
        self.result = torch.empty(len(half), WIDTH, pin_memory=True)
        with torch.cuda.stream(self._stream):  # tensors, too, are made in the order of the stream that uses them
            self._steps = session.resident(NUM_HEADS, max_reqs=len(half), max_pages=tables.shape[1])
            self._steps.page_tables.copy_(tables[half])  # and lengths are 0
            self._hidden = FIRST_INPUTS[half].cuda()
            self._step()  # kernels must have run once before a capture
            self.finish()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._step()

    def _step(self) -> None:
        """Enqueues a step, and what the next one needs: so one graph serves them all."""
        self._steps.begin(len(self._hidden))
        self._hidden.copy_(forward(self._hidden, self._to_qkv, self._steps.attend))
        self._steps.context_lens.add_(1)

    def start(self) -> None:
        """Enqueues a step by the graph, and the way of its result to the host."""
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            self.result.copy_(self._hidden, non_blocking=True)

    def finish(self) -> None:
        """Waits for what was enqueued. Raises AttndError: a step was refused, or failed."""
        with torch.cuda.stream(self._stream):
            self._steps.finish()


def decode_resident(cache: attnd.Cache, tables: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Last hidden states, and how many steps were resident. Raises Unsupported: none can be; it says why."""
    if not torch.cuda.is_available():
        raise attnd.Unsupported("this process has no GPU")
    torch.cuda.set_device(torch.cuda.device_count() - 1)  # the server has the first
    to_qkv = TO_QKV.cuda()  # for both halves
    with cache.session(plane="cuda") as one, cache.session(plane="cuda") as other:
        halves = [Half(one, HALVES[0], tables, to_qkv), Half(other, HALVES[1], tables, to_qkv)]
        for _ in range(NUM_STEPS - 1):
            for half in halves:
                half.finish()  # the other half goes on meanwhile; an engine would look at what was sampled now
                half.start()
        for half in halves:
            half.finish()
        return torch.cat([half.result for half in halves]), one.timings().resident + other.timings().resident


def decode_by_message(cache: attnd.Cache, tables: torch.Tensor) -> torch.Tensor:
    """Last hidden states, by ordinary steps of the whole batch, on the processor."""
    hidden, num_reqs, page_size = FIRST_INPUTS, len(FIRST_INPUTS), cache.config.page_size
    with cache.session() as session:
        for length in range(NUM_STEPS):
            slots = tables[:, length // page_size] * page_size + length % page_size
            metadata = attnd.StepMetadata([1] * num_reqs, [length] * num_reqs, tables, slots, kind="decode")
            hidden = forward(hidden, TO_QKV, session.step(metadata).attend)
    return hidden


def main(address: str = "inproc://") -> None:
    """Decodes, and prints the sum of each request's last hidden state, and how many steps were resident."""
    with (
        attnd.connect(address) as client,
        client.create_cache(
            num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, num_pages=8, dtype=DTYPE
        ) as cache,
    ):
        tables = torch.arange(8).view(4, 2)  # two pages of 16 tokens for each request: all that is decoded
        try:
            hidden, num_resident = decode_resident(cache, tables)
        except attnd.Unsupported as error:
            print(f"no resident steps: {error}")
            hidden, num_resident = decode_by_message(cache, tables), 0
    for request, row in enumerate(hidden):
        print(f"request {request}: {row.sum():.1f}")
    print(f"resident steps: {num_resident} of {len(HALVES) * NUM_STEPS}")


if __name__ == "__main__":
    main(*sys.argv[1:])
