"""The builder of the API reference refuses docstrings that are missing or name what is not there."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.servers import ROOT

doc = pytest.importorskip("pdoc.doc", reason="the API reference needs pdoc")

TEXT = '''
"""A module. See `Thing.number`, `Thing.method`, `make()` and `some_argument`."""

class Thing:
    """A thing.

    Attributes:
        number: of things.
    """

    def method(self):
        """Does something. May end like `ReadKv`.

        Raises:
            ValueError: always.
        """
'''


@pytest.fixture(scope="module")
def build_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(build_api, monkeypatch, text):
    module = ModuleType("attnd_things")
    monkeypatch.setitem(sys.modules, "attnd_things", module)
    monkeypatch.setattr(build_api, "PACKAGES", ("attnd", "attnd_things"))
    exec(text, vars(module))
    return list(build_api.faults([doc.Module(module)]))


def test_sound_docstrings_have_no_faults(build_api, monkeypatch):
    assert faults(build_api, monkeypatch, TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("`Thing.method`", "`Thing.methods`", "attnd_things names `Thing.methods`, which is not there"),
        ("`Thing.number`", "`Thing.numbers`", "attnd_things names `Thing.numbers`, which is not there"),
        ("`make()`", "`attnd.make()`", "attnd_things names `attnd.make`, which is not there"),
        ("`ReadKv`", "`ReadsKv`", "attnd_things.Thing.method names `ReadsKv`, which is not there"),
        ("ValueError:", "ValuesError:", "attnd_things.Thing.method raises ValuesError, which is not there"),
        ('class Thing:\n    """A thing.', 'class Thing:\n    _ = """A thing.', "attnd_things.Thing has no docstring"),
    ],
)
def test_a_fault_is_found(build_api, monkeypatch, old, new, fault):
    assert old in TEXT
    assert fault in faults(build_api, monkeypatch, TEXT.replace(old, new))
