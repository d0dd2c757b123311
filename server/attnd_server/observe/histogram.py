"""A histogram."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """How many values fell into each bucket, and their sum.

    Attributes:
        bounds: greatest value of each bucket but the last, which takes the rest.
        counts: values in each bucket.
        sum: of all values.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """Starts empty."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum: float = 0

    def observe(self, value: float) -> None:
        """Adds a value. One thread at a time."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
