"""Recognizes the error of a lost connection, and if the lost transaction could only read."""

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidRequestError

from .writes import may_only_read


def is_lost(context: ExceptionContext) -> bool:
    """Return True if the connection to the server was lost, or could not be made."""
    error = context.original_exception
    # If a task is cancelled, SQLAlchemy reports a disconnect too, although no connection was lost.
    # SQLAlchemy's own InvalidRequestError (MissingGreenlet, say) comes from wrong code.
    if not isinstance(error, Exception) or isinstance(error, InvalidRequestError):
        return False
    # asyncpg raises the socket's own error, which SQLAlchemy does not recognize as a disconnect.
    is_disconnect = context.is_disconnect or isinstance(error, ConnectionError)
    return is_disconnect or context.connection is None


def is_lost_read(context: ExceptionContext) -> bool:
    """Return True if a connection was lost in a read-only transaction, which changed nothing."""
    connection = context.connection
    # After its first error the connection is closed, and `may_only_read` has no information.
    if connection is None or connection.invalidated:
        return False
    return is_lost(context) and may_only_read(connection)
