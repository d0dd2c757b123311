"""What a snapshot says about itself, as JSON with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from typing import Any

from attnd.errors import InvalidRequest
from attnd_server.attention.geometry import AttentionBackend, Geometry, Layout, PrecisionMode, dtype_name

FORMAT = "attnd-snapshot"
VERSION = 1
# Scales of 1024 heads take 40 KB.
MAX_BYTES = 1 << 20

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
        config: its geometry, an AttentionConfig in a server.
        num_pages: pages in the file, those that were written to.
        num_bytes: of the file with the pages.
        sha256: of that file, 64 hexadecimal digits.
    """

    id: str
    epochs: tuple[int, ...]
    principal: str | None
    name: str
    ttl_s: float
    config: Geometry
    num_pages: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ManifestRefused."""
        _check("id", self.id, re.fullmatch(r"[0-9a-f]{32}", self.id), "32 hexadecimal digits")
        _check(
            "epochs", self.epochs, self.epochs and all(0 <= epoch < 1 << 64 for epoch in self.epochs), "64-bit numbers"
        )
        _check("ttl_s", self.ttl_s, 0 < self.ttl_s < float("inf"), "a positive number of seconds")
        _check("num_pages", self.num_pages, 0 <= self.num_pages <= self.config.num_pages, "one of the cache's")
        _check("sha256", self.sha256, re.fullmatch(r"[0-9a-f]{64}", self.sha256), "64 hexadecimal digits")

    def to_bytes(self) -> bytes:
        """The file's content: the same for the same manifest."""
        said = {
            "format": FORMAT,
            "version": VERSION,
            "id": str(self.id),
            "epochs": list(map(str, self.epochs)),  # beyond what other readers of JSON take for whole numbers
            "principal": self.principal and str(self.principal),
            "name": str(self.name),
            "ttl_s": float(self.ttl_s),
            "config": _config_to_json(self.config),
            "num_pages": int(self.num_pages),
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
        _check("version", said.get("version"), said.get("version") == VERSION, f"{VERSION} for this version of attnd")
        checksum = said.pop("checksum", None)
        if checksum != _checksum(said):
            raise ManifestRefused("checksum is not that of the rest: the file was altered or is not whole")
        try:
            said["config"] = _config_from_json(said["config"], config_type)
            said["epochs"] = tuple(map(int, said["epochs"]))
            manifest = cls(**{field.name: said[field.name] for field in fields(cls)})
            written = manifest.to_bytes()
        except ManifestRefused:
            raise
        except InvalidRequest as error:
            raise ManifestRefused(f"config.{error}") from None
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


def _config_from_json(said: dict[str, Any], config_type: type[Geometry]) -> Geometry:
    """Raises KeyError, TypeError, ValueError, AttributeError or InvalidRequest."""
    given = dict(said)
    given |= {name: enum(given[name]) for name, enum in _ENUMS.items()}
    given |= {name: tuple(given[name]) for name in _SCALES}
    return config_type.of_names(**given)
