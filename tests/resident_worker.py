"""The worker's side of resident steps without a GPU: memory of the host, and a server that does what the test says."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from attnd.protocol.cuda.resident import REFUSED
from attnd.protocol.tensors import DTYPE_NAMES
from attnd.v1 import attention_pb2, backend_pb2


class Counter:
    """Two words of the host instead of the GPU's."""

    def __init__(self, gpu: object, start: int = 0) -> None:
        self.words = torch.tensor([start, 0])
        self.address = self.words.data_ptr()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Copier:
    """Copies at once."""

    def __init__(self, gpu: object) -> None:
        pass

    def copy(self, stream: int, copies: list[Any]) -> None:
        for copy in copies:
            ctypes.memmove(copy.target, copy.source, copy.num_rows * copy.row_bytes)


class Plane:
    """Memory of the host, and a server that does what the test says."""

    num_bytes = 1 << 20
    torch_device = torch.device("cpu")
    has_resident_steps = True
    is_capturing = False

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.failure_to_come: Exception | None = None
        self.going_away = ""
        self.region, self.memory = (torch.zeros(self.num_bytes, dtype=torch.uint8) for _ in range(2))
        self.asked: list[str] = []
        self.noted: list[str] = []
        self.refusal: attention_pb2.ResidentRefusal | None = None
        self.reason, self.serves = "", True
        self.counter: Any = None
        self.num_done = 0

    @property
    def gpu(self) -> Any:
        @contextmanager
        def current() -> Iterator[None]:
            yield

        return SimpleNamespace(current=current)

    @contextmanager
    def stream(self) -> Iterator[int]:
        yield 0

    def ask(self, request: attention_pb2.AttendRequest, timeout_s: float) -> Any:
        kind = request.WhichOneof("message")
        assert kind is not None
        self.asked.append(kind)
        if kind == "resident_resume":
            self.tell(0)
            return attention_pb2.ResidentResumeReply()
        self.wanted = request.resident_steps
        max_reqs, max_pages = (-(-each // 4) * 4 for each in (self.wanted.max_reqs, self.wanted.max_pages))
        return attention_pb2.ResidentStepsReply(
            reason=self.reason, max_reqs=max_reqs, max_pages=max_pages, backend=backend_pb2.BACKEND_TRITON_GROUPED
        )

    def told(self, kind: str, timeout_s: float) -> Any:
        assert kind == "resident_refusal"
        return self.refusal

    def await_failure(self, timeout_s: float) -> None:
        self.failure = self.failure_to_come

    def tell(self, refused: int) -> None:
        self.memory[REFUSED : REFUSED + 16] = torch.tensor([refused, self.num_done]).view(torch.uint8)

    def resident(self, counter: Any, where: Any) -> Any:
        self.counter, self.where = counter, where

        def run(stream: int, copies: list[Any]) -> None:
            Copier(None).copy(stream, copies)
            counter.words[0] += 1
            self.noted.append("step")

        return SimpleNamespace(run=run)

    def address(self, offset: int, *, is_result: bool = False) -> int:
        return (self.memory if is_result else self.region).data_ptr() + offset

    def tensor(self, place: Any) -> torch.Tensor:
        memory = self.memory if place.is_result else self.region
        dtype = getattr(torch, DTYPE_NAMES[place.dtype])
        return memory[place.offset : place.offset + place.num_bytes].view(dtype).view(place.shape)

    def synchronize(self) -> None:
        pass

    def hand_over(self, stream: int, layer: int, is_last: bool, inputs: Any, outputs: Any) -> None:
        self.noted.append(f"layer {layer}: {len(inputs)} in, {len(outputs)} out")
        is_resident = self.counter is not None and int(self.counter.words[0]) > self.num_done
        if is_last and self.serves and is_resident:
            self.num_done += 1
            self.tell(0 if self.refusal is None else self.refusal.step)
