"""Ways for the tensors of a call to travel that beat the gRPC message: who may have which, and where to ask."""

from attnd_server.planes.pinning import Pinning, registrar_for
from attnd_server.planes.socket_folder import SocketFolder
from attnd_server.planes.table import Plane, PlaneTable

__all__ = ["Pinning", "Plane", "PlaneTable", "SocketFolder", "registrar_for"]
