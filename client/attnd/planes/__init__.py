"""How a client reaches a server: transports, and the planes on which the tensors of calls travel."""
