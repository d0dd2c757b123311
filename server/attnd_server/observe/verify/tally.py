"""What verification found about one backend."""

from __future__ import annotations

from attnd_server.observe.histogram import Histogram

# Upper bounds of the buckets of errors, as multiples of what is tolerated: beyond 1 a result is wrong.
RATIO_BOUNDS = tuple(2.0**exponent for exponent in range(-10, 5))
QUEUE_FULL, TOO_BIG, FAILED = DROP_REASONS = ("queue_full", "too_big", "failed")


class VerifyTally:
    """What verification found about one backend. One thread adds, any may read.

    Attributes:
        ratios: of each sample, its greatest error as a multiple of what is tolerated.
        mismatches: samples beyond that.
        not_finite: numbers of outputs that were NaN or infinite.
        beyond: rows of heads that were not compared, because float32 does not hold what they are computed with.
        dropped: samples that were not verified, by reason.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.ratios = Histogram(RATIO_BOUNDS)
        self.mismatches = 0
        self.not_finite = 0
        self.beyond = 0
        self.dropped = dict.fromkeys(DROP_REASONS, 0)
