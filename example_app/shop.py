"""The work of the shop. No function here calls `commit()` or takes a session as a parameter."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from uuid import UUID

from sqlalchemy import RowMapping, func, select, update

from asgi_dbsession import current_attempt, get_session, on_commit

from . import databases
from .databases import reports
from .models import Mail, Order, Payment, Product, Sale

PAGE = 100
LATEST = 20
SHELF = [
    ("Teapot", 39_00, 12),
    ("Cup", 9_50, 48),
    ("The last biscuit", 2_50, 1),
]


class Card(StrEnum):
    """How a customer pays."""

    APPROVED = "approved"
    BUSY = "busy"
    DECLINED = "declined"
    CRASHING = "crashing"


@dataclass(frozen=True)
class Wish:
    """An order as the customer asked for it, with checked types and ranges.

    Args:
        product_id: The product's id; the product may not exist.
        quantity: The number of items, at least one.
        card: The card to charge.
        key: An idempotency key: sending the same order twice does not charge twice.
    """

    product_id: int
    quantity: int
    card: Card
    key: UUID


class Refusal(Exception):
    """An order that the shop refuses. The message is shown to the customer."""

    status = HTTPStatus.BAD_REQUEST


class UnknownProduct(Refusal):
    """There is no product with that number."""

    status = HTTPStatus.NOT_FOUND


class OutOfStock(Refusal):
    """There is not enough on the shelf."""

    status = HTTPStatus.CONFLICT


class AlreadyPaid(Refusal):
    """The same wish was paid before."""

    status = HTTPStatus.CONFLICT


class PaymentDeclined(Refusal):
    """The card was not charged."""

    status = HTTPStatus.PAYMENT_REQUIRED


class ProviderBusy(Exception):
    """The payment provider wants to be asked again. The middleware retries the whole request."""


@databases.shop.begin(join=True)
async def fill_shelf() -> None:
    """Put on the shelf what is missing there: products, and items of each.

    In a request, or in another transaction, this is a part of it. Elsewhere it commits by itself.
    """
    session = get_session()
    found = {each.name: each for each in await session.scalars(select(Product))}
    for name, price, stock in SHELF:
        if name not in found:
            session.add(Product(name=name, price=price, stock=stock))
        elif found[name].stock < stock:
            found[name].stock = stock


async def place_order(wish: Wish) -> Order:
    """Take the stock, write the order, count the sale, charge the card: all of it, or nothing.

    The payment comes last. If it fails, there is work to roll back, and a mail that must not be
    sent.

    Returns:
        The order, not committed yet. The middleware commits before it sends the response.

    Raises:
        UnknownProduct: The product does not exist.
        OutOfStock: The stock is smaller than the quantity.
        PaymentDeclined: The card was declined.
        ProviderBusy: The order can be placed again at once.
    """
    product = await take_stock(wish.product_id, wish.quantity)
    order = await write_order(product, wish.quantity)
    count_sale(order)
    thanks = f"Thank you for order {order.id}: {order.quantity} of {product.name}."
    on_commit(partial(send_mail, thanks))
    charge(order, wish.card, wish.key)
    return order


async def take_stock(product_id: int, quantity: int) -> Product:
    """Reduce the stock of a product.

    Raises:
        UnknownProduct: The product does not exist.
        OutOfStock: The stock is smaller than the quantity.
    """
    # One statement checks and takes the stock, so two customers cannot both get the last item.
    product: Product | None = await get_session().scalar(
        update(Product)
        .where(Product.id == product_id, Product.stock >= quantity)
        .values(stock=Product.stock - quantity)
        .returning(Product)
    )
    if product is not None:
        return product
    known = await get_session().get(Product, product_id)
    if known is None:
        raise UnknownProduct("There is no such product.")
    raise OutOfStock(f"{known.name}: only {known.stock} left.")


async def write_order(product: Product, quantity: int) -> Order:
    """Write an order. The flush gives the order its number."""
    order = Order(product=product, quantity=quantity, total=quantity * product.price)
    get_session().add(order)
    await get_session().flush()
    return order


def count_sale(order: Order) -> None:
    """Count an order in the database of the reports."""
    sale = Sale(
        day=datetime.now(UTC).date(),
        product=order.product.name,
        quantity=order.quantity,
        total=order.total,
    )
    reports.get_session().add(sale)


def charge(order: Order, card: Card, key: UUID) -> None:
    """Charge a card for an order, once per key.

    The payment is inserted by COMMIT. A key that was used before fails there, after the handler
    has returned its success, and the customer gets an error instead of the success.

    Raises:
        PaymentDeclined: The card was declined.
        ProviderBusy: The card is busy, and this is the first attempt.
        ConnectionError: The card crashes.
    """
    if card is Card.BUSY and current_attempt().number == 1:
        raise ProviderBusy
    if card is Card.DECLINED:
        raise PaymentDeclined("The card was declined.")
    if card is Card.CRASHING:
        raise ConnectionError("The payment provider hung up.")
    get_session().add(Payment(order_id=order.id, amount=order.total, key=key))


async def send_mail(text: str) -> None:
    """Send a mail. In this example, sending means writing to an outbox that the page shows.

    Called after COMMIT, it has a session, and a transaction, of its own.
    """
    get_session().add(Mail(text=text))


async def pack(order: Order) -> None:
    """Pack an order. Runs in the background, after the response.

    The session of the request goes on there, and commits in the end what has changed since.
    """
    order.packed = True


async def products() -> Sequence[Product]:
    """Everything on the shelf."""
    return (await get_session().scalars(select(Product).order_by(Product.id))).all()


async def latest_orders() -> Sequence[Order]:
    """The last few orders, newest first."""
    orders = select(Order).order_by(Order.id.desc()).limit(LATEST)
    return (await get_session().scalars(orders)).all()


async def latest_mails() -> Sequence[Mail]:
    """The latest mails, newest first."""
    return (await get_session().scalars(select(Mail).order_by(Mail.id.desc()).limit(LATEST))).all()


async def latest_sales() -> Sequence[RowMapping]:
    """What was sold on the last days, newest first: day, product, quantity, total."""
    total = func.sum(Sale.total).label("total")
    sales = (
        select(Sale.day, Sale.product, func.sum(Sale.quantity).label("quantity"), total)
        .group_by(Sale.day, Sale.product)
        .order_by(Sale.day.desc(), total.desc())
        .limit(LATEST)
    )
    return (await reports.get_session().execute(sales)).mappings().all()


async def all_orders() -> AsyncIterator[Sequence[Order]]:
    """Every order, oldest first, a page at a time.

    Yields:
        A page; no connection is held while the caller is busy with it.
    """
    session = get_session()
    last = 0
    while True:
        page = select(Order).where(Order.id > last).order_by(Order.id).limit(PAGE)
        async with session.begin():
            orders = (await session.scalars(page)).all()
        if not orders:
            return
        yield orders
        last = orders[-1].id
        session.expunge_all()  # or the session keeps every order of a long export
