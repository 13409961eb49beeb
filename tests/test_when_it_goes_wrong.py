"""Tests that the page of errors quotes the real error texts, and that its examples work."""

import ast
import asyncio
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import postgres
import pytest
import trio
from asgi import get, respond
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

import asgi_dbsession
from asgi_dbsession import (
    AsyncDatabase,
    ConcurrentUse,
    DBSessionError,
    DBSessionMiddleware,
    SessionClosed,
    SyncDatabase,
    TransactionAborted,
    get_session,
    get_sync_session,
)

DOCS = Path(__file__).parents[1] / "docs"
ERRORS = (DOCS / "troubleshooting.md").read_text()
PAGES = {
    "troubleshooting": ERRORS,
    "dependency-injection": (DOCS / "how-to" / "dependency-injection.md").read_text(),
}


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def quoted() -> dict[str, set[str]]:
    """Return the quoted text of each error of the page, in one line each."""
    sections = re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", ERRORS, re.DOTALL | re.MULTILINE)
    return {
        name: {" ".join(block.split()) for block in blocks(section, "text")}
        for name, section in sections
    }


# How to cause each of the errors


async def in_a_request(work: Callable[[], Awaitable[Any]]) -> None:
    """Run a mistake in a handler."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work()

    database = AsyncDatabase("sqlite:///shop.db")
    async with database:
        exchange = await get(DBSessionMiddleware(app, database))
    if exchange.error is not None:
        raise exchange.error


async def outside() -> None:
    get_session()


async def in_a_thread() -> None:
    errors: list[Exception] = []

    def call() -> None:
        try:
            get_session()
        except DBSessionError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    raise errors[0]


async def after_the_request() -> None:
    sessions: list[Any] = []

    async def work() -> None:
        sessions.append(get_session())

    await in_a_request(work)
    await sessions[0].execute(text("SELECT 1"))


async def at_once() -> None:
    async def work() -> None:
        await asyncio.gather(*(get_session().execute(text("SELECT 1")) for _ in range(2)))

    await in_a_request(work)


# The causes of the next four are in test_several_tasks and test_join.


async def mixed(work: str) -> None:
    raise ConcurrentUse(AsyncDatabase("sqlite:///shop.db"), mixed_with=work)


async def after_a_joined_block() -> None:
    raise SessionClosed(AsyncDatabase("sqlite:///shop.db"), of_block=True)


async def closed() -> None:
    async def work() -> None:
        async with get_session() as session:
            await session.execute(text("SELECT 1"))

    await in_a_request(work)


async def not_started() -> None:
    await AsyncDatabase("sqlite:///shop.db").ping()


async def in_another_loop() -> None:
    database = AsyncDatabase("sqlite:///shop.db", ping_on_startup=False)

    def start() -> None:
        with asyncio.Runner() as runner:
            runner.run(database.startup())
            ready.set()
            done.wait()
            runner.run(database.shutdown())

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    ready.wait()
    try:
        await database.ping()
    finally:
        done.set()
        thread.join()


async def unreachable() -> None:
    await AsyncDatabase("sqlite:///no/such/folder/shop.db").startup()


async def swallowed() -> None:
    real = postgres.new_database("aborted").set(drivername="postgresql+psycopg")
    async with AsyncDatabase(real) as database:
        try:
            async with database.begin() as session:
                with pytest.raises(DBAPIError):
                    await session.execute(text("SELECT 1 / 0"))
        except DBSessionError as error:
            said = re.sub(
                r"postgresql\+psycopg:\S+(?=\.)", "postgresql+asyncpg://app@db/shop", str(error)
            )
            error.args = (said,)
            raise


async def deadlocked() -> None:
    # The cause of this error is in test_drivers.
    reason = "Deadlock found when trying to get lock"
    raise TransactionAborted("mysql+asyncmy://app@db/shop", reason, rolled_back=True)


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application."""


class Base(DeclarativeBase):
    """For the product."""


class Product(Base):
    """What is written where only reading is allowed."""

    __tablename__ = "product"
    name: Mapped[str] = mapped_column(primary_key=True)


async def written_while_reading() -> None:
    database = AsyncDatabase("sqlite:///shop.db")
    async with database, database.begin(read_only=True) as session:
        session.add(Product(name="tea"))


async def no_variable() -> None:
    app: Any = DBSessionMiddleware(nothing)
    await app({"type": "http"}, None, None)


async def no_url() -> None:
    AsyncDatabase("shop.db")


async def no_driver() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("asyncpg", "psycopg"):
            patch.setitem(sys.modules, module, None)  # so that it cannot be imported
        AsyncDatabase("postgresql://app@db/shop")


async def unknown_option() -> None:
    AsyncDatabase("postgresql+asyncpg://app@db/shop?foo=bar")


async def driver_not_installed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "aiomysql", None)  # so that it cannot be imported
        AsyncDatabase("mysql+aiomysql://app@db/shop")


async def misspelt() -> None:
    AsyncDatabase("postgresqll://app@db/shop")


async def on_trio() -> None:
    await asyncio.to_thread(trio.run, AsyncDatabase("sqlite:///shop.db").startup)


async def driver_that_blocks() -> None:
    AsyncDatabase("sqlite+pysqlite:///shop.db")


async def driver_for_asyncio() -> None:
    SyncDatabase("sqlite+aiosqlite:///shop.db")


async def engine_for_a_database() -> None:
    engine: Any = create_async_engine("sqlite+aiosqlite:///shop.db")
    await asyncio.to_thread(DBSessionMiddleware, nothing, engine)  # without an event loop


async def url_for_a_variable() -> None:
    AsyncDatabase.from_env("sqlite:///shop.db")


async def engine_for_a_url() -> None:
    engine: Any = create_async_engine("sqlite+aiosqlite:///shop.db")
    AsyncDatabase(engine)


async def engine_of_the_other_kind() -> None:
    engine: Any = create_engine("sqlite:///shop.db")
    AsyncDatabase.from_engine(engine)


async def option_of_from_engine() -> None:
    make: Any = AsyncDatabase.from_engine
    make(create_async_engine("sqlite+aiosqlite:///shop.db"), autocommit_reads=True)


async def option_of_the_session() -> None:
    AsyncDatabase("sqlite:///shop.db", expire_on_commit=True)


async def database_by_name() -> None:
    wrong: Any = DBSessionMiddleware
    make = partial(wrong, nothing, database=AsyncDatabase("sqlite:///shop.db"))
    await asyncio.to_thread(make)  # without an event loop


async def flag_for_a_function() -> None:
    wrong: Any = DBSessionMiddleware
    make = partial(wrong, nothing, "sqlite:///shop.db", read_only=True)
    await asyncio.to_thread(make)  # without an event loop


async def session_of_the_other_kind() -> None:
    async def work() -> None:
        get_sync_session()

    await in_a_request(work)


async def async_session_in_a_thread() -> None:
    async def work() -> None:
        await asyncio.to_thread(get_session().add, object())

    await in_a_request(work)


async def statement_in_a_thread() -> None:
    async def work() -> None:
        session: Any = get_session()
        await asyncio.to_thread(session.execute, text("SELECT 1"))

    await in_a_request(work)


async def inside_a_block() -> None:
    database = AsyncDatabase("sqlite:///shop.db")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with database.begin() as session:
            await session.execute(text("CREATE TABLE early (id INTEGER)"))
            await respond(send, 201)

    async with database:
        exchange = await get(DBSessionMiddleware(app, database))
    if exchange.error is not None:
        raise exchange.error


WAYS = (
    outside,
    in_a_thread,
    after_the_request,
    at_once,
    partial(mixed, "living"),
    partial(mixed, "failed"),
    partial(mixed, "block"),
    after_a_joined_block,
    closed,
    not_started,
    in_another_loop,
    unreachable,
    swallowed,
    deadlocked,
    written_while_reading,
    no_variable,
    no_url,
    no_driver,
    driver_not_installed,
    unknown_option,
    misspelt,
    on_trio,
    driver_that_blocks,
    driver_for_asyncio,
    engine_for_a_database,
    url_for_a_variable,
    engine_for_a_url,
    engine_of_the_other_kind,
    option_of_from_engine,
    option_of_the_session,
    database_by_name,
    flag_for_a_function,
    session_of_the_other_kind,
    async_session_in_a_thread,
    statement_in_a_thread,
    inside_a_block,
)


@pytest.mark.anyio
async def test_the_page_quotes_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each quotation is the error of some mistake, below the name of its class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    said: dict[str, set[str]] = {}
    for way in WAYS:
        with pytest.raises(DBSessionError) as caught:
            await way()
        said.setdefault(type(caught.value).__name__, set()).add(str(caught.value))
    assert said == quoted()


# Mistakes with errors of Python, SQLAlchemy and drivers


async def block_for_a_session() -> None:
    database: Any = AsyncDatabase("sqlite:///shop.db")
    await database.begin().execute(text("SELECT 1"))


async def async_block_of_a_sync_database() -> None:
    database: Any = SyncDatabase("sqlite:///shop.db")
    async with database.begin():
        pytest.fail("it went on")


async def plain_with_of_an_async_database() -> None:
    database: Any = AsyncDatabase("sqlite:///shop.db")
    with database:
        pytest.fail("it went on")


async def object_for_the_class() -> None:
    app = Starlette()
    wrong: Any = DBSessionMiddleware(app, AsyncDatabase("sqlite:///shop.db"))
    app.add_middleware(wrong)
    exchange = await get(app)
    assert exchange.error is not None
    raise exchange.error


async def depend_on(database: Any) -> None:
    app = FastAPI()

    @app.get("/")
    async def handler(session: Annotated[Any, Depends(database.begin)]) -> None:
        session.execute(text("SELECT 1"))

    async with database:
        exchange = await get(DBSessionMiddleware(app, database))
    assert exchange.error is not None
    raise exchange.error


async def block_for_a_dependency() -> None:
    await depend_on(AsyncDatabase("sqlite:///shop.db"))


async def sync_block_for_a_dependency() -> None:
    await depend_on(SyncDatabase("sqlite:///shop.db"))


async def await_of_a_sync_block() -> None:
    database: Any = SyncDatabase("sqlite:///shop.db")
    await database.begin()


async def swallowed_error_of_a_flush() -> None:
    class Models(DeclarativeBase):
        pass

    class Item(Models):
        __tablename__ = "item"
        name: Mapped[str] = mapped_column(primary_key=True)

    async with AsyncDatabase("sqlite:///shop.db") as database, database.begin() as session:
        await (await session.connection()).run_sync(Models.metadata.create_all)
        session.add_all([Item(name="one"), Item(name="one")])
        with pytest.raises(IntegrityError):
            await session.flush()


async def stream_of_the_handler(driver: str) -> None:
    url = postgres.new_database(f"stream_{driver}").set(drivername=f"postgresql+{driver}")
    database = AsyncDatabase(url)

    async def handler(request: Request) -> StreamingResponse:
        rows = await database.get_session().stream(text("SELECT generate_series(1, 5000)"))

        async def body() -> AsyncIterator[str]:
            async for row in rows:
                yield str(row[0])

        return StreamingResponse(body())

    app = Starlette(routes=[Route("/", handler)])
    async with database:
        exchange = await get(DBSessionMiddleware(app, database))
    assert exchange.error is not None
    raise exchange.error


@pytest.mark.anyio
@pytest.mark.parametrize(
    "mistake",
    [
        block_for_a_session,
        async_block_of_a_sync_database,
        plain_with_of_an_async_database,
        object_for_the_class,
        block_for_a_dependency,
        sync_block_for_a_dependency,
        await_of_a_sync_block,
        swallowed_error_of_a_flush,
        partial(stream_of_the_handler, "asyncpg"),
        partial(stream_of_the_handler, "psycopg"),
    ],
)
async def test_the_page_has_a_row_for_the_error_of_a_mistake(
    mistake: Callable[[], Awaitable[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader who searches the page for the text of the error finds the cure."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of Python or of a driver
        await mistake()
    assert not isinstance(caught.value, DBSessionError)
    _, section = ERRORS.split("## Errors of SQLAlchemy and drivers")
    messages = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in rows_of(section)))
    patterns = [re.escape(each).replace("…", ".+") for each in messages]
    assert any(re.search(each, str(caught.value)) for each in patterns), caught.value


@pytest.mark.anyio
async def test_the_page_has_a_row_for_the_answer_to_a_called_block() -> None:
    """FastAPI raises no error for `Depends(database.begin())`, but answers with status 422."""
    database: Any = AsyncDatabase("sqlite:///shop.db")
    app = FastAPI()

    @app.get("/")
    async def handler(session: Annotated[Any, Depends(database.begin())]) -> None:
        pytest.fail("it went on")

    exchange = await get(app)
    (row,) = [row for row in rows_of(ERRORS) if "`Depends(database.begin())`" in row]
    (shown,) = re.findall(r"status (\d+): `(.+?)`", row)
    assert str(exchange.status) == shown[0]
    assert shown[1] in exchange.body.decode()


def rows_of(section: str) -> list[str]:
    """The rows of the table in a section."""
    return [line for line in section.splitlines() if line.startswith("| ")]


def log_lines() -> set[str]:
    """Return the first words of each line that the package logs, without values."""
    found = set()
    for path in Path(asgi_dbsession.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        named = {
            target.id: each.value
            for each in tree.body
            if isinstance(each, ast.Assign)
            for target in each.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("_logger."):
                text_ = call.args[0]
                line = ast.literal_eval(named[text_.id] if isinstance(text_, ast.Name) else text_)
                parts = (each.strip(" ,:") for each in re.split(r"%[.\d]*[a-z]", line))
                found.add(next(filter(None, parts))[:50])
    return found


def test_every_log_line_is_on_the_page() -> None:
    """A reader finds the text of the log in the table, and what to do."""
    page = ERRORS.replace("`", "")
    lines = log_lines()
    assert len(lines) > 15
    assert {each for each in lines if each.replace("`", "") not in page} == set()


def test_every_error_has_a_section() -> None:
    """A reader searches for the cause below this heading."""
    public = [getattr(asgi_dbsession, name) for name in asgi_dbsession.__all__]
    errors = {
        each.__name__ for each in public if isinstance(each, type) and issubclass(each, Exception)
    }
    assert set(quoted()) == errors - {"DBSessionError"}


@pytest.mark.parametrize(
    ("page", "number"),
    [(name, number) for name in PAGES for number in range(len(blocks(PAGES[name], "python")))],
)
def test_every_block_runs(
    page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run it in an empty folder, together with the tests that it shows."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("pasted")
    monkeypatch.setitem(sys.modules, "pasted", module)  # frameworks look up annotations there
    exec(compile(blocks(PAGES[page], "python")[number], page, "exec"), vars(module))
    for name, value in list(vars(module).items()):
        if name.startswith("test_"):
            value()
