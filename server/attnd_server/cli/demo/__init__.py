"""A real model whose attention a server computes: `attnd demo` and `attnd chat`."""
