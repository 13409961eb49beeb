"""Refuses a response that starts inside a `begin()` block, if the block has uncommitted work."""

from typing import Any

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.unit.unit_of_work import UnitOfWork


def refuse_open_block(unit: UnitOfWork, innermost: UnitOfWork) -> None:
    """Called before a response starts: raise an error if it would start inside a `begin()` block.

    Such a block would commit or roll back only after the response has started. So a client could be
    told "201 Created" for a row that is never stored. This happens if a dependency of FastAPI, or
    another generator, has a `yield` inside `async with database.begin()`.

    A response may start inside a block without uncommitted work. If an exception has ended the
    block already (because the generator was closed early, for example), raise an error only if the
    writes of the block were rolled back.

    Args:
        unit: The unit of work of the request: its sessions, which commit together.
        innermost: The innermost unit of work (a request or a `begin()` block) around the code that
            starts the response.

    Raises:
        ConfigurationError: A `begin()` block inside the request has uncommitted work, or its work
            was rolled back because of an exception.
    """
    chain = list(innermost.chain())
    for each in chain[: chain.index(unit)] if unit in chain else ():
        if each.is_inner and (each.lost_work if each.closed else each.may_have_written):
            raise ConfigurationError(_text(each.databases[0]))


def _text(database: Any) -> str:
    return (
        f"A response would start before the `begin()` block on {database} around it commits. "
        "Nothing was sent, and all uncommitted work is rolled back. End the block before the "
        "response starts. In a dependency with `yield`, use `get_session()` instead of the block; "
        "in a middleware, write `begin(join=True)`."
    )
