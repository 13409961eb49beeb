"""The shop, put together: `uvicorn example_app.app:app`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_dbsession import DBSessionMiddleware, ServerTimingMiddleware, safe_methods
from asgi_dbsession.live import LivePage

from .databases import reports, shop
from .models import Product, ReportBase, ShopBase
from .shop import AlreadyPaid, ProviderBusy, Refusal, fill_shelf
from .web import routes, show_failure


@asynccontextmanager
async def prepare(_app: Starlette) -> AsyncIterator[None]:
    """Make the tables and products that are missing."""
    # The middleware has started the databases before this runs.
    for database, base in ((shop, ShopBase), (reports, ReportBase)):
        async with database.engine.begin() as connection:
            await connection.run_sync(base.metadata.create_all)
    async with shop.begin() as session:
        if await session.scalar(select(Product.id).limit(1)) is None:
            await fill_shelf()
    yield


def answer_conflict(error: Exception) -> ASGIApp | None:
    """The response to a COMMIT that a unique constraint refused: the same order came twice."""

    async def conflict(scope: Scope, receive: Receive, send: Send) -> None:
        response = await show_failure(Request(scope), AlreadyPaid("This was ordered already."))
        await response(scope, receive, send)

    return conflict if isinstance(error, IntegrityError) else None


handlers: dict[Any, Any] = dict.fromkeys((Refusal, HTTPException, Exception), show_failure)
app = Starlette(routes=routes, lifespan=prepare, exception_handlers=handlers)
app.mount("/db", LivePage(shop, reports))  # for browsers on this machine only
app.add_middleware(
    DBSessionMiddleware,
    # All databases are flushed before the first COMMIT, so a refused flush stores nothing anywhere.
    # If the second COMMIT fails, the first stays. The shop is first: a report may miss a sale, but
    # it must not show a sale that did not happen.
    shop,
    reports,
    on_commit_error=answer_conflict,
    read_only=safe_methods,  # a page that is only looked at can change nothing
    # An order that a busy provider refused is placed again, before the customer notices.
    attempts=3,
    retry_on=ProviderBusy,
    on_report=ServerTimingMiddleware.note,
)
app.add_middleware(ServerTimingMiddleware)  # the browser's network panel shows the header
