"""Commits the work of a WebSocket before its messages."""
