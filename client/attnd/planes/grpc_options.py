"""Options of gRPC channels: message sizes, keepalive, how soon to reconnect."""

from __future__ import annotations

from attnd.errors import InvalidRequest
from attnd.protocol import frames

# Seconds in which a peer that vanished without a word is noticed.
KEEPALIVE_S = 10.0
# Less, and the server would take a client's pings for an attack.
MIN_KEEPALIVE_S = 1.0
# A day; gRPC counts milliseconds in 32 bits.
MAX_KEEPALIVE_S = 86_400.0
# Three years: a later deadline gRPC takes for one that has passed.
MAX_TIMEOUT_S = 1e8


def checked_seconds(value: float, name: str) -> float:
    """A timeout that gRPC can count.

    Raises:
        InvalidRequest: it is no number, or out of its range.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= MAX_TIMEOUT_S):
        rule = f"must be a number of seconds in 0..{MAX_TIMEOUT_S:.0f}"
        raise InvalidRequest(f"{name} is {value!r}, but {rule}", field=name)
    return value


def grpc_options(keepalive_s: float = KEEPALIVE_S) -> list[tuple[str, int]]:
    """Options of a gRPC channel.

    Raises:
        InvalidRequest: keepalive_s is too short or too long.
    """
    checked_seconds(keepalive_s, "keepalive_s")
    if not MIN_KEEPALIVE_S <= keepalive_s <= MAX_KEEPALIVE_S:
        rule = f"must be at least {MIN_KEEPALIVE_S:g} seconds, and at most {MAX_KEEPALIVE_S:g}"
        raise InvalidRequest(f"keepalive_s is {keepalive_s:g}, but {rule}", field="keepalive_s")
    return [
        ("grpc.max_receive_message_length", frames.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", frames.MAX_MESSAGE_BYTES),
        *keepalive_options(keepalive_s),
        # A restarted server is found again at once instead of after gRPC's minutes of backoff.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # How long one attempt may take, in spite of its name: a handshake with a busy server far away takes a while.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # Retries are ours to decide: the contract says what may be sent twice.
        ("grpc.enable_retries", 0),
    ]


def keepalive_options(keepalive_s: float) -> list[tuple[str, int]]:
    """Options of gRPC, of either side, for noticing within `keepalive_s` seconds that the other one has vanished."""
    return [
        ("grpc.keepalive_time_ms", int(keepalive_s * 600)),
        ("grpc.keepalive_timeout_ms", int(keepalive_s * 400)),
        # The same again for newer versions of gRPC, whose pings have a timeout of their own, a minute.
        ("grpc.http2.ping_timeout_ms", int(keepalive_s * 400)),
        ("grpc.keepalive_permit_without_calls", 1),
        # A stream may be silent for as long as it likes; gRPC's own rule is two pings, and then one in five minutes.
        ("grpc.http2.max_pings_without_data", 0),
    ]
