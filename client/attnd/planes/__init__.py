"""Ways for the tensors of a call to travel that beat the gRPC message: what both sides of the shm plane use."""
