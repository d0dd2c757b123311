"""What a released version could say: its calls by public names, for its own client and server and for today's."""
