"""Tests the shop as its owner would: each test is rolled back, without cleaning up."""

from collections.abc import Iterator
from contextlib import chdir
from typing import Any
from uuid import uuid4

import pytest
from starlette.testclient import TestClient

from asgi_dbsession.testing import count_statements, rolled_back
from example_app.app import app
from example_app.databases import reports, shop
from example_app.models import Product
from example_app.shop import fill_shelf

TEAPOT, CUP, BISCUIT = 1, 2, 3


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The running shop in a temporary folder, with its tables and products."""
    with (
        chdir(tmp_path_factory.mktemp("shop")),
        TestClient(app, raise_server_exceptions=False) as client,
    ):
        yield client


@pytest.fixture
def client(opened: TestClient) -> Iterator[TestClient]:
    """A client of the shop; its work in both databases is rolled back."""
    with rolled_back(shop, reports):
        yield opened


def order(client: TestClient, product: int, quantity: int = 1, **fields: str) -> Any:
    """Order, by default with a card that is approved."""
    wish = {"product": product, "quantity": quantity, "card": "approved"} | fields
    return client.post("/api/orders", json=wish)


def look(client: TestClient) -> dict[str, Any]:
    """Return all data of the shop."""
    return {name: client.get(f"/api/{name}").json() for name in ("products", "mails", "sales")}


def test_an_order_is_mailed_and_counted(client: TestClient) -> None:
    """Both databases have the order, and any later request sees it."""
    number = order(client, CUP, 2).json()["id"]
    assert client.get("/api/mails").json() == [f"Thank you for order {number}: 2 of Cup."]
    (sale,) = client.get("/api/sales").json()
    assert (sale["product"], sale["quantity"], sale["total"]) == ("Cup", 2, 1900)


@pytest.mark.parametrize("test", ["one", "another"])
def test_the_last_biscuit_is_there_for_every_test(client: TestClient, test: str) -> None:
    """The committed work of one test is not visible in the next."""
    assert [order(client, BISCUIT).status_code for _ in range(2)] == [201, 409]


@pytest.mark.parametrize(("card", "status"), [("declined", 402), ("crashing", 500)])
def test_a_card_that_fails_changes_nothing(client: TestClient, card: str, status: int) -> None:
    """No mail is sent, and earlier orders stay."""
    order(client, TEAPOT)
    before = look(client)
    assert order(client, TEAPOT, card=card).status_code == status
    assert look(client) == before


def test_an_order_that_is_sent_twice_is_mailed_once(client: TestClient) -> None:
    """COMMIT refuses the second order, as in production."""
    key = str(uuid4())
    assert [order(client, CUP, key=key).status_code for _ in range(2)] == [201, 409]
    assert len(client.get("/api/mails").json()) == 1


def test_a_busy_card_is_tried_again(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """The first attempt leaves nothing, and the customer does not notice it."""
    with caplog.at_level("INFO", "asgi_dbsession"):
        assert order(client, TEAPOT, card="busy").status_code == 201
    assert sum("ProviderBusy" in each.getMessage() for each in caplog.records) == 1
    shown = look(client)
    assert (shown["products"][0]["stock"], len(shown["mails"]), len(shown["sales"])) == (11, 1, 1)


def test_the_shelf_is_filled_in_a_request_and_outside(client: TestClient) -> None:
    """The request commits what the function does in it; outside, the function commits."""

    def biscuits() -> int:
        return int(client.get("/api/products").json()[BISCUIT - 1]["stock"])

    order(client, BISCUIT)
    assert biscuits() == 0
    assert client.post("/shelf", follow_redirects=False).status_code == 303
    assert biscuits() == 1
    order(client, BISCUIT)
    assert client.portal is not None
    client.portal.call(fill_shelf)
    assert biscuits() == 1


def test_what_a_test_puts_on_the_shelf_is_sold(client: TestClient) -> None:
    """A session of the test works in the event loop of the application."""

    async def stock_honey() -> int:
        async with shop.begin() as session:
            honey = Product(name="Honey", price=7_00, stock=1)
            session.add(honey)
            await session.flush()
            return honey.id

    assert client.portal is not None
    honey = client.portal.call(stock_honey)
    assert order(client, honey).json()["total"] == 700


def test_lists_and_page_take_the_same_few_statements_for_many_orders(client: TestClient) -> None:
    """The page needs four SELECTs, one for each list, and none for each order."""
    for product in (TEAPOT, CUP, BISCUIT):
        order(client, product)
    with count_statements(shop, reports, at_most=1):
        assert len(client.get("/api/orders").json()) == 3
    with count_statements(shop, reports, at_most=4):
        assert client.get("/").status_code == 200


def test_an_order_takes_six_statements(client: TestClient) -> None:
    """The order is: stock, order, payment and sale; then the mail; then the parcel."""
    with count_statements(shop, reports) as statements:
        assert order(client, TEAPOT).status_code == 201
    firsts = [" ".join(each.split()[:3]).lower() for each in statements]
    assert firsts == [
        "update product set",
        "insert into orders",
        "insert into payment",
        "insert into sale",
        "insert into mail",
        "update orders set",
    ]
