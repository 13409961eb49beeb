"""Which server of a database a unit of work may read from."""

from asgi_dbsession.database.replicas import PositionStore, Replicas

__all__ = ["PositionStore", "Replicas"]
