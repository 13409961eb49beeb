"""What the shop remembers."""

from datetime import date
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class ShopBase(DeclarativeBase):
    """What the tables of the shop belong to."""


class ReportBase(DeclarativeBase):
    """What the tables of the reports belong to: another database, so no key leads across."""


class Product(ShopBase):
    """Something on the shelf. Money is in cents."""

    __tablename__ = "product"
    # The last line of defence: `take_stock` never gets here, and a mistake in it never gets past.
    __table_args__ = (CheckConstraint("stock >= 0", name="stock_is_never_negative"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    price: Mapped[int]
    stock: Mapped[int]


class Order(ShopBase):
    """A number of one product, at the price of that moment."""

    __tablename__ = "orders"  # ORDER is a word of SQL's
    __table_args__ = (CheckConstraint("quantity > 0", name="quantity_is_positive"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), index=True)
    quantity: Mapped[int]
    total: Mapped[int]
    packed: Mapped[bool] = mapped_column(default=False)

    product: Mapped[Product] = relationship(lazy="joined", innerjoin=True)


class Payment(ShopBase):
    """What a card was charged for an order. No key is charged twice."""

    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), unique=True)
    amount: Mapped[int]
    key: Mapped[UUID] = mapped_column(unique=True)


class Mail(ShopBase):
    """What has left the shop: as with any mail, no ROLLBACK of anything takes it back."""

    __tablename__ = "mail"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Sale(ReportBase):
    """What was sold, in the words of that day: products come and go, reports stay."""

    __tablename__ = "sale"

    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(index=True)
    product: Mapped[str]
    quantity: Mapped[int]
    total: Mapped[int]
