"""The shop, put together: `uvicorn example_app.app:app`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware

from .models import Base, Product
from .shop import AlreadyPaid, Refusal
from .web import routes, show_failure

SHELF = [
    ("Teapot", 39_00, 12),
    ("Cup", 9_50, 48),
    ("The last biscuit", 2_50, 1),
]


def create_app(database: AsyncDatabase) -> Starlette:
    """The shop on a database. Tables and products that are missing are made at startup."""

    @asynccontextmanager
    async def prepare(_app: Starlette) -> AsyncIterator[None]:
        # The middleware is further out than this lifespan: the database is running by now.
        async with database.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with database.begin() as session:
            if await session.scalar(select(Product.id).limit(1)) is None:
                session.add_all(
                    Product(name=name, price=price, stock=stock) for name, price, stock in SHELF
                )
        yield

    handlers: dict[Any, Any] = dict.fromkeys((Refusal, HTTPException, Exception), show_failure)
    app = Starlette(routes=routes, lifespan=prepare, exception_handlers=handlers)
    app.add_middleware(DBSessionMiddleware, database, on_commit_error=answer_conflict)
    return app


def answer_conflict(error: Exception) -> ASGIApp | None:
    """The response to a COMMIT that the database refused: two of what may be there once."""

    async def conflict(scope: Scope, receive: Receive, send: Send) -> None:
        response = await show_failure(Request(scope), AlreadyPaid("This was ordered already."))
        await response(scope, receive, send)

    return conflict if isinstance(error, IntegrityError) else None


def describe_database(url: str) -> AsyncDatabase:
    """The database of the shop; nothing is opened before the application starts."""
    if url.startswith("sqlite"):
        return AsyncDatabase(url, pool_events=[(set_up_sqlite, "connect")])
    return AsyncDatabase(url)


def set_up_sqlite(connection: Any, _record: object) -> None:
    """Have SQLite check foreign keys, read while it writes, and wait for its turn."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 5000")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


app = create_app(describe_database(os.environ.get("DATABASE_URL") or "sqlite:///shop.db"))
