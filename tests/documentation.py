"""The pages that people read, and what tests look for in them."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.servers import ROOT

README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "benchmarks" / "README.md"]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code of a page, named `page`, that is the page's block number `number` of its language."""

    page: str
    number: int
    text: str

    def __str__(self) -> str:
        """As the name of a test."""
        return f"{self.page}-{self.number}"


def blocks(language: str) -> list[Block]:
    """All blocks of a language, of all pages. What shall not run is fenced as another one, such as "text"."""
    found = []
    for page in PAGES:
        texts = [text for given, text in _BLOCK.findall(page.read_text()) if given == language]
        found += [Block(str(page.relative_to(ROOT)), number, text) for number, text in enumerate(texts)]
    return found


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return _BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        repeated = (f"{slug}-{number}" for number in range(1, len(found) + 1))
        found.add(slug if slug not in found else next(each for each in repeated if each not in found))
    return found
