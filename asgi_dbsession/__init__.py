"""One SQLAlchemy session per request, committed before the client hears of it."""

from .access import get_session, get_sync_session, session_dependency
from .async_database import AsyncDatabase
from .current_unit import on_commit, set_rollback
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
from .health import Health
from .idle import warn_when_idle
from .middleware import DBSessionMiddleware
from .report import DatabaseReport, UnitReport
from .server_timing import ServerTimingMiddleware
from .sync_database import SyncDatabase

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
