"""Generated from protos/attnd/v1 by make protos. Not to be edited."""
