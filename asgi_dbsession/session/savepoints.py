"""Finds the savepoints and transactions around a savepoint of a session."""

from collections.abc import Iterator

from sqlalchemy.orm import SessionTransaction


def with_outer(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    """Yield a savepoint, the savepoint around it, and so on, up to the transaction itself."""
    while transaction is not None:
        yield transaction
        transaction = transaction.parent
