"""Resident steps: decode steps that the server's GPU checks and plans, without a processor's work on either side.

Their metadata lies in tensors of the worker's GPU. A step is a kernel that brings it to the server and counts the step,
and then the layers; all of it can be captured in one CUDA graph, which may advance the lengths itself.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from attnd.errors import AttndError, Disconnected, InvalidRequest, ended, from_message
from attnd.planes.cuda.resident_shape import ResidentShape, Session, made_ready
from attnd.planes.cuda.tensors import check_tensor
from attnd.protocol.cuda.layout import StepLayout
from attnd.protocol.cuda.resident import (
    CONTEXT_LENS,
    LENS_ROWS,
    NUM_REQS,
    REFUSED,
    STORED_LENS,
    VALID_LENS,
    VERSION,
)
from attnd.protocol.tensors import DTYPE_NAMES
from attnd.v1 import attention_pb2

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not


class ResidentSteps:
    """Resident steps of a session. Made by `CudaSession.resident`.

    The tensors lie on the worker's GPU and may be written at any time, by operations of the stream that the steps are
    enqueued on: `begin` enqueues their copy.

    Attributes:
        shape: what the steps have in common.
        page_tables: int32 `[max_reqs, max_pages]`, page ids; of a request as many columns count as its tokens need.
        num_reqs: int32 `[1]`, requests of the step.
        context_lens: int32 `[max_reqs]`, cached tokens of each; minus `query_len` for a row that only pads the batch.
        valid_lens: int32 `[max_reqs]`, new tokens that count; `query_len` at first.
        stored_lens: int32 `[max_reqs]`, new tokens that are stored, the first so many; `query_len` at first. Token i of
            request r is stored at position `context_lens[r] + i` of the request's pages.
        refused: int64 `[2]`: the number of the first step that was refused, or 0, and that of the last that is done.
            For graphs that are to stop; as long as it is not 0, steps store nothing, and outputs mean nothing.
        num_done: steps that were done at the last `finish`.
        is_over: whether others were made since, or the session was closed.

    ```
    steps = session.resident(num_heads=32, max_reqs=64, max_pages=256)
    steps.page_tables[:2, :3].copy_(tables)
    steps.context_lens[:2].copy_(lengths)
    with torch.cuda.graph(graph):
        steps.begin(2)
        for layer in range(num_layers):
            output = steps.attend(layer, q, k, v)
        steps.context_lens[:2].add_(1)
    for _ in range(100):
        graph.replay()
    steps.finish()
    ```
    """

    # Whether they are asked for only if their kernels are there.
    _if_ready = False

    def __init__(self, session: Session, plane: CudaPlane, shape: ResidentShape, num_done: int) -> None:
        """Asks the server to make them ready; `num_done` are those of the plane up to now. Raises as `resident`."""
        from attnd.protocol.cuda.copies import Copier
        from attnd.protocol.cuda.gate_flags import Counter

        self.shape, self.num_done, self._num_counted = shape, num_done, num_done
        self._session, self._plane = session, plane
        self._layouts, self._where = made_ready(session, plane, shape, num_done, if_ready=self._if_ready)
        self._dtype = getattr(sys.modules["torch"], DTYPE_NAMES[self._layouts[0].q.dtype])
        self._next_layer, self.is_over = 0, False
        self._make_tensors()
        gpu = plane.gpu
        with gpu.current():
            self._counter = Counter(gpu, num_done)
            self._post = plane.resident(self._counter, self._where)
            self._copier = Copier(gpu)

    def _make_tensors(self) -> None:
        torch, device, where = sys.modules["torch"], self._plane.torch_device, self._where
        self._lens = torch.zeros(LENS_ROWS, where.max_reqs, dtype=torch.int32, device=device)
        self._lens[NUM_REQS, 1] = VERSION
        self._lens[VALID_LENS:].fill_(self.shape.query_len)
        most = self.shape.max_reqs
        self.num_reqs = self._lens[NUM_REQS, :1]
        self.context_lens = self._lens[CONTEXT_LENS, :most]
        self.valid_lens, self.stored_lens = self._lens[VALID_LENS, :most], self._lens[STORED_LENS, :most]
        self._tables = torch.zeros(where.max_reqs, where.max_pages, dtype=torch.int32, device=device)
        self.page_tables = self._tables[:most, : self.shape.max_pages]
        self.refused = torch.zeros(2, dtype=torch.int64, device=device)
        self._told = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._told[1] = self.num_done
        self._counted = self._told.clone().pin_memory() if device.type == "cuda" else self._told.clone()
        self._counted[0] = self.num_done

    def begin(self, num_reqs: int) -> None:
        """Enqueues a step of the first `num_reqs` requests on torch's current stream: its metadata goes to the server.

        Raises:
            InvalidRequest: there are not so many.
            Disconnected: the server is draining.
            AttndError: the plane failed.
        """
        self._refuse_if_failed()
        if self._plane.going_away:
            reason = self._plane.going_away
            self._session.close()
            raise Disconnected(f"{reason}; the next step reconnects")
        if not 1 <= num_reqs <= self.shape.max_reqs:
            rule = f"must be 1..{self.shape.max_reqs}"
            raise InvalidRequest(f"num_reqs is {num_reqs}, but {rule}", field="num_reqs")
        self.num_reqs.fill_(num_reqs)
        with self._plane.stream() as stream:
            self._enqueue(stream, num_reqs)

    def _enqueue(self, stream: int, num_reqs: int) -> None:
        """Enqueues the metadata's copy to the server, and the step's count."""
        where, plane = self._where, self._plane
        copies = [
            _copy(plane.address(where.lens), self._lens.data_ptr(), self._lens.nbytes),
            _copy(plane.address(where.page_tables), self._tables.data_ptr(), self._tables[:num_reqs].nbytes),
        ]
        self._post.run(stream, copies)
        self._next_layer = 0

    def inputs(self, layer: int, num_reqs: int) -> tuple[Any, Any, Any]:
        """Where q, k and v of a layer of `num_reqs` requests may be written, so that `attend` need not copy them.

        Not before the layer before it has come back. Of no use once the session was closed.
        """
        layout = self._rows(layer, num_reqs * self.shape.query_len)
        q, k, v = (self._plane.tensor(place) for place in (layout.q, layout.k, layout.v))
        return q, k, v

    def attend(self, layer: int, q: Any, k: Any, v: Any, *, copies: bool = True) -> Any:
        """Enqueues attention of one layer, and returns its output, which comes later.

        Args:
            layer: of the cache; 0 first, and none left out.
            q: `[num_reqs * query_len, num_heads, head_dim]` of the cache's dtype, on the worker's GPU.
            k: `[num_reqs * query_len, num_kv_heads, head_dim]`.
            v: `[num_reqs * query_len, num_kv_heads, head_dim_v]`.
            copies: whether output and lse get memory of their own. If not, they lie where the server writes those of
                the next layer, too, and must have been read before that is enqueued.

        Returns:
            As `Step.attend`.

        Raises:
            InvalidRequest: the layer is not the next, or a tensor is not one of these steps.
            AttndError: the plane failed.
        """
        num_layers = self._session.cache.config.num_layers
        if layer != self._next_layer or layer >= num_layers:
            raise InvalidRequest(f"layer is {layer}, but must be the next, {self._next_layer}", field="layer")
        self._refuse_if_failed()
        plane, layout = self._plane, self._rows(layer, q.shape[0])
        inputs = [
            (place, check_tensor(name, value, place, self._dtype, plane.torch_device))
            for name, value, place in (("q", q, layout.q), ("k", k, layout.k), ("v", v, layout.v))
            if value.data_ptr() != plane.address(place.offset)
        ]
        options = self.shape.each_options
        places = [layout.output, layout.lse][: 1 + options[layer if len(options) > 1 else 0].return_lse]
        results = [plane.tensor(place) for place in places]
        if copies:
            results = [sys.modules["torch"].empty_like(each) for each in results]
        is_last = layer == num_layers - 1
        with plane.stream() as stream:
            outputs = list(zip(places, results, strict=True)) if copies else []
            plane.hand_over(stream, layer, is_last, inputs, outputs)
            if is_last:
                self._fetch(stream)
        self._next_layer += 1
        return tuple(results) if len(results) > 1 else results[0]

    def _fetch(self, stream: int) -> None:
        """Enqueues the copy of what `finish` learns."""
        told = self._plane.address(REFUSED, is_result=True)
        news = [_copy(each.data_ptr(), told, 16) for each in (self._told, self.refused)]
        self._copier.copy(stream, [*news, _copy(self._counted.data_ptr(), self._counter.address, 16)])

    def finish(self) -> None:
        """Waits for torch's current stream, and learns how the steps that were enqueued on it went.

        Raises:
            InvalidRequest: one was refused; it and those after it stored nothing. Later ones are served again.
            AttndError: the plane failed; outputs mean nothing.
        """
        self._plane.synchronize()
        self._refuse_if_failed()
        refused, self.num_done = self._told.tolist()
        if self.num_done != int(self._counted[0]):  # the server has let go of a step, and says why
            self._plane.await_failure(self._session.timeout_s)
            self._refuse_if_failed()
        self._count()
        if refused:
            raise self._refusal(resumes=True)

    def _count(self) -> None:
        self._session.timings().resident += self.num_done - self._num_counted
        self._num_counted = self.num_done

    def _refusal(self, resumes: bool) -> AttndError:
        """Why a step was refused; if it resumes, steps are served again from now on."""
        refusal = self._plane.told("resident_refusal", self._session.timeout_s)
        if resumes:
            resume = attention_pb2.AttendRequest(resident_resume=attention_pb2.ResidentResume())
            self._plane.ask(resume, self._session.timeout_s)
            self._told[0] = 0
        return from_message(refusal.error)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the region that are for tensors: behind them lies the metadata."""
        return self._where.word

    def close(self) -> None:
        """Ends them, and frees what they have of their own; nothing of them may be queued."""
        if self.is_over:
            return
        self.is_over = True
        with self._plane.gpu.current():
            self._counter.close()

    def _rows(self, layer: int, num_tokens: int) -> StepLayout:
        """The places of a layer's tensors, which lie where those of the most requests would."""
        if num_tokens > self.shape.max_reqs * self.shape.query_len:
            rule = f"these steps have at most {self.shape.max_reqs} requests of {self.shape.query_len} new tokens"
            raise InvalidRequest(f"q has {num_tokens} tokens, but {rule}", field="q")
        return self._layouts[layer % 2].first_rows(num_tokens)

    def _refuse_if_failed(self) -> None:
        if self.is_over and self._plane.failure is None:
            raise ended("the session has other resident steps by now: use those that it gave last")
        if self._plane.failure is not None:
            raise self._session.lost or self._plane.failure


def _copy(target: int, source: int, num_bytes: int) -> Any:
    from attnd.protocol.cuda.copies import Copy

    return Copy(target, source, 1, num_bytes, num_bytes)
