"""The tests of client and server."""

from tests import interpreter  # noqa: F401  before anything imports triton: see there
