"""The steps that a session has sent: what is the same whether threads or tasks wait for their answers."""

from __future__ import annotations

from typing import Any

from attnd.protocol import requests
from attnd.protocol.features import MissingFeatures
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.protocol.step_metadata import StepMetadata
from attnd.v1 import cache_pb2, step_pb2


class SentSteps:
    """The numbers of a session's steps, and the page tables by which later ones may be told."""

    def __init__(self) -> None:
        """None was sent."""
        self._last_id = 0
        self._tables = SentPageTables()

    def message(
        self, metadata: StepMetadata, cache: cache_pb2.CacheRef, timeout_s: float, missing: MissingFeatures | None
    ) -> step_pb2.Step:
        """The next step, with what changed of page tables where the server knows the rest.

        Args:
            metadata: of the step.
            cache: that the step reads and writes.
            timeout_s: deadline of each of its calls, in seconds.
            missing: what the server lacks; None: nothing.

        Raises:
            InvalidRequest: the metadata cannot be sent.
            Unsupported: the step needs what the server lacks.
        """
        self._last_id += 1
        message = metadata.to_message(self._last_id, cache, self._tables)
        if missing is not None:
            missing.check_step(message)
        message.call_timeout_ms = requests.timeout_ms(timeout_s)
        return message

    def answered(self, step_id: int, kind: str, message: Any) -> None:
        """Learns from a step's answer which page tables the server knows."""
        if kind == "error":
            self._tables.forget()
        elif kind == "step" and message.takes_deltas:
            self._tables.accept(step_id)

    def forget(self) -> None:
        """The next step goes to another stream, whose server knows no page tables."""
        self._tables.forget()
