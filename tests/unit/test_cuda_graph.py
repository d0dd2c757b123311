"""What capturing a graph does to the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from attnd_server.device.cuda_graph import _no_collection


@pytest.fixture(params=[True, False], ids=["collected", "not collected"])
def is_enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether garbage is collected before."""
    was_enabled = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if was_enabled else gc.disable)()


def test_no_garbage_is_collected_until_the_last_block_has_ended(is_enabled: bool) -> None:
    with _no_collection:
        with _no_collection:
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() == is_enabled


def test_it_is_collected_again_after_a_capture_that_failed(is_enabled: bool) -> None:
    with pytest.raises(RuntimeError), _no_collection:
        raise RuntimeError("not to be captured")
    assert gc.isenabled() == is_enabled
