"""One SQLAlchemy session per request, committed before the client hears of it."""

from .asgi.middleware import DBSessionMiddleware
from .database.access import get_session, get_sync_session, session_dependency
from .database.async_database import AsyncDatabase
from .database.health import Health
from .database.sync_database import SyncDatabase
from .errors import (
    ConcurrentUse,
    ConfigurationError,
    DatabaseNotRunning,
    DatabaseUnavailable,
    DBSessionError,
    NoSession,
    PrematureClose,
    SessionClosed,
    TransactionAborted,
)
from .reports.idle import warn_when_idle
from .reports.report import DatabaseReport, UnitReport
from .reports.server_timing import ServerTimingMiddleware
from .unit.current import on_commit, set_rollback

__all__ = [
    "AsyncDatabase",
    "ConcurrentUse",
    "ConfigurationError",
    "DBSessionError",
    "DBSessionMiddleware",
    "DatabaseNotRunning",
    "DatabaseReport",
    "DatabaseUnavailable",
    "Health",
    "NoSession",
    "PrematureClose",
    "ServerTimingMiddleware",
    "SessionClosed",
    "SyncDatabase",
    "TransactionAborted",
    "UnitReport",
    "get_session",
    "get_sync_session",
    "on_commit",
    "session_dependency",
    "set_rollback",
    "warn_when_idle",
]
