"""One fault of each kind under load; `make soak` does it for ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.result import FAULTS
from tests.soak.supervisor import Soak


@pytest.mark.slow
def test_every_kind_of_fault_under_load_loses_nothing(tmp_path: Path) -> None:
    with Soak(tmp_path, num_clients=2, seed=1, longest_stop_s=0.2) as soak:
        for name in FAULTS:
            soak.inject(name)
        soak.finish(until_leases_end=False)
    result, log = soak.result, tmp_path / "clients.log"
    assert not log.exists(), log.read_text()
    assert result.server_faults == []
    assert result.faults == dict.fromkeys(FAULTS, 1)
    assert result.not_recovered == 0
    assert set(result.exit_codes) == {0}
    assert result.totals["answers"] > 20
    assert result.totals["writes"] > 20
    assert result.totals["adoptions"] > 0
    for name in ("wrong_answers", "lost_writes", "caches_lost", "unexpected", "leaks", "sockets_left"):
        assert result.totals[name] == 0, name
    assert result.after is not None
    assert result.after.regions == 0
