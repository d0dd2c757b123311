"""What a cache that was restored has from earlier lives of the server, and whether it is still so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Restored:
    """What a restored cache was in earlier lives of the server.

    Attributes:
        id: its id.
        epochs: those under which it was as it is; the last is that of the life that wrote the snapshot.
    """

    def __init__(self, cache_id: bytes, epochs: tuple[int, ...]) -> None:
        """It is to be filled."""
        self.id = cache_id
        self.epochs = epochs
        # Of each layer group the pages that it had then, while none of all has changed.
        self._pages: list[npt.NDArray[np.bool_]] | None = None

    @property
    def adoptable_epochs(self) -> tuple[int, ...]:
        """Under which it may be adopted: none once a page that it had then was stored into."""
        return () if self._pages is None else self.epochs

    def filled(self, pages: Sequence[npt.NDArray[np.bool_]]) -> None:
        """All that its snapshot has lies in the pages whose elements are true, an array for each layer group."""
        self._pages = [each.copy() for each in pages]

    def changed(self, group: int, pages: npt.NDArray[np.int64]) -> None:
        """Something is or was stored into these pages of a layer group. From any thread."""
        kept = self._pages
        if kept is not None and kept[group][pages].any():
            self._pages = None
