"""Which plane a session gets: what was asked for, and why it is no better one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

from attnd.errors import AttndError, Exhausted, InvalidRequest, PermissionDenied, Unsupported
from attnd.protocol import frames
from attnd.v1 import capabilities_pb2, plane_pb2

PLANES = ("auto", "inline", "shm", "cuda")


class PlaneOptions(NamedTuple):
    """What is asked for.

    Attributes:
        name: "inline", "shm", "cuda", or "auto" for the better of the first two that can be had.
        socket_dir: the folder of the server's sockets as this process sees it; "": as the server does.
    """

    name: str = "auto"
    socket_dir: str = ""


def check_plane(name: str) -> str:
    """`name`, if it can be asked for. Raises InvalidRequest if it cannot."""
    if name not in PLANES:
        raise InvalidRequest(f"plane is {name!r}, but must be one of {', '.join(PLANES)}", field="plane")
    return name


def plane_refusals(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> dict[str, str]:
    """By the name of each plane that is better than inline, why a server does not give it; those that it gives not."""
    refusals = dict.fromkeys(("shm", "cuda"), "the server does not know it")
    for state in capabilities.planes:
        name = _short(state.plane)
        if state.available:
            refusals.pop(name, None)
        elif name in refusals:
            refusals[name] = state.reason
    return refusals


# What says that a plane is not to be had, while the server is there.
REFUSALS = (Unsupported, PermissionDenied, Exhausted)


def inline_refusals(wanted: PlaneOptions, refused: Mapping[str, str]) -> Mapping[str, str] | None:
    """Why each better plane is not given, if the stream is inline anyway; None: shm is to be tried.

    Args:
        wanted: what is asked for.
        refused: `plane_refusals` of the server.
    """
    if wanted.name == "inline":
        return {}
    return _with_cuda(refused) if wanted.name == "auto" and "shm" in refused else None


def open_shm_request() -> bytes:
    """The request of OpenPlane for a shm plane. Raises Unsupported where there is none."""
    if sys.platform != "linux":
        raise Unsupported(f"plane is shm, but this process runs on {sys.platform}, and it needs Linux", field="plane")
    return plane_pb2.OpenPlaneRequest(plane=plane_pb2.PLANE_SHM).SerializeToString()


def opened_shm(data: bytes) -> tuple[plane_pb2.OpenPlaneResponse, Mapping[str, str]]:
    """What OpenPlane answered, and why each better plane is not given."""
    plane = frames.parse(plane_pb2.OpenPlaneResponse, data)
    return plane, {_short(refusal.plane): refusal.reason for refusal in plane.refusals}


def refusals_after(error: AttndError, wanted: PlaneOptions, refused: Mapping[str, str]) -> Mapping[str, str]:
    """Why each better plane is not given after shm was refused with `error`; raises that if shm was pinned."""
    if wanted.name == "shm":
        raise error
    return {**_with_cuda(refused), "shm": str(error)}


def _with_cuda(refused: Mapping[str, str]) -> Mapping[str, str]:
    return {"cuda": "it is given only where it is asked for by name", **refused}


def _short(plane: int) -> str:
    """A plane's name; a number that this version does not know stays a number."""
    return _NAMES.get(plane, str(plane))


_NAMES: dict[int, str] = {number: name.removeprefix("PLANE_").lower() for name, number in plane_pb2.Plane.items()}
