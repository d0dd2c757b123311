"""What rows ask of states that stay here, and what a cache without any answers."""

from __future__ import annotations

from collections.abc import Sequence, Set


class States:
    """No states: all that there is lies on the server. `LocalStates` are some."""

    @property
    def numbers(self) -> Set[tuple[int, int]]:
        """Layer and number of each state."""
        return frozenset()

    def note(self, number: int) -> None:
        """A layer is about to read or change its states: keeps what they are, unless the pass under way has."""

    def commit(self) -> None:
        """The pass under way counts."""

    def take_back(self) -> None:
        """The pass under way never was. May be stopped, and done again."""

    def clear(self) -> None:
        """Forgets all of them; the next pass may have another number of rows."""

    def select(self, rows: Sequence[int]) -> None:
        """Makes row `rows[i]` row i."""

    def check_crop(self, num_removed: int, num_columns: int) -> None:
        """Raises Unsupported if the last `num_removed` tokens cannot be taken out, so that `num_columns` are left."""

    def crop(self, num_removed: int) -> None:
        """Takes out the last `num_removed` tokens; `check_crop` said that it can be done."""

    def copy_to(self, other: States) -> None:
        """Makes those of a fork the same."""
