"""The routes of the shop: pages for browsers, JSON and CSV for programs."""

import csv
from collections.abc import AsyncIterator, Iterable, Mapping
from http import HTTPStatus
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import RowMapping
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from . import shop
from .models import Order, Product
from .shop import Card, Refusal, Wish

MOST = 999


def money(cents: int) -> str:
    """An amount in cents, formatted for people."""
    return f"€ {cents // 100}.{cents % 100:02}"


templates = Jinja2Templates(Path(__file__).parent / "templates")
templates.env.filters["money"] = money


async def show_shop(request: Request) -> Response:
    """The page: the shelf, an order form, and the latest orders."""
    context = {
        "products": await shop.products(),
        "orders": await shop.latest_orders(),
        "mails": await shop.latest_mails(),
        "sales": await shop.latest_sales(),
        "cards": Card,
        "most": MOST,
        "key": uuid4(),
    }
    return templates.TemplateResponse(request, "shop.html", context)


async def order_by_form(request: Request) -> Response:
    """Place the order of the form, and redirect the browser to the page."""
    async with request.form() as form:
        wish = read_wish(form)
    order = await shop.place_order(wish)
    return RedirectResponse(
        f"/#order-{order.id}",
        status_code=HTTPStatus.SEE_OTHER,
        background=BackgroundTask(shop.pack, order),
    )


async def fill_shelf(_request: Request) -> Response:
    """Fill the shelf, and redirect the browser to the page."""
    await shop.fill_shelf()
    return RedirectResponse("/#shelf", status_code=HTTPStatus.SEE_OTHER)


async def list_products(_request: Request) -> Response:
    """The shelf, as JSON."""
    return JSONResponse([product_as_json(product) for product in await shop.products()])


async def list_orders(_request: Request) -> Response:
    """The latest orders, as JSON."""
    return JSONResponse([order_as_json(order) for order in await shop.latest_orders()])


async def list_mails(_request: Request) -> Response:
    """The latest mails, as JSON."""
    return JSONResponse([mail.text for mail in await shop.latest_mails()])


async def list_sales(_request: Request) -> Response:
    """The sales of the last days, as JSON."""
    return JSONResponse([sale_as_json(sale) for sale in await shop.latest_sales()])


async def order_by_json(request: Request) -> Response:
    """Place an order that is sent as JSON."""
    order = await shop.place_order(read_wish(await read_json_object(request)))
    return JSONResponse(
        order_as_json(order),
        status_code=HTTPStatus.CREATED,
        background=BackgroundTask(shop.pack, order),
    )


async def export_orders(_request: Request) -> Response:
    """All orders as CSV, read page by page while the response is sent."""
    return StreamingResponse(
        orders_as_csv(),
        media_type="text/csv",
        headers={"Content-Disposition": 'attachment; filename="orders.csv"'},
    )


async def show_failure(request: Request, error: Exception) -> Response:
    """The error, as a page for a browser and as JSON for a program."""
    status, message, headers = HTTPStatus.INTERNAL_SERVER_ERROR, "Something broke.", None
    if isinstance(error, Refusal):
        status, message = error.status, str(error)
    elif isinstance(error, HTTPException):
        status, message, headers = HTTPStatus(error.status_code), error.detail, error.headers
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status_code=status, headers=headers)
    context = {"status": status, "message": message}
    return templates.TemplateResponse(
        request, "failure.html", context, status_code=status, headers=headers
    )


def product_as_json(product: Product) -> dict[str, Any]:
    """A product as JSON."""
    return {
        "id": product.id,
        "name": product.name,
        "price": product.price,
        "stock": product.stock,
    }


def order_as_json(order: Order) -> dict[str, Any]:
    """An order as JSON."""
    return {
        "id": order.id,
        "product": order.product.name,
        "quantity": order.quantity,
        "total": order.total,
        "packed": order.packed,
    }


def sale_as_json(sale: RowMapping) -> dict[str, Any]:
    """The sales of a product on a day, as JSON."""
    return {**sale, "day": sale["day"].isoformat()}


async def orders_as_csv() -> AsyncIterator[str]:
    """All orders, a header first; the middleware's session serves a streaming body too."""
    yield csv_lines([("order", "product", "quantity", "total")])
    async for page in shop.all_orders():
        yield csv_lines(
            (order.id, order.product.name, order.quantity, order.total) for order in page
        )


def csv_lines(rows: Iterable[tuple[object, ...]]) -> str:
    """Rows, as lines of CSV."""
    lines = StringIO()
    csv.writer(lines).writerows(rows)
    return lines.getvalue()


async def read_json_object(request: Request) -> Mapping[str, object]:
    """The object in the body of a request.

    Raises:
        Refusal: There is none.
    """
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise Refusal("The body is not JSON.") from error
    if not isinstance(body, dict):
        raise Refusal("The body is not a JSON object.")
    return body


def read_wish(fields: Mapping[str, object]) -> Wish:
    """The order in a form or a JSON body.

    Args:
        fields: `product`, `quantity`, `card`, and perhaps `key`: without one, nothing protects
            the customer from ordering twice.

    Raises:
        Refusal: One of them is missing, or makes no sense.
    """
    product_id = read_number(fields, "product")
    quantity = read_number(fields, "quantity")
    try:
        card = Card(str(fields.get("card")))
    except ValueError as error:
        raise Refusal(f"The card is one of: {', '.join(Card)}.") from error
    try:
        key = UUID(str(fields.get("key", uuid4())))
    except ValueError as error:
        raise Refusal("The key is not a UUID.") from error
    return Wish(product_id, quantity, card, key)


def read_number(fields: Mapping[str, object], name: str) -> int:
    """A whole number from 1 to 999, from a form or from JSON.

    Raises:
        Refusal: It is anything else.
    """
    try:
        number = int(str(fields.get(name)))
    except ValueError:
        number = 0
    if not 1 <= number <= MOST:
        raise Refusal(f"The {name} is not a whole number from 1 to {MOST}.")
    return number


routes = [
    Route("/", show_shop),
    Route("/orders", order_by_form, methods=["POST"]),
    Route("/orders.csv", export_orders),
    Route("/shelf", fill_shelf, methods=["POST"]),
    Route("/api/products", list_products),
    Route("/api/orders", list_orders),
    Route("/api/orders", order_by_json, methods=["POST"]),
    Route("/api/mails", list_mails),
    Route("/api/sales", list_sales),
]
