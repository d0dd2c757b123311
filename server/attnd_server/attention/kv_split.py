"""How the KV of a request is cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnd_server.attention.geometry import KVSplitRule


@dataclass(frozen=True)
class KVSplitConfig(KVSplitRule):
    """How the KV of a request is cut into chunks, each of which gives a partial result that is merged afterwards.

    Attributes:
        chunk_size: tokens of KV in a chunk, a power of two in 16..1048576; 0 is automatic.
        max_splits: most chunks of a request, 1..1024; chunks are longer than `chunk_size` where there would be more.
        batch_invariant: cut by the request's own length alone, so that output bits never depend on what shares the
            batch; without it the cut follows the batch. None: with it for requests with one new token, without it for
            others, where it costs more (see docs/benchmarks.md).
    """

    def chunk_keys(self, num_keys: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Tokens of KV in a chunk of each request with `num_keys` of them; depends on nothing else of the batch."""
        if self.chunk_size:
            chunk = np.full_like(num_keys, self.chunk_size)
        else:
            chunk = _CHUNKS[np.searchsorted(_CHUNKED_LENGTHS, num_keys)]
        if (num_keys > chunk * self.max_splits).any():
            return np.maximum(chunk, power_of_two(-(-num_keys // self.max_splits)))
        return chunk


# Tokens of KV in a chunk of requests with at most so many tokens, and of longer ones. Short chunks fill a chip with one
# request, long ones cost less with many; from decode of 1, 8 and 64 requests with chunks of each size on an H200.
CHUNKED_LENGTHS = (2048, 4096, 16384, 32768, 65536)
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
_CHUNKED_LENGTHS = np.array(CHUNKED_LENGTHS)
_CHUNKS = np.array(CHUNKS, dtype=np.int32)


def power_of_two(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The least power of two that is not less than each value."""
    exponents = np.frexp(np.maximum(values - 1, 0).astype(np.float64))[1]
    return (1 << exponents).astype(np.int32)
