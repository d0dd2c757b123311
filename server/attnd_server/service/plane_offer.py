"""What the service needs to know of planes, which are built on top of it."""

from __future__ import annotations

from typing import Protocol

from attnd.v1 import plane_pb2

PlaneReasons = dict[plane_pb2.Plane.ValueType, str]
"""The planes that OpenPlane refuses, each with the reason for people."""


class PlaneOffer(Protocol):
    """Gives planes to clients."""

    def open(self, data: bytes, principal: str) -> bytes:
        """OpenPlane."""

    def close(self, data: bytes, principal: str) -> bytes:
        """ClosePlane."""

    def reasons(self) -> PlaneReasons:
        """Why planes are refused."""
