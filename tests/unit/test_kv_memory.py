"""The table of docs/memory.md is what its command prints, and the command counts right."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from attnd_server.attention.geometry import Geometry
from benchmarks.kv_memory import MODELS, Layers, Model, table
from tests.servers import ROOT


def test_the_page_has_what_the_command_prints() -> None:
    (printed,) = re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/memory.md").read_text(), re.MULTILINE)
    command = [sys.executable, "-m", "benchmarks.kv_memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert printed == done.stdout == table() + "\n"


@pytest.mark.parametrize(
    ("name", "num_layers", "full"),
    [
        ("gpt-oss-20b", 24, range(1, 24, 2)),
        ("gpt-oss-120b", 36, range(1, 36, 2)),
        ("Gemma 3 4B", 34, [5, 11, 17, 23, 29]),
        ("Gemma 3 12B", 48, range(5, 48, 6)),
        ("Gemma 3 27B", 62, range(5, 60, 6)),
        ("Gemma 4 E2B", 15, [4, 9, 14]),
        ("Gemma 4 E4B", 24, [5, 11, 17, 23]),
        ("Gemma 4 26B-A4B", 30, range(5, 30, 6)),
        ("Gemma 4 31B", 60, range(5, 60, 6)),
    ],
)
def test_layers_alternate_as_in_the_model(name: str, num_layers: int, full: list[int]) -> None:
    (model,) = (model for model in MODELS if model.name == name)
    shape = model.shape(99, gives_back=True)
    assert shape.num_layers == num_layers
    assert [config.window for config in shape.groups] == [model.windowed.window, 0]
    assert list(shape.layers[1]) == list(full)


@pytest.mark.parametrize(
    ("num_tokens", "window", "pages"),
    [(1, 128, 1), (16, 128, 1), (17, 128, 2), (160, 128, 10), (161, 128, 10), (10**6, 128, 10), (10**6, 120, 10)],
)
def test_a_window_holds_its_pages_and_two_more(num_tokens: int, window: int, pages: int) -> None:
    assert Layers(1, 8, window).most_pages(num_tokens, gives_back=True) == pages
    assert Layers(1, 8, window).most_pages(num_tokens, gives_back=False) == -(-num_tokens // 16)
    assert Layers(1, 8).most_pages(num_tokens, gives_back=True) == -(-num_tokens // 16)


def test_bytes_are_those_of_caches() -> None:
    model = Model("small", Layers(2, 16, 32), Layers(3, 8), run=2, num_layers=4)
    kept, given_back = (model.shape(1600, gives_back=each).num_bytes for each in (False, True))
    assert kept == 3 * 1600 * 2 * 16 * 2 * 2 + 1600 * 3 * 8 * 2 * 2
    assert given_back == 3 * 4 * 16 * 2 * 16 * 2 * 2 + 1600 * 3 * 8 * 2 * 2
    whole = Geometry(num_layers=4, num_kv_heads=2, head_dim=16, num_pages=100)
    assert Model("alike", Layers(2, 16, 32), Layers(2, 16), 1, 4).shape(1600, gives_back=False).num_bytes == (
        whole.num_bytes
    )
    assert table([model], 1600).splitlines()[2] == (
        "| small | 3 x 2 x 16, window 32 | 1 x 3 x 8 | 0.00 GiB | 0.00 GiB | 23% |"
    )
