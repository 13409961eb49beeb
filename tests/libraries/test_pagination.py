"""Pagination: no row is skipped or repeated, and no connection is held while the client reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange
from conftest import checked_out
from library import STORES, Library, library
from pages import Page

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/pagination.md")
PRICES = [5, 3, 5, 1, 5, 3, 2]


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        module = found.load("shop")
        with found.reader.begin() as connection:
            rows = [{"id": number, "price": price} for number, price in enumerate(PRICES, 1)]
            connection.execute(module.Item.__table__.insert(), rows)
        yield found


async def get(module: Any, path: str, query: str = "") -> Any:
    """Ask for JSON; nothing is checked out once the response begins."""
    exchange = Exchange(
        module.app, path, on_message=lambda _: held.append(checked_out(module.database))
    )
    held: list[int] = []
    exchange.scope["query_string"] = query.encode()
    async with module.database:
        await exchange.run()
    assert exchange.status == 200, exchange.body
    assert set(held) == {0}
    return json.loads(exchange.body)


async def test_pages_by_keyset_have_each_row_once(page: Library) -> None:
    """Also a page that ends with the last row, and rows that are inserted meanwhile."""
    module = page.load("shop")
    after: int | None = 0
    seen: list[int] = []
    while after is not None:
        found = await get(module, "/items", f"after={after}&size=3")
        seen += [each["id"] for each in found["items"]]
        after = found["next"]
        if len(seen) == 3:
            page.execute("DELETE FROM item WHERE id = 2")  # an offset would skip a row now
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert (await get(module, "/items", "after=4&size=3"))["next"] is None


async def test_pages_by_price_have_each_row_once(page: Library) -> None:
    """Although three rows have the same price, and two pages end between them."""
    module = page.load("shop")
    seen: list[dict[str, int]] = []
    for _ in range(4):
        last = seen[-1] if seen else {"price": 0, "id": 0}
        query = f"after_price={last['price']}&after_id={last['id']}&size=2"
        seen += await get(module, "/by-price", query)
    ordered = sorted(zip(PRICES, range(1, 8), strict=True))
    assert [(each["price"], each["id"]) for each in seen] == ordered


async def test_an_offset_counts_and_skips_as_the_page_warns(page: Library) -> None:
    """The total is right; a row that is deleted shifts the next page."""
    module = page.load("shop")
    first = await get(module, "/numbered", "size=3")
    assert ([each["id"] for each in first["items"]], first["total"]) == ([1, 2, 3], 7)
    page.execute("DELETE FROM item WHERE id = 2")
    second = await get(module, "/numbered", "size=3&page=2")
    assert ([each["id"] for each in second["items"]], second["total"]) == ([5, 6, 7], 6)


async def test_fastapi_pagination_uses_the_session_of_the_request(page: Library) -> None:
    """Its page has items and total."""
    page.load("paginated")
    module = page.load("shop")
    found = await get(module, "/pages", "size=3&page=3")
    assert found["items"] == [{"id": 7, "price": 2}]
    assert (found["total"], found["pages"]) == (7, 3)


async def test_a_page_has_a_largest_size(page: Library) -> None:
    """Larger ones are refused."""
    module = page.load("shop")
    exchange = Exchange(module.app, "/items")
    exchange.scope["query_string"] = b"size=101"
    assert (await exchange.run()).status == 422
