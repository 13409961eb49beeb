"""Decides if an error means that a connection was lost."""

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidRequestError


def is_lost(context: ExceptionContext) -> bool:
    """Return True if the error means that the connection was lost or could not be opened."""
    error = context.original_exception
    # If a task is cancelled, SQLAlchemy reports a disconnect too, although the connection was not
    # lost. `InvalidRequestError` and its subclasses (`MissingGreenlet`, for example) report wrong
    # use of SQLAlchemy, not a lost connection.
    if not isinstance(error, Exception) or isinstance(error, InvalidRequestError):
        return False
    # asyncpg raises Python's `ConnectionError` for a lost connection. SQLAlchemy does not recognize
    # this error as a disconnect.
    return context.is_disconnect or isinstance(error, ConnectionError) or context.connection is None
