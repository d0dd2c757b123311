"""How a cuda plane begins: the worker's GPU, memory of the server's, and the flags of both sides."""

from __future__ import annotations

import mmap
import os
import sys

from attnd.errors import Unsupported
from attnd.planes.cuda.plane import CudaPlane
from attnd.planes.tickets import show_ticket
from attnd.planes.transport import Transport
from attnd.protocol import frames
from attnd.protocol.cuda import driver as cuda_driver
from attnd.protocol.cuda.driver import CudaError, Device
from attnd.protocol.cuda.gate_flags import GateFlags
from attnd.protocol.cuda.host_flags import HostFlags, HostWords
from attnd.protocol.cuda.layout import TO_SERVER, TO_WORKER, WORDS_BYTES
from attnd.protocol.cuda.memory import DeviceMemory
from attnd.protocol.shm import sockets
from attnd.v1 import plane_pb2


def worker_gpu() -> Device:
    """The GPU that is torch's current one in this process.

    Raises:
        Unsupported: there is none, or it cannot have a cuda plane; the message says why.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        raise Unsupported("plane is cuda, but this process has no torch with a GPU", field="plane")
    index = torch.cuda.current_device()
    try:
        gpu = cuda_driver.device(index)
        refusal = gpu.refusal()
    except CudaError as error:
        raise Unsupported(f"plane is cuda, but GPU {index} cannot be used: {error}", field="plane") from None
    if refusal is not None:
        raise Unsupported(f"plane is cuda, but {refusal}", field="plane")
    return gpu


def asked(transport: Transport, socket_dir: str, timeout_s: float) -> tuple[CudaPlane, int]:
    """Asks a server for a plane, and opens it. Raises as `worker_gpu` and `open_cuda`.

    Returns:
        The plane, and its id.
    """
    gpu = worker_gpu()
    request = plane_pb2.OpenPlaneRequest(plane=plane_pb2.PLANE_CUDA)
    request.cuda.gpu_uuid, request.cuda.has_mps = gpu.uuid, gpu.has_mps
    plane = frames.parse(
        plane_pb2.OpenPlaneResponse, transport.unary("OpenPlane", request.SerializeToString(), timeout_s)
    )
    return open_cuda(plane, gpu, socket_dir, timeout_s), plane.id


def check_reach(gpu: Device, servers_uuid: str) -> None:
    """Raises Unsupported if a worker's GPU cannot get at the memory of the server's; the message says why."""
    servers = cuda_driver.device_of(servers_uuid)
    if servers is None:
        rule = "must be among those that this process sees; see CUDA_VISIBLE_DEVICES, or the container's devices"
        raise Unsupported(f"plane is cuda, but the server's GPU is {servers_uuid}, which {rule}", field="plane")
    if not gpu.reaches(servers):
        rule = "must reach it directly, over NVLink or PCIe"
        raise Unsupported(f"plane is cuda, but GPU {gpu.uuid} does not reach the server's {servers_uuid}, and {rule}")


def open_cuda(plane: plane_pb2.OpenPlaneResponse, gpu: Device, socket_dir: str, timeout_s: float) -> CudaPlane:
    """Connects to a plane that OpenPlane gave.

    Args:
        plane: the answer.
        gpu: the worker's.
        socket_dir: the folder of the server's sockets as this process sees it; "": as the server does.
        timeout_s: how long the server may take, in seconds.

    Raises:
        Unsupported: this process cannot reach the socket, or not map the memory; the message says why.
        AttndError: what the server answered.
    """
    check_reach(gpu, plane.cuda.gpu_uuid)
    sizes = [size for size in (plane.cuda.num_bytes, plane.cuda.results_num_bytes) if size]
    connection, (words, *descriptors), path = show_ticket(
        plane.cuda.ticket, plane.cuda.socket_path, socket_dir, 1 + len(sizes), timeout_s
    )
    try:
        memory = sockets.map_memory(words, WORDS_BYTES)
        with gpu.current():
            mapped = imported_memory(gpu, descriptors, sizes)
    except CudaError as error:
        connection.close()
        raise Unsupported(f"plane is cuda, but the server's memory cannot be mapped: {error}", field="plane") from None
    except BaseException:
        connection.close()
        raise
    try:
        with gpu.current():
            flags = workers_flags(gpu, mapped, memory, takes_turns=plane.cuda.flags == plane_pb2.CUDA_FLAGS_HOST)
            shared = HostWords(memory) if plane.cuda.has_resident_steps else None
            return CudaPlane(connection, gpu, mapped, flags, path, shared)
    except CudaError as error:
        connection.close()
        for each in mapped:
            each.close()
        raise Unsupported(f"plane is cuda, but streams cannot wait here: {error}", field="plane") from None


def imported_memory(gpu: Device, descriptors: list[int], sizes: list[int]) -> list[DeviceMemory]:
    """The region, and the memory of results if there is one. Closes the descriptors, whatever happens."""
    mapped: list[DeviceMemory] = []
    try:
        for size in sizes:
            mapped.append(DeviceMemory.imported(gpu, descriptors.pop(0), size))
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        for each in mapped:
            each.close()
        raise
    return mapped


def workers_flags(
    gpu: Device, memory: list[DeviceMemory], words: mmap.mmap, *, takes_turns: bool
) -> HostFlags | GateFlags:
    """The worker's side of the hand-overs; `gpu` is the thread's current one. Raises CudaError."""
    if takes_turns:
        return HostFlags(HostWords(words), signal=TO_SERVER // 4, flag=TO_WORKER // 4)
    return GateFlags(gpu, signal=memory[0].address + TO_SERVER, flag=memory[-1].address + TO_WORKER)
