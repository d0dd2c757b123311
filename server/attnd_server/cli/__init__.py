"""The command `attnd`."""
