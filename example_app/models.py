"""What the shop remembers."""

from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """What all tables belong to."""


class Product(Base):
    """Something on the shelf. Money is in cents."""

    __tablename__ = "product"
    # The last line of defence: `take_stock` never gets here, and a mistake in it never gets past.
    __table_args__ = (CheckConstraint("stock >= 0", name="stock_is_never_negative"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    price: Mapped[int]
    stock: Mapped[int]


class Order(Base):
    """A number of one product, at the price of that moment."""

    __tablename__ = "orders"  # ORDER is a word of SQL's
    __table_args__ = (CheckConstraint("quantity > 0", name="quantity_is_positive"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), index=True)
    quantity: Mapped[int]
    total: Mapped[int]

    product: Mapped[Product] = relationship(lazy="joined", innerjoin=True)
    mail: Mapped["Mail | None"] = relationship(lazy="joined")


class Payment(Base):
    """What a card was charged for an order. No key is charged twice."""

    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), unique=True)
    amount: Mapped[int]
    key: Mapped[UUID] = mapped_column(unique=True)


class Mail(Base):
    """The confirmation of an order, sent once the order is safe."""

    __tablename__ = "mail"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), unique=True)
    text: Mapped[str]
