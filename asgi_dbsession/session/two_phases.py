"""What is prepared on several databases, and who may still decide on it."""

import logging
from collections.abc import Sequence

from sqlalchemy import URL, Connection
from sqlalchemy.engine import Transaction, TwoPhaseTransaction
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import Session

from asgi_dbsession.database.url import without_secrets
from asgi_dbsession.errors import ConfigurationError

_logger = logging.getLogger("asgi_dbsession")


def refuse_one_phase(database: object, url: URL) -> None:
    """Refuse a database that cannot commit in two phases.

    Raises:
        ConfigurationError: It is of that kind.
    """
    if url.get_dialect().do_begin_twophase is Dialect.do_begin_twophase:
        raise ConfigurationError(
            f"{database} cannot commit in two phases. Leave out `two_phase=True`, or give this "
            "database to a DBSessionMiddleware of its own that has none."
        )


def costs_its_connection(transaction: Transaction, statement: str | None) -> bool:
    """Whether a failed step of an end in two phases leaves a connection that is of no use.

    What is prepared can only be decided on without it; MariaDB lets go of what it has refused to
    end only with it; and psycopg counts as prepared what was not, and tells of no statement.
    """
    if not isinstance(transaction, TwoPhaseTransaction):
        return False
    return transaction._is_prepared or statement is None or statement.startswith("XA ")


def prepared(session: Session) -> str:
    """What the session has prepared, as `XID on DATABASE`; nothing, if it is in one phase."""
    connections: Sequence[Connection] = getattr(session, "_connections", ())
    return ", ".join(
        f"{transaction.xid} on {without_secrets(each.engine.url)}"
        for each in connections
        if isinstance(transaction := each.get_transaction(), TwoPhaseTransaction)
        and transaction._is_prepared
    )


def note_decision(transactions: Sequence[str]) -> None:
    """Write down that all of these are to be committed, before the first of them is."""
    _logger.info("Prepared, and to be committed: %s", ", ".join(filter(None, transactions)))


def note_doubt(transaction: str, error: BaseException) -> None:
    """Write down which one of them was not committed, as far as one knows."""
    _logger.error("In doubt, and to be committed: %s", transaction, exc_info=error)
