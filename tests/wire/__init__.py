"""The wire's bytes: recorded from the client and server of one release, and compared with those of another."""
