"""Lets the sessions of a database on MariaDB or MySQL read without BEGIN and COMMIT."""

from collections.abc import Callable
from typing import Any
from weakref import ref

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.session._sqlalchemy import (
    handle_driver_error,
    is_flushing,
    isolation_level_on_connect,
)
from asgi_dbsession.session.read_only import ON_MARIADB, may_only_read
from asgi_dbsession.session.reads import Reads, delayed, has_foreign, isolation_level

from .delayed import watch_statements
from .mariadb_connections import (
    ReadingDialect,
    begin,
    connect_to_read,
    obey,
    watch_connections,
)


class AutocommitReads(Reads):
    """Lets sessions on MariaDB or MySQL read in autocommit mode until a statement may write.

    This class is used only if the application has set the option `autocommit_reads=True`.
    """

    def __init__(self) -> None:
        self.connect: Callable[[Any, Engine], Connection] | None = self._connect

    @override
    def watch(self, engine: Engine) -> None:
        if isinstance(engine.pool, StaticPool | SingletonThreadPool):
            raise ConfigurationError(
                "With `autocommit_reads=True`, each session needs a connection of its own. Leave "
                f"out `poolclass={type(engine.pool).__name__}`."
            )
        if isolation_level_on_connect(engine) != "AUTOCOMMIT":
            watch_statements(engine)
            watch_connections(engine)

    def _connect(self, session: Any, engine: Engine) -> Connection:
        """Open a connection for a session.

        The connection is in autocommit mode if the first statement of the session is probably a
        read, and if autocommit mode is safe. Otherwise the connection is in SQLAlchemy's usual
        mode, in which all statements are in a transaction.
        """
        if self.is_shared or not session._companion.expects_read or not _may_read(session, engine):
            return engine.connect()
        connection = connect_to_read(engine)
        delayed[ref(connection, delayed.pop)] = _begin
        return connection


def _may_read(session: Session, engine: Engine) -> bool:
    """Return True if autocommit mode is safe for a session now.

    Return False during a flush, or if a listener of the application may write on the driver's own
    connection, where this package sees no statements.
    """
    if not isinstance(engine.dialect, ReadingDialect) or is_flushing(session):
        return False
    # Return False if the application has a listener for `begin`, `after_begin` or `engine_connect`.
    # The listener may write. In autocommit mode, a rollback could not undo this write. Compare with
    # 1, because this package itself has one listener for `after_begin`.
    events = engine.dispatch
    if len(session.dispatch.after_begin) > 1 or events.begin or events.engine_connect:
        return False
    return not has_foreign(engine.pool.dispatch.checkout)


def _begin(connection: Connection, in_statement: bool) -> None:
    pooled = connection.connection
    if isolation_level(connection) == "AUTOCOMMIT":
        obey(pooled)
        return
    try:
        begin(pooled)
        if may_only_read(connection):
            pooled.cursor().execute(ON_MARIADB)
    except BaseException as error:
        if in_statement:
            raise
        handle_driver_error(connection, error)
