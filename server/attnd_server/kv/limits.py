"""How many caches there may be and how much memory they may take, of the server's and of one principal's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attnd.errors import Exhausted
from attnd_server.config import PrincipalLimits

# Layer groups of all caches, for each cache that there may be: models have a few, and each takes some of the host.
GROUPS_PER_CACHE = 32


class Holding(NamedTuple):
    """A cache, or one that is being allocated: whose it is, the bytes that it takes, and its layer groups."""

    principal: str
    num_bytes: int
    num_groups: int = 1


class CacheLimits:
    """The limits, held against what is there."""

    def __init__(self, max_caches: int, kv_bytes: int, share: PrincipalLimits) -> None:
        """Allows the server `max_caches` of `kv_bytes` together, and one principal its `share`."""
        self._max_caches = max_caches
        self._kv_bytes = kv_bytes
        self._share = share

    def refuse_if_too_many(self, holdings: Sequence[Holding], principal: str, num_groups: int = 1) -> None:
        """Raises Exhausted if there may not be one more cache of `principal`, with so many layer groups."""
        count = len(holdings)
        own = sum(each.principal == principal for each in holdings)
        if count >= self._max_caches:
            raise Exhausted(f"{count} caches exist, but the server's limit is {self._max_caches}; 0 are free")
        if own >= self._share.caches:
            raise Exhausted(
                f"{own} caches of this principal exist, but a principal's limit is {self._share.caches}; 0 are free"
            )

        groups = sum(each.num_groups for each in holdings)
        own_groups = sum(each.num_groups for each in holdings if each.principal == principal)
        limits = ("the server's", self._max_caches, groups), ("a principal's", self._share.caches, own_groups)
        for whose, max_caches, there in limits:
            most = GROUPS_PER_CACHE * max_caches
            if there + num_groups > most:
                raise Exhausted(
                    f"groups has {num_groups} elements, but of {whose} {most} layer groups {there} exist and "
                    f"{most - there} are free",
                    field="groups",
                )

    def refuse_if_full(
        self, holdings: Sequence[Holding], principal: str, num_bytes: int, asked: str, field: str = ""
    ) -> int:
        """Refuses bytes that are not free.

        Args:
            holdings: what is in use.
            principal: who asks.
            num_bytes: that are asked for.
            asked: what takes them, for people.
            field: of the request, likewise.

        Returns:
            The bytes that are in use.

        Raises:
            Exhausted: not so many are free.
        """
        used = sum(each.num_bytes for each in holdings)
        own = sum(each.num_bytes for each in holdings if each.principal == principal)
        limits = ("the server's", self._kv_bytes, used), ("a principal's", self._share.kv_bytes, own)
        for whose, limit, taken in limits:
            if taken + num_bytes > limit:
                raise Exhausted(
                    f"{asked} {num_bytes} bytes, but of {whose} {limit} bytes of KV memory {taken} are in use and "
                    f"{limit - taken} are free",
                    field=field,
                )
        return used
