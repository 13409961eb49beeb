"""A duplicate is answered with 409 wherever it fails, and nothing of its request is stored."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange
from conftest import checked_out
from library import STORES, Library, library
from pages import Page
from sqlalchemy.exc import IntegrityError

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/unique-constraints.md")


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


async def ask(module: Any, method: str, path: str) -> Exchange:
    """Ask for a change of the item `tea`."""
    exchange = Exchange(module.app, path, method=method)
    exchange.scope["query_string"] = b"name=tea"
    await exchange.run()
    assert checked_out(module.database) == 0
    return exchange


@pytest.mark.parametrize("path", ["/items", "/items-with-id"])
async def test_a_duplicate_is_answered_with_409(page: Library, path: str) -> None:
    """At COMMIT and at a flush."""
    module = page.load("shop")
    async with module.database:
        assert (await ask(module, "POST", path)).status == 201
        exchange = await ask(module, "POST", path)
    assert (exchange.status, exchange.body) == (409, b'{"detail":"The name is taken."}')
    assert exchange.error is None
    assert page.stored("SELECT name FROM item") == ["tea"]


async def test_a_handler_can_continue_after_a_duplicate(page: Library) -> None:
    """With the savepoint of the page."""
    module = page.load("shop")
    async with module.database:
        first = await ask(module, "PUT", "/items/tea")
        second = await ask(module, "PUT", "/items/tea")
    assert (first.status, second.status) == (200, 200)
    assert first.body == second.body
    assert page.stored("SELECT name FROM item") == ["tea"]


async def test_the_message_of_the_database_tells_constraints_apart(page: Library) -> None:
    """By the name of the constraint, or by the columns on SQLite."""
    module = page.load("shop")
    async with module.database:
        assert (await ask(module, "POST", "/items")).status == 201
        with pytest.raises(IntegrityError) as caught:
            async with module.database.begin() as session:
                session.add(module.Item(name="tea"))
    name = "item.name" if "sqlite" in page.url else "one_item_per_name"
    assert name in str(caught.value.orig)
    assert "UNIQUE constraint failed: item.name" in PAGE.text
