"""`attnd info`: what a server can do and what it holds, as tables or as JSON."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

import attnd
from attnd.errors import AttndError, Unsupported
from attnd.v1 import backend_pb2, cache_pb2, capabilities_pb2, plane_pb2, status_pb2, step_pb2, tensor_pb2
from attnd_server.cli.texts import bytes_text, enum_name, shown, told

# Of a KernelStatus, and what they are in a table.
_KERNEL_NUMBERS = {
    "num_loaded": "on the device",
    "num_compiling": "being compiled",
    "num_waiting": "waiting",
    "num_failed": "that cannot be had",
    "num_compiled": "compiled since the server began",
    "num_found": "found in the kernel cache",
}


def run_info(
    address: str,
    timeout_s: float,
    console: Console,
    errors: Console,
    credentials: attnd.Credentials | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Asks the server at `address` and prints the answers.

    Args:
        address: of the server.
        timeout_s: how long to wait for it, in seconds.
        console: where the tables go.
        errors: where the one line goes if there is nothing to show.
        credentials: what to show the server.
        as_json: whether the answers are one JSON object and nothing else.

    Returns:
        The exit code: 0, or 1 if the server did not answer.
    """
    try:
        with attnd.connect(
            address, timeout_s=timeout_s, connect_timeout_s=timeout_s, credentials=credentials
        ) as client:
            capabilities, caches = client.capabilities(), client.list_caches()
            kernels = _kernels(client)
    except AttndError as error:
        told(errors, "info", error)
        return 1
    if as_json:
        console.file.write(json.dumps(to_json(address, capabilities, caches, kernels)) + "\n")
        return 0
    console.print(
        shown(f"{address}  attnd {capabilities.version}, epoch {capabilities.epoch}"), style="bold", highlight=False
    )
    tables = [device_table(capabilities), choice_table(capabilities), limit_table(capabilities)]
    if kernels is not None:
        tables.append(kernel_table(kernels))
    for part in (*tables, cache_table(caches) if caches else "No caches."):
        console.print()
        console.print(part)
    return 0


def _kernels(client: attnd.Client) -> status_pb2.KernelStatus | None:
    """The kernels of a server; None: it compiles none, is of a version that does not tell, or tells its operators."""
    try:
        told = client.status()
    except Unsupported:
        return None
    return told.kernels if told.HasField("kernels") else None


def to_json(
    address: str,
    capabilities: capabilities_pb2.GetCapabilitiesResponse,
    caches: list[cache_pb2.CacheInfo],
    kernels: status_pb2.KernelStatus | None = None,
) -> dict[str, Any]:
    """As `--json` has it: see docs/operating.md."""
    devices = ("name", "description", "uuid", "num_bytes_used", "num_bytes_limit")
    return {
        "address": address,
        "version": capabilities.version,
        "epoch": str(capabilities.epoch),  # beyond what other readers of JSON take for whole numbers
        "devices": [{name: getattr(each, name) for name in devices} for each in capabilities.devices],
        **{
            kind: [{"name": name, "available": state.available, "reason": state.reason} for name, state in states]
            for kind, states in _choices(capabilities).items()
        },
        **{kind: values for kind, _, values in _kinds(capabilities)},
        "limits": {field.name: value for field, value in capabilities.limits.ListFields()},
        "kernels": None if kernels is None else _kernels_json(kernels),
        "caches": [_cache_json(cache) for cache in caches],
    }


def _kernels_json(kernels: status_pb2.KernelStatus) -> dict[str, Any]:
    return {
        **{name: getattr(kernels, name) for name in _KERNEL_NUMBERS},
        "compiling": [{"name": each.name, "seconds": each.seconds} for each in kernels.compiling],
        "failed": [{"name": each.name, "reason": each.reason} for each in kernels.failed],
    }


def _cache_json(cache: cache_pb2.CacheInfo) -> dict[str, Any]:
    config = cache.config
    lease = ("num_pages_written", "num_bytes", "ttl_s", "expires_in_s", "awaits_adoption")
    return {
        "name": cache.name,
        "num_layers": config.num_layers,
        **(_geometry_json(config, config.dtype) if not config.groups else {}),
        "dtype": enum_name(tensor_pb2.Dtype, config.dtype),
        "layout": enum_name(cache_pb2.Layout, config.layout),
        **{name: getattr(cache, name) for name in lease},
        **({"groups": [_group_json(group, config.dtype) for group in config.groups]} if config.groups else {}),
    }


def _group_json(group: cache_pb2.LayerGroup, dtype: int) -> dict[str, Any]:
    layers = list(memoryview(group.layers.data).cast("i"))
    return {"layers": layers, **_geometry_json(group, dtype), "window": group.window, "latent": group.latent}


def _geometry_json(part: cache_pb2.CacheConfig | cache_pb2.LayerGroup, dtype: int) -> dict[str, Any]:
    numbers = ("num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages")
    kv_dtype = part.kv_dtype or dtype
    types = {"kv_dtype": kv_dtype, "v_dtype": part.v_dtype or kv_dtype}
    return {
        **{name: getattr(part, name) for name in numbers},
        **{name: enum_name(tensor_pb2.Dtype, value) for name, value in types.items()},
    }


def _choices(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> dict[str, list[tuple[str, Any]]]:
    """Backends and planes by name."""
    backends = [(enum_name(backend_pb2.Backend, state.backend), state) for state in capabilities.backends]
    planes = [(enum_name(plane_pb2.Plane, state.plane), state) for state in capabilities.planes]
    return {"backends": backends, "planes": planes}


def _kinds(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> list[tuple[str, str, list[str]]]:
    """Key, label and names of what a step or a cache may be."""
    return [
        (key, label, [enum_name(enum, value) for value in getattr(capabilities, key)])
        for key, label, enum in (
            ("dtypes", "dtypes", tensor_pb2.Dtype),
            ("kv_dtypes", "more KV dtypes", tensor_pb2.Dtype),
            ("layouts", "layouts", cache_pb2.Layout),
            ("masks", "masks", step_pb2.Mask),
            ("features", "features", capabilities_pb2.Feature),
        )
    ]


def device_table(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> Table:
    """Devices and the memory that caches take there."""
    table = _table("Devices", "device", "what", "KV in use", "KV limit", "UUID")
    for device in capabilities.devices:
        used, limit = bytes_text(device.num_bytes_used), bytes_text(device.num_bytes_limit)
        table.add_row(*map(shown, (device.name, device.description, used, limit, device.uuid or "-")))
    return table


def choice_table(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> Table:
    """Backends and planes, with the reason why one is off."""
    table = _table("Backends and planes", "", "", "can be had")
    for kind, states in _choices(capabilities).items():
        for name, state in states:
            yes_or_no = Text("yes", "green") if state.available else Text("no", "yellow")
            why = Text() if state.available else shown(f": {state.reason}")
            table.add_row(kind.removesuffix("s"), name, yes_or_no + why)
    return table


def limit_table(capabilities: capabilities_pb2.GetCapabilitiesResponse) -> Table:
    """What a step or a cache may be, and how large."""
    table = _table("Steps and caches", "", "")
    for _, label, names in _kinds(capabilities):
        table.add_row(label, ", ".join(names))
    for field, value in capabilities.limits.ListFields():
        table.add_row(field.name, bytes_text(value) if field.name.endswith("_bytes") else f"{value:,.0f}")
    return table


def kernel_table(kernels: status_pb2.KernelStatus) -> Table:
    """Kernels: how many, which are being compiled, and why one cannot be had."""
    table = _table("Kernels", "", "")
    for name, text in _KERNEL_NUMBERS.items():
        table.add_row(text, f"{getattr(kernels, name):,}")
    for compiling in kernels.compiling:
        table.add_row(shown(f"compiling for {compiling.seconds:.1f} s"), shown(compiling.name))
    for failed in kernels.failed:
        table.add_row(shown("cannot be had"), shown(f"{failed.name}: {failed.reason}"))
    return table


def cache_table(caches: list[cache_pb2.CacheInfo]) -> Table:
    """Caches, oldest first, with pages in use and what is left of the lease."""
    table = _table("Caches", "name", "KV", "pages in use", "memory", "lease left")
    for cache in caches:
        config = cache.config
        parts = [_Part(config.num_layers, config)]
        if config.groups:
            parts = [_Part(len(group.layers.data) // 4, group) for group in config.groups]
        num_pages = sum(part.geometry.num_pages for part in parts)
        page_sizes = dict.fromkeys(part.geometry.page_size for part in parts)
        table.add_row(
            shown(cache.name or "-"),
            "; ".join(_kind(part, config) for part in parts),
            f"{cache.num_pages_written:,} of {num_pages:,}, {'/'.join(map(str, page_sizes))} tokens each",
            bytes_text(cache.num_bytes),
            f"{cache.expires_in_s:.0f} of {cache.ttl_s:.0f} s" + (", not adopted" if cache.awaits_adoption else ""),
        )
    return table


class _Part(NamedTuple):
    """Layers of a cache that are alike."""

    num_layers: int
    geometry: cache_pb2.CacheConfig | cache_pb2.LayerGroup


def _kind(part: _Part, config: cache_pb2.CacheConfig) -> str:
    geometry = part.geometry
    dims = {geometry.head_dim: "", geometry.head_dim_v: ""}  # one, or two that differ
    dtype = enum_name(tensor_pb2.Dtype, config.dtype)
    kv_dtypes = {geometry.kv_dtype or config.dtype: ""}  # one, or two that differ
    kv_dtypes[geometry.v_dtype or geometry.kv_dtype or config.dtype] = ""
    if list(kv_dtypes) != [config.dtype]:
        dtype += f" in {'/'.join(enum_name(tensor_pb2.Dtype, each) for each in kv_dtypes)}"
    kinds = f"{dtype}, {enum_name(cache_pb2.Layout, config.layout)}"
    return f"{part.num_layers} layers x {geometry.num_kv_heads} heads x {'/'.join(map(str, dims))}, {kinds}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in ("KV in use", "KV limit", "memory") else "left")
    return table
