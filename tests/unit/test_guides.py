"""The guides for people who change attnd name files and targets that exist."""

from __future__ import annotations

import re

import pytest

from tests.servers import ROOT

GUIDES = (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md")
# Where a path in backticks may begin: docs/architecture.md says so.
ROOTS = (ROOT, ROOT / "server" / "attnd_server")
# What is made and not kept.
MADE = {"build/api/", "build/api", "dist/"}


def paths(text: str) -> list[str]:
    """What stands in backticks, outside of blocks, and looks like a path."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [span for span in spans if re.fullmatch(r"[\w./-]+/|[\w./-]+\.(py|proto|toml|md|txt|json|yaml)", span)]


def test_what_looks_like_a_path():
    text = "`a/b.py`, `a/`, `Makefile`, `x.y`, `1 / 2`, `make lint`\n```text\n`no/path.py`\n```\n`README.md`"
    assert paths(text) == ["a/b.py", "a/", "README.md"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_path_exists(guide):
    named = paths(guide.read_text())
    assert len(named) > 20
    missing = [path for path in named if path not in MADE and not any((root / path).exists() for root in ROOTS)]
    assert missing == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_link_leads_to_a_file(guide):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", guide.read_text())
    assert [link for link in links if not (guide.parent / link).exists()] == []


def test_architecture_is_one_page():
    assert len(GUIDES[0].read_text().splitlines()) <= 110


def test_every_folder_of_code_is_a_room_of_the_page():
    text = GUIDES[0].read_text()
    server = [folder for folder in (ROOT / "server" / "attnd_server").iterdir() if (folder / "__init__.py").exists()]
    client = [folder for folder in (ROOT / "client" / "attnd").iterdir() if (folder / "__init__.py").exists()]
    assert len(server) > 5
    assert len(client) > 3
    rooms = [f"| `{folder.name}/" for folder in server] + [f"| `client/attnd/{folder.name}/" for folder in client]
    assert [room for room in rooms if room not in text] == []
