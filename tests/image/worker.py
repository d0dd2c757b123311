"""A worker for a second container: `python worker.py ADDRESS CALLS`. It attends through shared memory and compares.

Prints "first" after the first call, and at the end how many were right. With CALLS 0 it goes on until the server ends,
and prints "disconnected" then.
"""

from __future__ import annotations

import sys
from itertools import count

import numpy as np

import attnd


def main(address: str, num_calls: int) -> None:
    """Attends to one token more and more often: its own value comes back."""
    query = np.ones((1, 2, 16), np.float32)
    step = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
    client = attnd.connect(address)
    cache = client.create_cache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=2, dtype="float32")
    done = 0
    try:
        with cache.session(plane="shm") as session:
            for value in range(1, num_calls + 1) if num_calls else count(1):
                output = session.step(step).attend(0, query, query, np.full_like(query, value))
                assert np.array_equal(output, np.full_like(query, value)), (value, output)
                done += 1
                if done == 1:
                    print("first", flush=True)
        print(f"{done} right through {session.plane}", flush=True)
    except attnd.Disconnected:
        print("disconnected", flush=True)
        raise SystemExit(3) from None
    finally:
        client.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
