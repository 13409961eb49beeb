"""Optional feature: read-only requests read from a replica instead of the primary server."""

from asgi_dbsession.database.replicas import PositionStore, Replicas

__all__ = ["PositionStore", "Replicas"]
