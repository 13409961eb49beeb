"""A response that starts inside a `begin()` block would tell of work that is not committed yet."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from contextvars import Context
from typing import Annotated, Any

import pytest
from asgi import get, respond
from conftest import ENTRY, Running
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import select

from asgi_dbsession import ConfigurationError, DBSessionMiddleware, SyncDatabase

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def beginning(database: Any, **options: Any) -> AsyncIterator[Any]:
    """`database.begin()`, whatever its kind."""
    if isinstance(database, SyncDatabase):
        with database.begin(**options) as session:
            yield session
    else:
        async with database.begin(**options) as session:
            yield session


async def get_db(running: Running) -> AsyncGenerator[Any, None]:
    """The mistake: a generator that yields inside of a block."""
    async with beginning(running.database) as session:
        yield session


@pytest.mark.parametrize("left", ["open", "closed"])
async def test_a_response_inside_a_block_with_work_is_refused(running: Running, left: str) -> None:
    """Nothing is sent, nothing is stored, and the error names the cure."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(get_db(running)) as generator:
            async for _ in generator:
                await running.write("lost")
                break
            if left == "closed":  # as Python does when the generator is freed
                await asyncio.create_task(generator.aclose())
            await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, ConfigurationError)
    assert "begin(join=True)" in str(exchange.error)
    assert running.stored() == []


async def test_a_response_may_start_in_code_without_context(running: Running) -> None:
    """For example, `asyncio.run_coroutine_threadsafe` in a bare thread copies no context."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await asyncio.create_task(respond(send, 201), context=Context())

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == ["kept"]


async def test_a_block_that_is_left_with_break_loses_nothing_in_silence(running: Running) -> None:
    """Python closes the generator of `async for session in get_db(): …; break` some time later."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async for _ in get_db(running):
            await running.write("lost")
            break
        gc.collect()
        await asyncio.sleep(0.01)
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.messages, running.stored()) == ([], [])
    assert isinstance(exchange.error, ConfigurationError)


@pytest.mark.parametrize("options", [{"join": True}, {"read_only": True}])
async def test_a_block_that_loses_nothing_may_be_open(
    running: Running, options: dict[str, bool]
) -> None:
    """The request commits the work of a joined block; a read-only block has none."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with beginning(running.database, **options):
            await running.execute(select(ENTRY))
            if "join" in options:
                await running.write("stored")
            await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == (["stored"] if "join" in options else [])


async def test_a_block_of_another_task_may_be_open(running: Running) -> None:
    """The response does not tell of its work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        written, answered = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with beginning(running.database):
                await running.write("of the task")
                written.set()
                await answered.wait()

        task = asyncio.create_task(work())
        await written.wait()
        await respond(send)
        answered.set()
        await task

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["of the task"]


@pytest.mark.parametrize("path", ["/created", "/refused"])
async def test_a_dependency_that_yields_inside_a_block_is_refused(
    running: Running, path: str
) -> None:
    """FastAPI ends such a dependency after the response, so a 201 could be untrue."""
    app = FastAPI()

    async def of_begin() -> AsyncIterator[Any]:
        async with beginning(running.database) as session:
            yield session

    @app.get("/created", status_code=201)
    async def create(_: Annotated[Any, Depends(of_begin)]) -> None:
        await running.write("lost")

    @app.get("/refused")
    async def refuse(_: Annotated[Any, Depends(of_begin)]) -> None:
        await running.write("lost")
        raise HTTPException(409)

    app.add_middleware(DBSessionMiddleware, running.database)
    exchange = await get(app, path)
    assert running.stored() == []
    assert path == "/refused" or isinstance(exchange.error, ConfigurationError)
