"""Chooses the server that a unit of work reads from: the primary or a replica (optional)."""

from asgi_dbsession.database.replicas import PositionStore, Replicas

__all__ = ["PositionStore", "Replicas"]
