"""The house: no circle of imports, and rooms and files of a size that a stranger can read."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import grimp
import pytest

from tests.servers import ROOT

ROOTS = {"client": ROOT / "client" / "attnd", "server": ROOT / "server" / "attnd_server"}
MOST_MODULES, MOST_LINES, MOST_MEDIAN = 20, 300, 120


def modules(root: Path) -> list[Path]:
    """Files that people write."""
    return [path for path in sorted(root.rglob("*.py")) if "v1" not in path.relative_to(root).parts]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves, each circle once; `imports` says who imports whom."""
    found = []
    left = dict(imports)
    # Who imports nothing that is left, or is imported by nobody that is left, is in no circle.
    while True:
        imported = set().union(*left.values()) if left else set()
        open_ended = {name for name, others in left.items() if not others & left.keys() or name not in imported}
        if not open_ended:
            break
        left = {name: others - open_ended for name, others in left.items() if name not in open_ended}
    if left:
        found.append(sorted(left))
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("attnd", "attnd_server", exclude_type_checking_imports=False, cache_dir=None)
    assert len(graph.modules) > 200
    assert circles({name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}) == []


@pytest.mark.parametrize("side", ROOTS)
def test_no_folder_is_too_full(side: str) -> None:
    folders = Counter(path.parent for path in modules(ROOTS[side]))
    assert [f"{folder}: {number}" for folder, number in folders.items() if number > MOST_MODULES] == []


@pytest.mark.parametrize("side", ROOTS)
def test_files_have_one_idea_each(side: str) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in modules(ROOTS[side]) if path.name != "__init__.py"}
    long = {path: number for path, number in lines.items() if number > MOST_LINES and "kernels" not in path.parts}
    assert long == {}
    assert statistics.median(lines.values()) <= MOST_MEDIAN
