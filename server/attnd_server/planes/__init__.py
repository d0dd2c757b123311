"""Planes: how the tensors of a call travel without gRPC. A folder for each, of the same name as in the client."""
