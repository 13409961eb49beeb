"""Gives an engine a pool with one shared connection for a test, and restores its own pool."""

import asyncio
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Engine

from asgi_dbsession.database.base import Database
from asgi_dbsession.database.engines import sync_engine_of
from asgi_dbsession.errors import ConfigurationError, kind_of, without_secrets
from asgi_dbsession.session._sqlalchemy import original_engine

from .dialect import SavepointDialect, with_savepoints
from .isolation import Isolation
from .pool import SharedPool


def check_databases(name: str, databases: tuple[object, ...]) -> None:
    """Check the arguments of a function of `asgi_dbsession.testing`.

    Raises:
        ConfigurationError: No argument was given, or an argument is not a database object.
    """
    wrong = [each for each in databases if not isinstance(each, Database)]
    if wrong or not databases:
        given = kind_of(wrong[0]) if wrong else "nothing"
        raise ConfigurationError(
            f"{name} takes the database objects of the application (AsyncDatabase, SyncDatabase), "
            f"and was given {given}."
        )


def share(engine: Engine, isolation: Isolation) -> None:
    """Let all transactions of an engine use one shared connection, one after the other.

    The engine's own pool opens this connection later, so that listeners for the pool's events are
    called.

    Raises:
        ConfigurationError: `share` was called for the engine already.
    """
    name = without_secrets(engine.url)
    if isinstance(engine.pool, SharedPool):
        raise ConfigurationError(
            f"{name} is inside of `rolled_back` already: use it once for each test."
        )
    dialect = engine.dialect
    # Give the dialect object a subclass of its class, whose BEGIN and COMMIT use savepoints. Skip
    # this if an earlier test has left such a subclass there, because code of that test was still
    # using a connection. Python cannot derive a second such subclass from the first (TypeError).
    if not isinstance(dialect, SavepointDialect):
        dialect.__class__ = with_savepoints(type(dialect))
    engine.pool = SharedPool(engine.pool, dialect, name, isolation)


def unshare(engine: Engine) -> None:
    """At the end of a test, roll back all work of the test, and restore the engine's own pool.

    Do nothing if `share` was not called for the engine.
    """
    pool, dialect = engine.pool, engine.dialect
    if isinstance(pool, SharedPool):
        try:
            pool.roll_back()
        finally:
            engine.pool = pool.source
            # Give the dialect object its original class back, unless code of the test still uses a
            # connection. Then keep the class of the test (`SavepointDialect`), which lets all later
            # statements of this code raise an error.
            if pool.checkedout() == 0:
                dialect.__class__ = type(dialect).__bases__[1]


def home_of(engine: Engine) -> asyncio.AbstractEventLoop | None:
    """Return the event loop to which the connection of an engine belongs in a test.

    In a test, all code that uses the engine gets the same connection. None if this connection is
    not open yet, or if its driver needs no event loop.
    """
    return engine.pool.loop if isinstance(engine.pool, SharedPool) else None


def engines_of(database: Database[Any, Any, Any]) -> Iterator[Engine]:
    """Yield the engines of a database object: its own engine, and those in `binds`.

    An engine that a session class returns from its own `get_bind` is found only when a session uses
    it.
    """
    if database._engine is not None:
        yield original_engine(sync_engine_of(database._engine))
    for bind in (database._session_options.get("binds") or {}).values():
        engine = sync_engine_of(bind)
        if isinstance(engine, Engine):
            yield original_engine(engine)
