"""The work of every application: the same statements with any session."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import HTTPException
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from sqlalchemy import Column, Integer, MetaData, Table, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

# Every application uses the same database and the same pool options.
URL = os.environ["DATABASE_URL"]
POOL: dict[str, Any] = {
    "pool_size": int(os.environ.get("POOL_SIZE", "8")),
    "max_overflow": 0,
    "pool_timeout": int(os.environ.get("POOL_TIMEOUT", "1")),
}

_ACCOUNT = Table("account", MetaData(), Column("id", Integer), Column("balance", Integer))
_READ = select(_ACCOUNT.c.balance).where(_ACCOUNT.c.id == 1)
_ENTRY = text("INSERT INTO entry (number) VALUES (:number)")
_LINE = text("INSERT INTO line (number) VALUES (:number)")
_EXPORT = text("SELECT number FROM generate_series(1, 1000) AS number")
_TRANSFER = text(
    "INSERT INTO transfer (number, source, target, amount) "
    "VALUES (:number, :source, :target, :amount)"
)
_ADD = text("UPDATE account SET balance = balance + :amount WHERE id = :id")

_STATEMENTS = {
    "wait": text("SELECT pg_sleep(0.05)"),
    "wait long": text("SELECT pg_sleep(0.5)"),
    "slow commit": text("INSERT INTO slow (seconds) VALUES (0.1)"),
    "failing commit": text("INSERT INTO doomed (account) VALUES (-1)"),
    "dying commit": text("INSERT INTO dying VALUES (1)"),
}


async def read(session: AsyncSession) -> Response:
    """Answer with one SELECT."""
    return PlainTextResponse(str(await session.scalar(_READ)))


async def ten(session: AsyncSession) -> Response:
    """Answer with ten SELECTs, one after the other."""
    return PlainTextResponse(str([await session.scalar(_READ) for _ in range(10)]))


async def insert(session: AsyncSession) -> Response:
    """Store one row."""
    await session.execute(_ENTRY, {"number": 0})
    return PlainTextResponse("stored", 201)


async def write(session: AsyncSession, number: int, then: str = "") -> Response:
    """Store an entry, which has two halves, and then do what `then` says."""
    await session.execute(_ENTRY, {"number": number})
    if then.startswith("wait"):
        await _happen(session, then)
    await session.execute(_LINE, {"number": number})
    if not then.startswith("wait"):
        await _happen(session, then)
    return _answer(then)


async def transfer(session: AsyncSession, number: int, then: str = "") -> Response:
    """Move money between two accounts, which are chosen by the number."""
    source, target, amount = number % 20 + 1, number % 19 + 1, number % 7 + 1
    values = {"number": number, "source": source, "target": target, "amount": amount}
    await session.execute(_TRANSFER, values)
    for account, change in sorted([(source, -amount), (target, amount)]):  # otherwise they deadlock
        await session.execute(_ADD, {"id": account, "amount": change})
    await _happen(session, then)
    return _answer(then)


async def rows(session: AsyncSession) -> AsyncIterator[bytes]:
    """The body of a stream, which sends a statement for every part."""
    for _ in range(10):
        yield f"{await session.scalar(_READ)}\n".encode()


async def export(session: AsyncSession) -> AsyncIterator[bytes]:
    """The body of an export, which fetches hundreds of rows at a time while it is sent."""
    result = await session.stream(_EXPORT, execution_options={"yield_per": 100})
    async for rows in result.partitions():
        yield "".join(f"{row.number}\n" for row in rows).encode()


async def download(session: AsyncSession) -> Response:
    """Answer with a file of 400 kB after one SELECT."""
    head = f"{await session.scalar(_READ)}\n".encode()

    async def parts() -> AsyncIterator[bytes]:
        yield head
        for _ in range(50):
            yield bytes(8000)

    return StreamingResponse(parts())


async def events(session: AsyncSession) -> Response:
    """Answer with endless server-sent events, of which only the first one needs data."""
    first = f"data: {await session.scalar(_READ)}\n\n".encode()

    async def ticks() -> AsyncIterator[bytes]:
        yield first
        while True:
            await asyncio.sleep(1)
            yield b"data: tick\n\n"

    return StreamingResponse(ticks(), media_type="text/event-stream")


def nothing() -> Response:
    """Answer without the database."""
    return PlainTextResponse("ok")


def blocking_read(session: Session) -> Response:
    """Answer with one SELECT; for handlers with `def`."""
    return PlainTextResponse(str(session.scalar(_READ)))


def blocking_ten(session: Session) -> Response:
    """Answer with ten SELECTs; for handlers with `def`."""
    return PlainTextResponse(str([session.scalar(_READ) for _ in range(10)]))


def blocking_insert(session: Session) -> Response:
    """Store one row; for handlers with `def`."""
    session.execute(_ENTRY, {"number": 0})
    return PlainTextResponse("stored", 201)


def blocking_export(session: Session) -> Iterator[bytes]:
    """The body of an export; for handlers with `def`."""
    result = session.execute(_EXPORT, execution_options={"yield_per": 100})
    for rows in result.partitions():
        yield "".join(f"{row.number}\n" for row in rows).encode()


def blocking_write(session: Session, number: int) -> Response:
    """Store an entry; for handlers with `def`."""
    session.execute(_ENTRY, {"number": number})
    session.execute(_LINE, {"number": number})
    return PlainTextResponse("stored", 201)


async def _happen(session: AsyncSession, then: str) -> None:
    if then == "refuse":
        raise HTTPException(409)
    if then == "raise":
        raise RuntimeError("a defect in the handler")
    if then == "swallow":
        try:
            await session.execute(text("SELECT 1 / 0"))
        except DBAPIError:
            return
    if then in _STATEMENTS:
        await session.execute(_STATEMENTS[then])


def _answer(then: str) -> Response:
    if then != "stream":
        return PlainTextResponse("stored", 201)

    async def parts() -> AsyncIterator[bytes]:
        yield b"stored"

    return StreamingResponse(parts(), 201)
