"""The command `attnd top`: what a server does now, refreshed."""
