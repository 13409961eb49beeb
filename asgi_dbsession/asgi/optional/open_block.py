"""Refuses a response that starts inside a `begin()` block, before the block has committed."""

from typing import Any

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.unit.unit_of_work import UnitOfWork


def refuse_open_block(unit: UnitOfWork, innermost: UnitOfWork) -> None:
    """Raise an error if the response would start before a `begin()` block around it has committed.

    The block would commit or roll back after the response: a client could be told "201 Created" for
    a row that is never stored. This happens if a dependency of FastAPI, or another generator, has a
    `yield` in the block.

    Args:
        unit: The unit of work of the request.
        innermost: The unit of work that is current in the code that starts the response.

    Raises:
        ConfigurationError: A `begin()` block is open there and has uncommitted work, or was left
            without its end and has lost its work.
    """
    chain = list(innermost.chain())
    for each in chain[: chain.index(unit)] if unit in chain else ():
        if each.is_inner and (each.lost_work if each.closed else each.may_have_written):
            raise ConfigurationError(_text(each.databases[0]))


def _text(database: Any) -> str:
    return (
        f"A response would start before the `begin()` block on {database} around it commits. "
        "Nothing was sent, and nothing was stored. End the block before the response starts. In a "
        "dependency with `yield`, use `get_session()` instead of the block; in a middleware, write "
        "`begin(join=True)`."
    )
