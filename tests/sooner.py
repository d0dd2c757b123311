"""Kernels launched as the variant that compiles sooner, which stands in while they are not on the device yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def launched_sooner() -> Iterator[list[str]]:
    """Hopper's kernels that have a `sooner` are launched as that. Yields their names, once they are."""
    from attnd_server.attention.kernels.hopper import attention  # not on every GPU

    launch, names = attention.launch_kernel, list[str]()

    def launch_sooner(kernel: Any, *args: Any, sooner: Mapping[str, Any] | None = None, **options: Any) -> None:
        if sooner is not None:
            names.append(kernel.__name__)
        launch(kernel, *args, **{**options, **(sooner or {})})

    with mock.patch.object(attention, "launch_kernel", launch_sooner):
        yield names
