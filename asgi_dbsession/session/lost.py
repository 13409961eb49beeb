"""Recognizes the error of a lost connection, and the work that it cannot have changed."""

from sqlalchemy.engine import ExceptionContext

from .writes import may_only_read


def is_lost(context: ExceptionContext) -> bool:
    """Return True if the connection to the server was lost, or could not be made."""
    error = context.original_exception
    # SQLAlchemy also closes the connection of a cancelled task, and then calls it disconnected.
    if not isinstance(error, Exception):
        return False
    # asyncpg raises the error of the socket itself, which SQLAlchemy does not take for its own.
    is_disconnect = context.is_disconnect or isinstance(error, ConnectionError)
    return is_disconnect or context.connection is None


def is_lost_read(context: ExceptionContext) -> bool:
    """Return True if a connection was lost whose transaction may only read: it changed nothing."""
    connection = context.connection
    # After the first error, the connection is closed and can tell nothing any more.
    if connection is None or connection.invalidated:
        return False
    return is_lost(context) and may_only_read(connection)
