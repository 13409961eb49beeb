"""The tables of the shop and of its reports."""

from datetime import date
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class ShopBase(DeclarativeBase):
    """The base of the tables of the shop."""


class ReportBase(DeclarativeBase):
    """The base of the tables of the reports, in another database: no foreign key crosses."""


class Product(ShopBase):
    """A product. Prices are in cents."""

    __tablename__ = "product"
    # A second check: `take_stock` never makes the stock negative, and a mistake in it fails here.
    __table_args__ = (CheckConstraint("stock >= 0", name="stock_is_never_negative"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    price: Mapped[int]
    stock: Mapped[int]


class Order(ShopBase):
    """An order: a quantity of one product, at its price when it was ordered."""

    __tablename__ = "orders"  # ORDER is reserved in SQL
    __table_args__ = (CheckConstraint("quantity > 0", name="quantity_is_positive"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), index=True)
    quantity: Mapped[int]
    total: Mapped[int]
    packed: Mapped[bool] = mapped_column(default=False)

    product: Mapped[Product] = relationship(lazy="joined", innerjoin=True)


class Payment(ShopBase):
    """The payment of an order. The key is unique, so no order is charged twice."""

    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), unique=True)
    amount: Mapped[int]
    key: Mapped[UUID] = mapped_column(unique=True)


class Mail(ShopBase):
    """A sent mail. Like any mail, it cannot be rolled back."""

    __tablename__ = "mail"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Sale(ReportBase):
    """A sale. It copies the product's name, because a report outlives a product."""

    __tablename__ = "sale"

    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(index=True)
    product: Mapped[str]
    quantity: Mapped[int]
    total: Mapped[int]
