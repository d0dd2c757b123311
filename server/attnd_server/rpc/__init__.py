"""The gRPC door: bytes in, bytes out, errors as statuses."""
