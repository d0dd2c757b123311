"""Commands that change their own process before they become another program.

A `preexec_fn` would do it between fork and exec. There gRPC, if this process has a connection, goes on with its
threads, whose descriptors Python has closed: the child aborts now and then (grpc/grpc issue 43055).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def after(statements: str, command: Sequence[str]) -> list[str]:
    """`command`, run by a process that has executed these Python statements."""
    return [sys.executable, "-c", f"import os, sys; {statements}; os.execv(sys.argv[1], sys.argv[1:])", *command]
