"""What a snapshot says about itself, as JSON with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from typing import Any

from attnd.errors import InvalidRequest
from attnd_server.attention.geometry import AttentionBackend, Geometry, Layout, PrecisionMode, dtype_name
from attnd_server.kv.cache_shape import CacheShape

FORMAT = "attnd-snapshot"
# The second says what the first has no fields for: layer groups, and V of another type than K.
VERSION, GROUPS_VERSION = 1, 2
# Scales of 1024 heads take 40 KB, and there may be as many layer groups.
MAX_BYTES = 64 << 20

_ENUMS = {"layout": Layout, "backend": AttentionBackend, "precision": PrecisionMode}
_SCALES = ("k_scales", "v_scales")
_COUNTS = ("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages")


class ManifestRefused(ValueError):
    """A manifest cannot be used; the message names field, value and rule."""


@dataclass(frozen=True)
class Manifest:
    """A snapshot but for its pages.

    Attributes:
        id: of the cache, 32 hexadecimal digits.
        epochs: under which the cache was as it is here; the last is that of the life of the server that wrote it.
        principal: whose it was; None: a client's export, which does not say.
        name: a label for people.
        ttl_s: its lease, in seconds.
        shape: its layer groups, of AttentionConfigs in a server.
        num_pages: pages of each in the file, those that were written to.
        num_bytes: of the file with the pages.
        sha256: of that file, 64 hexadecimal digits.
    """

    id: str
    epochs: tuple[int, ...]
    principal: str | None
    name: str
    ttl_s: float
    shape: CacheShape[Any]
    num_pages: tuple[int, ...]
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ManifestRefused."""
        _check("id", self.id, re.fullmatch(r"[0-9a-f]{32}", self.id), "32 hexadecimal digits")
        _check(
            "epochs", self.epochs, self.epochs and all(0 <= epoch < 1 << 64 for epoch in self.epochs), "64-bit numbers"
        )
        _check("ttl_s", self.ttl_s, 0 < self.ttl_s < float("inf"), "a positive number of seconds")
        _check("num_pages", self.num_pages, len(self.num_pages) == len(self.shape.groups), "one for each layer group")
        for num_pages, config in zip(self.num_pages, self.shape.groups, strict=True):
            _check("num_pages", num_pages, 0 <= num_pages <= config.num_pages, "one of the cache's")
        _check("sha256", self.sha256, re.fullmatch(r"[0-9a-f]{64}", self.sha256), "64 hexadecimal digits")

    def to_bytes(self) -> bytes:
        """The file's content: the same for the same manifest."""
        said = {
            "format": FORMAT,
            "version": VERSION if _is_plain(self.shape) else GROUPS_VERSION,
            "id": str(self.id),
            "epochs": list(map(str, self.epochs)),  # beyond what other readers of JSON take for whole numbers
            "principal": self.principal and str(self.principal),
            "name": str(self.name),
            "ttl_s": float(self.ttl_s),
            **_shape_to_json(self.shape, self.num_pages),
            "num_bytes": int(self.num_bytes),
            "sha256": str(self.sha256),
        }
        return _dump({**said, "checksum": _checksum(said)})

    @classmethod
    def from_bytes(cls, data: bytes, config_type: type[Geometry] = Geometry) -> Manifest:
        """The manifest that `to_bytes` made these of, with its geometry as one of `config_type`.

        Raises:
            ManifestRefused: it made something else, or another version of attnd did.
        """
        try:
            said = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ManifestRefused(f"it is no JSON: {error}") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise ManifestRefused(f"format must be {FORMAT}")
        known = f"{VERSION} or {GROUPS_VERSION} for this version of attnd"
        _check("version", said.get("version"), said.get("version") in (VERSION, GROUPS_VERSION), known)
        checksum = said.pop("checksum", None)
        if checksum != _checksum(said):
            raise ManifestRefused("checksum is not that of the rest: the file was altered or is not whole")
        try:
            said["shape"], said["num_pages"] = _shape_from_json(said, config_type)
            said["epochs"] = tuple(map(int, said["epochs"]))
            manifest = cls(**{field.name: said[field.name] for field in fields(cls)})
            written = manifest.to_bytes()
        except ManifestRefused:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ManifestRefused(f"a field is missing or of another type: {error!r}") from None
        if written != data:  # so that types and what else JSON leaves open are right too
            raise ManifestRefused("it is not written as attnd writes one")
        return manifest


def _check(field: str, value: object, is_right: object, rule: str) -> None:
    if not is_right:
        raise ManifestRefused(f"{field} is {value!r}, but must be {rule}")


def _dump(said: dict[str, Any]) -> bytes:
    return json.dumps(said, indent=1, allow_nan=False).encode() + b"\n"


def _checksum(said: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        return ""


def _is_plain(shape: CacheShape[Any]) -> bool:
    """Whether the first version has fields for all of it."""
    config = shape.common
    has_more = config.v_dtype != config.kv_dtype or config.window or config.latent
    return shape.is_flat and not has_more


def _shape_to_json(shape: CacheShape[Any], num_pages: tuple[int, ...]) -> dict[str, Any]:
    if _is_plain(shape):
        return {"config": _config_to_json(shape.common), "num_pages": int(num_pages[0])}
    groups = [
        {"layers": list(map(int, layers)), **_config_to_json(config)}
        for layers, config in zip(shape.layers, shape.groups, strict=True)
    ]
    return {"is_flat": bool(shape.is_flat), "groups": groups, "num_pages": list(map(int, num_pages))}


def _shape_from_json(said: dict[str, Any], config_type: type[Geometry]) -> tuple[CacheShape[Any], tuple[int, ...]]:
    """The layer groups, and the pages of each. Raises ManifestRefused, and what `_config_from_json` raises."""
    if said["version"] == VERSION:
        return CacheShape.of(_config_from_json(said["config"], config_type, "config")), (said["num_pages"],)
    configs, layers = [], []
    for index, given in enumerate(said["groups"]):
        group = dict(given)
        layers.append(tuple(group.pop("layers")))
        configs.append(_config_from_json(group, config_type, f"groups[{index}]"))
    try:
        return CacheShape(tuple(configs), tuple(layers), said["is_flat"]), tuple(said["num_pages"])
    except InvalidRequest as error:
        raise ManifestRefused(str(error)) from None


def _config_to_json(config: Geometry) -> dict[str, Any]:
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    split = config.kv_split
    invariant = None if split.batch_invariant is None else bool(split.batch_invariant)
    later: dict[str, Any] = {"v_dtype": dtype_name(config.v_dtype)} if config.v_dtype != config.kv_dtype else {}
    if config.window:
        later["window"] = int(config.window)
    if config.latent:
        later["latent"] = True
    return {
        **{name: int(value) for name, value in said.items() if name in _COUNTS},
        **{name: said[name].value for name in _ENUMS},
        **{name: dtype_name(said[name]) for name in ("dtype", "kv_dtype")},
        **{name: [float(scale) for scale in said[name]] for name in _SCALES},
        "kv_split": {
            "chunk_size": int(split.chunk_size),
            "max_splits": int(split.max_splits),
            "batch_invariant": invariant,
        },
        **later,  # what earlier versions of attnd do not know: written only where a cache has it
    }


def _config_from_json(said: dict[str, Any], config_type: type[Geometry], field: str) -> Geometry:
    """Raises ManifestRefused, KeyError, TypeError, ValueError or AttributeError."""
    given = dict(said)
    given |= {name: enum(given[name]) for name, enum in _ENUMS.items()}
    given |= {name: tuple(given[name]) for name in _SCALES}
    try:
        return config_type.of_names(**given)
    except InvalidRequest as error:
        raise ManifestRefused(f"{field}.{error}") from None
