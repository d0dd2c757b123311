"""SECURITY.md, and the log of runs that it points to, name tests and commands that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
RUNS = (ROOT / "docs" / "security-runs.md").read_text()


def test_every_promise_names_tests_that_are_there() -> None:
    links = re.findall(r"\]\(([\w./-]+)\)", TEXT)
    assert [link for link in links if not (ROOT / link).exists()] == []
    section = TEXT.split("## What is promised", 1)[1].split("\n## ", 1)[0]
    promises = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(promises) > 10
    assert [line for line in promises if "(tests/" not in line] == []


def test_make_has_the_targets_that_it_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "docs/security-runs.md" in TEXT
    targets = set(re.findall(r"`make (\w+)`", TEXT + RUNS))
    assert targets >= {"fuzz", "soak"}
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
