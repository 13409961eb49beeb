"""Two-phase commit: checks the databases, and logs the prepared transactions."""

import logging
from collections.abc import Sequence

from sqlalchemy import URL, Connection
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.engine.interfaces import Dialect

from asgi_dbsession.errors import ConfigurationError, without_secrets

from ._sqlalchemy import is_prepared

_logger = logging.getLogger("asgi_dbsession")


def refuse_one_phase(database: object, url: URL) -> None:
    """Refuse a database that does not support two-phase commit.

    Raises:
        ConfigurationError: The SQLAlchemy dialect of the database has no two-phase commit.
    """
    if url.get_dialect().do_begin_twophase is Dialect.do_begin_twophase:
        raise ConfigurationError(
            f"{database} cannot commit in two phases. Leave out `two_phase=True`, or give this "
            "database to a DBSessionMiddleware of its own without it."
        )


def prepared(connections: Sequence[Connection]) -> str:
    """Return the prepared transactions of the connections, as `XID on DATABASE`; empty if none."""
    transactions = ((each.get_transaction(), each.engine.url) for each in connections)
    return ", ".join(
        f"{transaction.xid} on {without_secrets(url)}"
        for transaction, url in transactions
        if isinstance(transaction, TwoPhaseTransaction) and is_prepared(transaction)
    )


def log_decision(transactions: Sequence[str]) -> None:
    """Log all prepared transactions before the first one is committed."""
    _logger.info("Prepared, and to be committed: %s", ", ".join(filter(None, transactions)))


def log_doubt(transaction: str, error: BaseException) -> None:
    """Log a prepared transaction whose COMMIT failed or whose result is unknown."""
    _logger.error("In doubt, and to be committed: %s", transaction, exc_info=error)
