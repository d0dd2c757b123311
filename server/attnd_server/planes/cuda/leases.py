"""What sessions on cuda planes have beside memory: streams with their counters, and pages of the host's words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from attnd.protocol.cuda.layout import WORDS_BYTES
from attnd.protocol.shm import sockets

if TYPE_CHECKING:
    from attnd.protocol.cuda.driver import Device, Stream
    from attnd.protocol.cuda.gate_flags import Counter
    from attnd.protocol.cuda.host_flags import HostWords
    from attnd_server.planes.cuda.resident.books import Books


class StreamLease:
    """What sessions have one after the other.

    Attributes:
        stream: idle between sessions.
        counter: of the gates.
        books: of resident steps.
        copies: a stream for copies to the host, which all sessions have, and on which nothing ever waits.
    """

    def __init__(self, device: Device, stream: Stream, books: Books, copies: Stream) -> None:
        """The device must be the thread's current one."""
        from attnd.protocol.cuda import gate_flags as cuda_gates

        self.stream, self.books, self.copies = stream, books, copies
        self.counter: Counter = cuda_gates.Counter(device)


class SharedWords:
    """A page of words of the host, mapped here, and its descriptor for the worker.

    Attributes:
        words: here.
        descriptor: for the worker; -1 once it was taken.
    """

    def __init__(self) -> None:
        """Makes the page."""
        from attnd.protocol.cuda import host_flags as cuda_words

        self.descriptor = sockets.sealed_memory(WORDS_BYTES)
        try:
            self.words: HostWords = cuda_words.HostWords(sockets.map_memory(os.dup(self.descriptor), WORDS_BYTES))
        except BaseException:
            os.close(self.descriptor)
            raise

    def taken(self) -> int:
        """The descriptor, which is the caller's from now on. Once."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def close(self) -> None:
        """Nobody's stream may wait for a word. Waits for everything on the GPU."""
        self.words.close()
        if self.descriptor >= 0:
            os.close(self.taken())
