"""What a request means: sessions, calls, validation, replies, capabilities."""
