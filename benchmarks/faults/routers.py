"""Three ways to choose the server that a request reads from, each with the same application."""

import random
import sys
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Column, Integer, MetaData, Table, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from typing_extensions import Self

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, safe_methods

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from asgi import respond

COUNTER = Table(
    "counter", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer)
)
POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 0}


def _statement(scope: Any) -> Any:
    """Return the statement of a request: count up, or read."""
    mine = COUNTER.c.id == int(scope["path"][1:])
    if scope["method"] == "POST":
        return COUNTER.update().where(mine).values(n=COUNTER.c.n + 1).returning(COUNTER.c.n)
    total = select(func.sum(COUNTER.c.n)).scalar_subquery()
    return select(COUNTER.c.n, total).where(mine)


class Package:
    """This package.

    Args:
        urls: The URLs of the primary and of the replicas.
        attempts: How often a request may run.
    """

    name = "this package"

    def __init__(self, urls: list[URL], attempts: int = 1) -> None:
        self.database = AsyncDatabase(urls[0], replicas=urls[1:], **POOL)
        self.app: Any = DBSessionMiddleware(
            self._answer, self.database, read_only=safe_methods, attempts=attempts
        )
        if attempts > 1:
            self.name = f"{self.name}, `attempts={attempts}`"

    async def _answer(self, scope: Any, _receive: Any, send: Any) -> None:
        row = (await self.database.get_session().execute(_statement(scope))).one()
        await respond(send, body=" ".join(map(str, row)).encode())

    async def __aenter__(self) -> Self:
        await self.database.startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.database.shutdown()


class ByHand:
    """A hand-written router that uses the primary for some seconds after a write.

    Args:
        urls: The URLs of the primary and of the replicas.
        sticky: Seconds; 0 to read from a replica always.
    """

    def __init__(self, urls: list[URL], sticky: float) -> None:
        rule = f"sticky {sticky:g} s" if sticky else "always a replica"
        self.name = f"hand-written, {rule}"
        self._primary, *self._replicas = (create_async_engine(each, **POOL) for each in urls)
        self._sticky = sticky

    async def app(self, scope: Any, _receive: Any, send: Any) -> None:
        """Serve one request, on the primary or on any replica."""
        written = float(_cookie(scope, "written") or 0)
        is_write = scope["method"] == "POST"
        engine: AsyncEngine = random.choice(self._replicas)
        if is_write or time.time() - written < self._sticky:
            engine = self._primary
        async with engine.begin() as connection:
            row = (await connection.execute(_statement(scope))).one()
        cookie = [(b"set-cookie", f"written={time.time()}".encode())] if is_write else []
        await send({"type": "http.response.start", "status": 200, "headers": cookie})
        await send({"type": "http.response.body", "body": " ".join(map(str, row)).encode()})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in (self._primary, *self._replicas):
            await each.dispose()


def _cookie(scope: Any, name: str) -> str:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    text = headers.get(b"cookie", b"").decode()
    return dict(each.split("=") for each in text.split("; ") if each).get(name, "")


ROUTERS = (
    lambda urls: Package(urls, attempts=3),
    lambda urls: ByHand(urls, 2),
    lambda urls: ByHand(urls, 0),
)
