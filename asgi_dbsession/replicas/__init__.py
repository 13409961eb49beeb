"""Chooses the server from which a unit of work reads: the primary or a replica (optional)."""

from asgi_dbsession.database.replicas import PositionStore, Replicas

__all__ = ["PositionStore", "Replicas"]
