"""`attnd info`: what a server can do and what it holds, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import attnd
from attnd.errors import AttndError
from attnd.v1 import backend_pb2, cache_pb2, capabilities_pb2, plane_pb2, step_pb2, tensor_pb2


def run_info(
    address: str,
    timeout_s: float,
    console: Console,
    errors: Console,
    credentials: attnd.Credentials | None = None,
) -> int:
    """Asks the server at `address` and prints the answers.

    Args:
        address: "host:port".
        timeout_s: how long to wait for it, in seconds.
        console: where the tables go.
        errors: where the one line goes if there is nothing to show.
        credentials: what to show the server.

    Returns:
        The exit code: 0, or 1 if the server did not answer.
    """
    try:
        with attnd.connect(
            address, timeout_s=timeout_s, connect_timeout_s=timeout_s, credentials=credentials
        ) as client:
            capabilities, caches = client.capabilities(), client.list_caches()
    except AttndError as error:
        # gRPC's details may come on several lines.
        errors.print(f"attnd info: {escape(' '.join(str(error).split()))}", style="red", soft_wrap=True)
        return 1
    console.print(
        f"[bold]{escape(address)}[/]  attnd {escape(capabilities.version)}, epoch {capabilities.epoch}", highlight=False
    )
    tables = [device_table(capabilities), choice_table(capabilities), limit_table(capabilities)]
    for part in (*tables, cache_table(caches) if caches else "No caches."):
        console.print()
        console.print(part)
    return 0


def device_table(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> Table:
    """Devices and the memory that caches take there."""
    table = _table("Devices", "device", "what", "KV in use", "KV limit", "UUID")
    for device in capabilities.devices:
        used, limit = bytes_text(device.num_bytes_used), bytes_text(device.num_bytes_limit)
        table.add_row(*map(escape, (device.name, device.description, used, limit, device.uuid or "-")))
    return table


def choice_table(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> Table:
    """Backends and planes, with the reason why one is off."""
    table = _table("Backends and planes", "", "", "can be had")
    for label, enum, states in (
        ("backend", backend_pb2.Backend, [(state.backend, state) for state in capabilities.backends]),
        ("plane", plane_pb2.Plane, [(state.plane, state) for state in capabilities.planes]),
    ):
        for value, state in states:
            available = "[green]yes[/]" if state.available else f"[yellow]no[/]: {escape(state.reason)}"
            table.add_row(label, _name(enum, value), available)
    return table


def limit_table(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> Table:
    """What a step or a cache may be, and how large."""
    table = _table("Steps and caches", "", "")
    for label, enum, values in (
        ("dtypes", tensor_pb2.Dtype, capabilities.dtypes),
        ("more KV dtypes", tensor_pb2.Dtype, capabilities.kv_dtypes),
        ("layouts", cache_pb2.Layout, capabilities.layouts),
        ("masks", step_pb2.Mask, capabilities.masks),
    ):
        table.add_row(label, ", ".join(_name(enum, value) for value in values))
    for field, value in capabilities.limits.ListFields():
        table.add_row(field.name, bytes_text(value) if field.name.endswith("_bytes") else f"{value:,.0f}")
    return table


def cache_table(caches: list[cache_pb2.CacheInfo]) -> Table:
    """Caches, oldest first, with pages in use and what is left of the lease."""
    table = _table("Caches", "name", "KV", "pages in use", "memory", "lease left")
    for cache in caches:
        config = cache.config
        dims = {config.head_dim: "", config.head_dim_v: ""}  # one, or two that differ
        dtype = _name(tensor_pb2.Dtype, config.dtype)
        if config.kv_dtype not in (tensor_pb2.DTYPE_UNSPECIFIED, config.dtype):
            dtype += f" in {_name(tensor_pb2.Dtype, config.kv_dtype)}"
        kinds = f"{dtype}, {_name(cache_pb2.Layout, config.layout)}"
        table.add_row(
            escape(cache.name or "-"),
            f"{config.num_layers} layers x {config.num_kv_heads} heads x {'/'.join(map(str, dims))}, {kinds}",
            f"{cache.num_pages_written:,} of {config.num_pages:,}, {config.page_size} tokens each",
            bytes_text(cache.num_bytes),
            f"{cache.expires_in_s:.0f} of {cache.ttl_s:.0f} s" + (", not adopted" if cache.awaits_adoption else ""),
        )
    return table


def bytes_text(value: float) -> str:
    """`value` bytes with a unit that keeps the number short: 512 B, 1.5 KiB, 12.0 GiB."""
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in ("KV in use", "KV limit", "memory") else "left")
    return table


def _name(enum: Any, value: int) -> str:
    """The end of an enum value's name, as people type it: BACKEND_TRITON_GROUPED is triton_grouped."""
    if value not in enum.values():
        return str(value)
    prefix = enum.DESCRIPTOR.name.upper() + "_"
    name: str = enum.Name(value)
    return name.removeprefix(prefix).lower()
