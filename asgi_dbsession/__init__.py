"""One SQLAlchemy session per request, committed before the response is sent."""

import importlib as _importlib
import typing as _typing

from .asgi.middleware import DBSessionMiddleware
from .asgi.rules import safe_methods
from .database.async_database import AsyncDatabase
from .database.health import Health
from .database.replicas import Replicas
from .database.sync_database import SyncDatabase
from .errors import (
    ConcurrentUse,
    ConfigurationError,
    DatabaseNotRunning,
    DatabaseUnavailable,
    DBSessionError,
    ForbiddenWrite,
    NoSession,
    PrematureClose,
    SessionClosed,
    TransactionAborted,
)
from .unit.attempt import Attempt, current_attempt
from .unit.current import get_session, get_sync_session, session_dependency
from .unit.decisions import set_rollback
from .unit.report import DatabaseReport, UnitReport

if _typing.TYPE_CHECKING:
    from .reports.idle import warn_when_idle
    from .reports.server_timing import ServerTimingMiddleware
    from .unit.optional.after_commit.give import on_commit

__all__ = [
    "AsyncDatabase",
    "Attempt",
    "ConcurrentUse",
    "ConfigurationError",
    "DBSessionError",
    "DBSessionMiddleware",
    "DatabaseNotRunning",
    "DatabaseReport",
    "DatabaseUnavailable",
    "ForbiddenWrite",
    "Health",
    "NoSession",
    "PrematureClose",
    "Replicas",
    "ServerTimingMiddleware",
    "SessionClosed",
    "SyncDatabase",
    "TransactionAborted",
    "UnitReport",
    "current_attempt",
    "get_session",
    "get_sync_session",
    "on_commit",
    "safe_methods",
    "session_dependency",
    "set_rollback",
    "warn_when_idle",
]

# Names from optional parts of the package. Each is imported when an application first uses it.
_OPTIONAL = {
    "ServerTimingMiddleware": "reports.server_timing",
    "on_commit": "unit.optional.after_commit.give",
    "warn_when_idle": "reports.idle",
}


def __getattr__(name: str) -> _typing.Any:
    if name not in _OPTIONAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(f"{__name__}.{_OPTIONAL[name]}")
    found = globals()[name] = getattr(module, name)
    return found
