"""What a snapshot says about itself, as JSON with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from attnd.errors import InvalidRequest
from attnd_server.config import AttentionBackend, AttentionConfig, KVSplitConfig, Layout, PrecisionMode

FORMAT = "attnd-snapshot"
VERSION = 1
# Scales of 1024 heads take 40 KB.
MAX_BYTES = 1 << 20

_ENUMS = {"layout": Layout, "backend": AttentionBackend, "precision": PrecisionMode}
_DTYPES = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float8_e4m3fn")
}  # by the name that torch gives them
_SCALES = ("k_scales", "v_scales")


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
        config: its geometry.
        num_pages: pages in the file, those that were written to.
        num_bytes: of the file with the pages.
        sha256: of that file, 64 hexadecimal digits.
    """

    id: str
    epochs: tuple[int, ...]
    principal: str | None
    name: str
    ttl_s: float
    config: AttentionConfig
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
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        told |= {"epochs": list(map(str, self.epochs)), "config": _config_to_json(self.config)}
        said = {"format": FORMAT, "version": VERSION, **told}
        return _dump({**said, "checksum": _checksum(said)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest that `to_bytes` made these of.

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
            said["config"] = _config_from_json(said["config"])
            said["epochs"] = tuple(map(int, said["epochs"]))
            manifest = cls(**{field.name: said[field.name] for field in fields(cls)})
        except InvalidRequest as error:
            raise ManifestRefused(f"config.{error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ManifestRefused):
                raise
            raise ManifestRefused(f"a field is missing or of another type: {error!r}") from None
        if manifest.to_bytes() != data:
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


def _config_to_json(config: AttentionConfig) -> dict[str, Any]:
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    said |= {name: said[name].value for name in _ENUMS}
    said |= {name: str(said[name]).removeprefix("torch.") for name in ("dtype", "kv_dtype")}
    said |= {name: list(said[name]) for name in _SCALES}
    return said | {"kv_split": asdict(config.kv_split)}


def _config_from_json(said: dict[str, Any]) -> AttentionConfig:
    """Raises KeyError, TypeError, ValueError, AttributeError or InvalidRequest."""
    given = dict(said)
    given |= {name: enum(given[name]) for name, enum in _ENUMS.items()}
    given |= {name: _DTYPES[given[name]] for name in ("dtype", "kv_dtype")}
    given |= {name: tuple(given[name]) for name in _SCALES}
    return AttentionConfig(**given | {"kv_split": KVSplitConfig(**given["kv_split"])})
