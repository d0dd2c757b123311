"""`attnd top --json`: names and numbers for scripts."""

from __future__ import annotations

from typing import Any

from attnd.v1 import error_pb2, plane_pb2
from attnd_server.cli.texts import enum_name
from attnd_server.cli.top.rates import Now, Row

_PRINCIPAL = ("num_sessions", "queue_depth", "num_caches", "num_kv_bytes", "num_pages", "num_pages_written")


def to_json(address: str, now: Now, trouble: str = "") -> dict[str, Any]:
    """One object of it. Times are in microseconds, rates a second."""
    told = now.told
    devices = ("name", "description", "uuid", "num_bytes_used", "num_bytes_limit")
    return {
        "address": address,
        "trouble": trouble,
        "version": told.version,
        "epoch": str(told.epoch),  # numbers of JSON have 53 bits
        "uptime_s": told.uptime_s,
        "draining": told.draining,
        "device_failure": told.device_failure,
        "devices": [{name: getattr(each, name) for name in devices} for each in told.devices],
        "queue_depth": told.queue_depth,
        "shows_everybody": told.shows_everybody,
        "num_process_bytes": told.num_process_bytes,
        "refusals": _refusals(told.refusals),
        "principals": [
            {
                "principal": row.told.principal,
                **{name: getattr(row.told, name) for name in _PRINCIPAL},
                "refusals": _refusals(row.told.refusals),
                **_served(row),
            }
            for row in now.principals
        ],
        "num_principals_left_out": told.num_principals_left_out,
        "sessions": [
            {
                "principal": row.told.principal,
                "id": row.told.id,
                "plane": enum_name(plane_pb2.Plane, row.told.plane),
                "open_s": row.told.open_s,
                "idle_s": row.told.idle_s,
                **_served(row),
            }
            for row in now.sessions
        ],
        "num_sessions_left_out": told.num_sessions_left_out,
    }


def _served(row: Row) -> dict[str, Any]:
    served = row.told.served
    return {
        "steps": served.steps,
        "tokens": served.tokens,
        "calls": served.calls,
        "steps_per_s": row.steps,
        "tokens_per_s": row.tokens,
        "calls_per_s": row.calls,
        "times_us": {phase: found._asdict() for phase, found in row.times.items()},
    }


def _refusals(counts: Any) -> dict[str, int]:
    return {enum_name(error_pb2.ErrorReason, each.reason): each.count for each in counts}
