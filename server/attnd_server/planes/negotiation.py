"""OpenPlane and ClosePlane: which plane a client gets, and why it does not get another."""

from __future__ import annotations

from attnd.errors import Exhausted, InvalidRequest, Unsupported
from attnd.protocol import frames
from attnd.v1 import plane_pb2
from attnd_server.planes.cuda.planes import CudaPlanes
from attnd_server.planes.open_planes import PlaneTable
from attnd_server.planes.worker import Worker
from attnd_server.service.plane_offer import PlaneReasons

NO_SOCKET = "the server was started without --socket-dir"


class Planes:
    """The planes of a server. Implements `service.plane_offer.PlaneOffer`.

    There is the inline plane alone, until a server with a socket offers its own.
    """

    def __init__(self) -> None:
        """Only the inline plane, which needs no opening."""
        self._table: PlaneTable | None = None
        self._cuda: CudaPlanes | str = NO_SOCKET

    def offer(self, table: PlaneTable, cuda: CudaPlanes | str) -> None:
        """From now on OpenPlane gives planes of `table`; `cuda` may be the reason why no cuda planes are among them."""
        self._table, self._cuda = table, cuda

    def reasons(self) -> PlaneReasons:
        """The planes that OpenPlane refuses, each with the reason for people."""
        reasons = {plane_pb2.PLANE_CUDA: self._cuda} if isinstance(self._cuda, str) else {}
        if self._table is None:
            reasons[plane_pb2.PLANE_SHM] = NO_SOCKET
        return reasons

    def open(self, data: bytes, principal: str) -> bytes:
        """OpenPlane."""
        request = frames.parse(plane_pb2.OpenPlaneRequest, data)
        wanted, reasons = request.plane, self.reasons()
        if wanted not in plane_pb2.Plane.values():
            raise InvalidRequest(f"plane is {wanted}, but must be a value of Plane", field="plane")
        if wanted in reasons:
            name = plane_pb2.Plane.Name(wanted).removeprefix("PLANE_").lower()
            raise Unsupported(f"plane is {name}, but {reasons[wanted]}", field="plane")
        if wanted == plane_pb2.PLANE_CUDA:
            response = self._cuda_plane(Worker(request.cuda.gpu_uuid, request.cuda.has_mps), principal)
        elif wanted == plane_pb2.PLANE_INLINE:
            response = plane_pb2.OpenPlaneResponse(plane=plane_pb2.PLANE_INLINE)
        else:
            response = self._shm_plane(principal, reasons, is_named=wanted == plane_pb2.PLANE_SHM)
        return response.SerializeToString()

    def close(self, data: bytes, principal: str) -> bytes:
        """ClosePlane."""
        plane_id = frames.parse(plane_pb2.ClosePlaneRequest, data).id
        if self._table is None:
            raise InvalidRequest(
                f"id is {plane_id}, but no plane is open: the inline plane needs no closing", field="id"
            )
        self._table.close(plane_id, principal)
        return plane_pb2.ClosePlaneResponse().SerializeToString()

    def _shm_plane(self, principal: str, reasons: PlaneReasons, is_named: bool) -> plane_pb2.OpenPlaneResponse:
        """A shm plane, or the inline one where there is none left and the client did not name it."""
        reasons.setdefault(plane_pb2.PLANE_CUDA, "it is given only where it is asked for by name")
        response = plane_pb2.OpenPlaneResponse(plane=plane_pb2.PLANE_INLINE)
        if self._table is not None:
            try:
                plane = self._table.open(principal)
            except Exhausted as error:
                if is_named:
                    raise
                reasons[plane_pb2.PLANE_SHM] = str(error)
            else:
                shm = plane_pb2.ShmPlane(
                    ticket=plane.ticket, socket_path=self._table.socket_path, num_bytes=self._table.num_bytes
                )
                response = plane_pb2.OpenPlaneResponse(id=plane.id, plane=plane_pb2.PLANE_SHM, shm=shm)
        response.refusals.extend(plane_pb2.PlaneRefusal(plane=key, reason=why) for key, why in reasons.items())
        return response

    def _cuda_plane(self, worker: Worker, principal: str) -> plane_pb2.OpenPlaneResponse:
        cuda, table = self._cuda, self._table
        assert table is not None
        assert not isinstance(cuda, str)
        if not worker.gpu_uuid:
            raise InvalidRequest("cuda.gpu_uuid is empty, but must name the GPU of the worker", field="cuda.gpu_uuid")
        plane = table.open(principal, worker, cuda.most_beside(worker))
        flags = plane_pb2.CUDA_FLAGS_HOST if cuda.takes_turns(worker) else plane_pb2.CUDA_FLAGS_GATES
        return plane_pb2.OpenPlaneResponse(
            id=plane.id,
            plane=plane_pb2.PLANE_CUDA,
            cuda=plane_pb2.CudaPlane(
                ticket=plane.ticket,
                socket_path=table.socket_path,
                num_bytes=cuda.num_bytes,
                gpu_uuid=cuda.gpu_uuid,
                flags=flags,
                results_num_bytes=cuda.results_num_bytes(worker),
                has_resident_steps=flags == plane_pb2.CUDA_FLAGS_GATES,
            ),
        )
