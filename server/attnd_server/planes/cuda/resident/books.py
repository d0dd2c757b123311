"""Words of the host's by which a session's launches tell what they did, and are told to leave. No worker maps them."""

from __future__ import annotations

import mmap

# Of a session, 64 bits each: what the GPU writes, then what the host does.
LAUNCHES, BEGUN, DONE, REFUSED, BEGAN_NS, ENDED_NS, NUM_REQS, REVOKED = range(8)
_NUM_WORDS = 16
_WORD_BYTES = 8


class Books:
    """Those of one session.

    Attributes:
        address: of the first word, for GPUs.
    """

    def __init__(self, words: memoryview, address: int) -> None:
        """`words` are of 64 bits."""
        self._words = words
        self.address = address

    def read(self, word: int) -> int:
        """A word, as the processor sees it."""
        return int(self._words[word])

    def revoke(self, launch: int) -> None:
        """Lets launches up to this one leave, unless their step has come."""
        self._words[REVOKED] = launch

    def start(self, step: int) -> None:
        """As before the first launch, after so many steps; none may be queued."""
        for word in range(_NUM_WORDS):
            self._words[word] = step if word in (BEGUN, DONE) else 0


class BookPages:
    """The books of all sessions of a server: made once, because registering and freeing may wait for the whole GPU."""

    def __init__(self, count: int) -> None:
        """So many. The GPU must be the thread's current one."""
        from attnd.protocol.cuda.host_flags import HostWords

        num_bytes = _NUM_WORDS * _WORD_BYTES
        size = -(-count * num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size)
        self._words = HostWords(memory)
        view = memoryview(memory).cast("Q")
        self.books = [
            Books(view[index * _NUM_WORDS : (index + 1) * _NUM_WORDS], self._words.address + index * num_bytes)
            for index in range(count)
        ]
