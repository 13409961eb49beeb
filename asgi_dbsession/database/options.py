"""Types for the option `session_options`, so that type checkers know its keys."""

from typing import Any, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Query, Session
from typing_extensions import TypedDict, TypeVar

AnyAsyncSession = TypeVar("AnyAsyncSession", bound=AsyncSession, default=AsyncSession)
AnySession = TypeVar("AnySession", bound=Session, default=Session)


class _Options(TypedDict, total=False):
    autobegin: bool
    autoflush: bool
    binds: dict[Any, Any]
    enable_baked_queries: bool
    execution_options: dict[str, Any]
    expire_on_commit: bool
    info: dict[Any, Any]
    join_transaction_mode: Any
    query_cls: type[Query[Any]]
    twophase: bool


class SessionOptions(_Options, Generic[AnySession], total=False):
    """The options of `sqlalchemy.orm.Session`; `class_` is the session class to use.

    Source: https://docs.sqlalchemy.org/en/20/orm/session_api.html#sqlalchemy.orm.Session
    """

    class_: type[AnySession]


class AsyncSessionOptions(_Options, Generic[AnyAsyncSession], total=False):
    """The options of `sqlalchemy.ext.asyncio.AsyncSession`; `class_` is the session class to use.

    This package commits the `Session` inside the `AsyncSession`. It never calls the method
    `AsyncSession.commit`. So to change what happens at COMMIT, use `sync_session_class` or
    SQLAlchemy's events. Source:
    https://docs.sqlalchemy.org/en/20/orm/extensions/asyncio.html#sqlalchemy.ext.asyncio.AsyncSession
    """

    class_: type[AnyAsyncSession]
    sync_session_class: type[Session]
