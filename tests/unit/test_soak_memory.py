"""Whether a server's memory grows, told from samples among which are those of attacks."""

from __future__ import annotations

import pytest

from tests.soak.resources import lowest, slope_per_minute

# A sample a second for five minutes; every seventh one is taken amid an attack.
ATTACKED = [(float(second), 400.0 + (300.0 if second % 7 == 0 else 0.0)) for second in range(300)]


def test_attacks_are_no_growth() -> None:
    late = [(second, mib + (300.0 if second > 280 and second % 2 else 0.0)) for second, mib in ATTACKED]
    assert slope_per_minute(late) > 1
    assert slope_per_minute(lowest(late, 20)) == pytest.approx(0, abs=1e-9)


def test_what_is_never_given_back_is() -> None:
    leaking = [(second, mib + second / 60 * 2) for second, mib in ATTACKED]
    assert slope_per_minute(lowest(leaking, 20)) == pytest.approx(2, rel=0.1)


def test_stretches_have_one_sample_each() -> None:
    samples = [(5.0, 3.0), (6.0, 1.0), (14.9, 2.0), (15.0, 9.0), (35.0, 4.0)]
    assert lowest(samples, 10) == [(6.0, 1.0), (15.0, 9.0), (35.0, 4.0)]
    assert lowest([], 10) == []
