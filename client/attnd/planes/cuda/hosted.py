"""Resident steps whose metadata comes from the host, one at a time."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from attnd.errors import DeadlineExceeded
from attnd.planes.cuda.decode_numbers import DecodeNumbers
from attnd.planes.cuda.resident import ResidentSteps
from attnd.planes.cuda.resident_shape import ResidentShape, Session
from attnd.planes.cuda.staging import Staging

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not

# Seconds between two looks for a step whose layers are enqueued elsewhere, such as in a graph that is replayed.
_PERIOD_S = 0.0005


class HostedSteps(ResidentSteps):
    """Resident steps that a `CudaSession` begins by itself. Their layers are those of any `CudaStep`.

    Attributes:
        num_begun: steps of the plane up to now, the one that was begun last included.
    """

    _if_ready = True  # steps by message go on meanwhile

    def __init__(self, session: Session, plane: CudaPlane, shape: ResidentShape, num_done: int) -> None:
        """As `ResidentSteps`."""
        super().__init__(session, plane, shape, num_done)
        self.num_begun = num_done
        self._staging = Staging(self._lens, self._tables)
        on_gpu = plane.torch_device.type == "cuda"
        self._event = sys.modules["torch"].cuda.Event() if on_gpu else None
        self._is_marked = False

    def begin_with(self, numbers: DecodeNumbers) -> None:
        """Enqueues a step's metadata. Raises AttndError: the plane failed."""
        self._refuse_if_failed()
        with self._plane.stream() as stream:
            self._staging.send(numbers)
            self._enqueue(stream, numbers.num_reqs)
        self.num_begun += 1
        self._is_marked = False

    def mark(self) -> None:
        """Enqueues what says how the step went, behind its last layer; not in a graph that is captured."""
        if self._plane.is_capturing:
            return
        with self._plane.stream() as stream:
            self._fetch(stream)
            if self._event is not None:
                self._event.record()
        self._is_marked = True

    @property
    def is_known(self) -> bool:
        """Whether `finish_last` need not wait."""
        return self._is_marked and (self._event is None or bool(self._event.query()))

    def finish_last(self, *, resumes: bool) -> None:
        """Waits until the step is done that was begun last, whichever stream has its layers.

        Args:
            resumes: whether later ones are served again after one that was refused.

        Raises:
            AttndError: it was refused, the plane failed, or it took too long.
        """
        deadline = time.monotonic() + self._session.timeout_s
        while True:
            if not self._is_marked:
                self.mark()
            if self._event is not None:
                self._event.synchronize()
            self._refuse_if_failed()
            refused, self.num_done = self._told.tolist()
            if self.num_done >= self.num_begun:
                break
            if time.monotonic() > deadline:
                rule = "by the server, or by this worker"
                raise DeadlineExceeded(f"resident step {self.num_begun} was not done in time: {rule}")
            time.sleep(_PERIOD_S)
            self._is_marked = False
        self._count()
        if refused:
            raise self._refusal(resumes)
