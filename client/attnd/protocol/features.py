"""What a server of an earlier version lacks, and the refusal of what needs it.

A server ignores fields that it does not know, and would answer as if they were not there. So nothing that needs a
feature is sent to a server that does not name it in GetCapabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnd.errors import Unsupported
from attnd.protocol.feature_needs import Feature, Need, cache_needs, step_needs
from attnd.protocol.printable import printable
from attnd.v1 import cache_pb2, capabilities_pb2, step_pb2

_WORDS: dict[Feature, str] = {
    capabilities_pb2.FEATURE_STORE_FIRST: "store-first steps",
    capabilities_pb2.FEATURE_STEP_WINDOW: "windows of steps",
    capabilities_pb2.FEATURE_ATTEND_NEW: "requests whose new tokens see their context alone",
    capabilities_pb2.FEATURE_FIRST_POSITION: "contexts that begin at another position than 0",
    capabilities_pb2.FEATURE_PADDED_ROWS: "rows that an engine padded its batch with",
    capabilities_pb2.FEATURE_LAYER_GROUPS: "layer groups",
    capabilities_pb2.FEATURE_V_DTYPE: "pages whose V has another type than K",
}
KNOWN = frozenset(_WORDS)


@dataclass(frozen=True)
class MissingFeatures:
    """What this client may say, and one server does not know.

    Attributes:
        version: of the server.
        features: those that it lacks; at least one.
    """

    version: str
    features: frozenset[Feature]

    def check_step(self, step: step_pb2.Step) -> None:
        """Raises Unsupported if the step needs something that the server lacks."""
        self._check(step_needs(step))

    def check_cache(self, request: cache_pb2.CreateCacheRequest) -> None:
        """Raises Unsupported if the cache needs something that the server lacks."""
        self._check(cache_needs(request.config))

    def _check(self, needs: Iterator[Need]) -> None:
        for feature, field in needs:
            if feature in self.features:
                lacks = f"the server is of version {printable(self.version)}, which has no {_WORDS[feature]}"
                raise Unsupported(f"{field} is given, but {lacks}: upgrade it", field=field)


def missing_features(told: capabilities_pb2.GetCapabilitiesResponse) -> MissingFeatures | None:
    """What a server lacks; None: nothing. Features that this client does not know make no difference."""
    features = KNOWN - frozenset(told.features)
    return MissingFeatures(told.version, features) if features else None


def needs_features(request: cache_pb2.CreateCacheRequest) -> bool:
    """Whether a cache needs any feature."""
    return any(cache_needs(request.config))
