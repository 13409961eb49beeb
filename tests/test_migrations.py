"""Tests that the migration pages describe the behaviour before and after correctly."""

import asyncio
import gc
import importlib
import json
import re
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from importlib import metadata
from inspect import isawaitable
from pathlib import Path
from types import ModuleType
from typing import Any

import postgres
import pytest
from asgi import Exchange
from asgiref.wsgi import WsgiToAsgi
from conftest import forget_modules
from pages import ROOT, Page
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.pool import NullPool

pytestmark = pytest.mark.anyio

PAGES = sorted(path.stem for path in (ROOT / "docs" / "migrate").glob("*.md"))
TABLE = """
DROP TABLE IF EXISTS note;
CREATE TABLE note (
    id serial PRIMARY KEY,
    text text NOT NULL,
    reply_to integer REFERENCES note DEFERRABLE INITIALLY DEFERRED
);
INSERT INTO note (text) VALUES ('first');
"""


@pytest.fixture(scope="module")
def reader() -> Engine:
    """Another connection to the database of all pages."""
    url = postgres.new_database("migrations").set(drivername="postgresql+psycopg")
    return create_engine(url, poolclass=NullPool)


class Side:
    """The code before or after the migration, as a running application."""

    def __init__(self, module: ModuleType, engine: Any, reader: Engine) -> None:
        self.module = module
        self.engine: Engine = getattr(engine, "sync_engine", engine)
        self.app: Any = module.app
        if not hasattr(self.app, "asgi_app") and hasattr(self.app, "wsgi_app"):
            self.app = WsgiToAsgi(self.app)  # type: ignore[no-untyped-call]
        self._reader = reader

    async def ask(self, path: str, method: str = "GET", **note: Any) -> Exchange:
        """Send a request, with its arguments in the form that the application expects."""
        before = self.checked_out()
        held: list[int] = []
        exchange = Exchange(
            self.app,
            path,
            method=method,
            content=json.dumps(note).encode(),
            on_message=lambda _: held.append(self.checked_out() - before),
        )
        exchange.scope["query_string"] = "&".join(f"{k}={v}" for k, v in note.items()).encode()
        await asyncio.create_task(exchange.run())  # in a new context, as under a server
        self.held = max(held, default=0)
        return exchange

    def checked_out(self) -> int:
        """Return how many connections are checked out of the pool."""
        pool: Any = self.engine.pool
        return int(pool.checkedout())

    def stored(self, note: str) -> int:
        """Return how many of these rows are stored."""
        with self._reader.connect() as connection:
            query = text("SELECT count(*) FROM note WHERE text = :note")
            return int(connection.scalar(query, {"note": note}) or 0)


async def answer_to_a_failed_commit(side: Side) -> Any:
    """Return the status if a foreign key fails, which only COMMIT checks."""
    exchange = await side.ask("/notes", "POST", text="lost", reply_to=-1)
    assert side.stored("lost") == 0
    status = exchange.status or 500  # a server answers an exception with a 500
    del exchange
    gc.collect()
    return status


async def held_after_a_failed_commit(side: Side) -> Any:
    """Return how many connections stay in use until Python collects garbage."""
    before = side.checked_out()
    gc.disable()
    try:
        exchange = await side.ask("/notes", "POST", text="lost", reply_to=-1)
        return side.checked_out() - before
    finally:
        del exchange
        gc.enable()
        gc.collect()


async def held_while_the_client_reads(side: Side) -> Any:
    """Return the largest number of connections in use when a message of a response arrives."""
    assert "first" in json.loads((await side.ask("/notes")).body)
    return side.held


async def stored_after_409(side: Side) -> Any:
    """Return the number of rows."""
    assert (await side.ask("/refused", "POST")).status == 409
    return side.stored("refused")


async def stored_without_commit(side: Side) -> Any:
    """Return the number of rows."""
    assert (await side.ask("/forgotten", "POST")).status == 201
    return side.stored("forgotten")


async def stored_by_a_redirect(side: Side) -> Any:
    """Return the number of rows."""
    assert (await side.ask("/redirected", "POST")).status == 303
    return side.stored("redirected")


async def streamed(side: Side) -> Any:
    """Return if the body arrives."""
    exchange = await side.ask("/export")
    return "is sent" if b"first\n" in exchange.body and not exchange.error else "fails"


async def committed_in_the_event_loop(side: Side) -> Any:
    """Return if everything else waits for COMMIT."""
    threads: list[int] = []
    event.listen(side.engine, "commit", lambda _: threads.append(threading.get_ident()))
    assert (await side.ask("/notes", "POST", text="slow")).status == 201
    (thread,) = threads
    return "yes" if thread == threading.get_ident() else "no"


ROWS: dict[str, Callable[[Side], Awaitable[Any]]] = {
    "the client's answer when COMMIT fails": answer_to_a_failed_commit,
    "connections held while the client reads": held_while_the_client_reads,
    "connections held after a COMMIT that failed": held_after_a_failed_commit,
    "rows stored by a handler that raises 409": stored_after_409,
    "rows stored by a handler without `commit()`": stored_without_commit,
    "rows stored by a handler that redirects": stored_by_a_redirect,
    "a streamed body that queries after its first chunk": streamed,
    "COMMIT blocks the event loop, and so all requests": committed_in_the_event_loop,
}


def claims(page: str) -> list[tuple[str, str, str]]:
    """Return the rows of the table on a page: what, before, after."""
    found = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \|$", Page(f"docs/migrate/{page}.md").text, re.MULTILINE
    )
    return [row for row in found if row[0].strip()]


CASES = [
    pytest.param(page, side, id=f"{page}-{side}") for page in PAGES for side in ("before", "after")
]


def needs_peer(page: str) -> None:
    """Skip the test if the version of the page is not installed."""
    for version in re.findall(
        r"^What changes \(seen with ([\d.]+)\)", Page(f"docs/migrate/{page}.md").text, re.MULTILINE
    ):
        found = installed(page)
        if found < tuple(map(int, version.split("."))):
            pytest.skip(f"{page} {version} does not go with this Python or SQLAlchemy")


def installed(package: str) -> tuple[int, ...]:
    """Return the installed version, or None."""
    try:
        return tuple(map(int, metadata.version(package).split(".")))
    except metadata.PackageNotFoundError:
        return ()


@pytest.fixture
def folder(reader: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the code of a page, with a table that has one row."""
    with reader.begin() as connection:
        for statement in TABLE.split(";")[:-1]:
            connection.execute(text(statement))
    monkeypatch.setenv("DATABASE_URL", reader.url.render_as_string(hide_password=False))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def module(page: str, side: str, change: tuple[str, str], folder: Path) -> Iterator[ModuleType]:
    """Import the code of one side of a page."""
    needs_peer(page)
    shown = Page(f"docs/migrate/{page}.md")
    for name, code in shown.files().items():
        assert name != f"{side}.py" or change[0] in code
        (folder / name).write_text(code.replace(*change))
    advised = change[1].rpartition("database, ")[2].rstrip(")")
    assert advised in " ".join(shown.text.split())
    importlib.invalidate_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some peers are older than the installed SQLAlchemy
        yield importlib.import_module(side)
    # The last tool allows one engine per process, and other tests use it too.
    forget_modules("before", "after", "models", "fastapi_async_sqlalchemy")


@pytest.fixture
def change() -> tuple[str, str]:
    """Return the replacements in the code of the page; none by default."""
    return "", ""


@asynccontextmanager
async def serving(module: ModuleType, reader: Engine) -> AsyncIterator[Side]:
    """Run the application, and close all of its connections at the end."""
    if hasattr(module, "database"):
        async with module.database as database:
            yield Side(module, database.engine, reader)
        if hasattr(module, "engine"):
            await dispose(module.engine)
        return
    engine: Any
    if hasattr(module, "engine"):
        engine = module.engine
    else:
        with module.app.app_context():
            engine = module.db.engine
    try:
        yield Side(module, engine, reader)
    finally:
        gc.collect()  # frees the connections that one tool leaves behind
        await dispose(engine)


async def dispose(engine: Any) -> None:
    """Close the connections of a sync or an async engine."""
    disposed = engine.dispose()
    if isawaitable(disposed):
        await disposed


@pytest.mark.parametrize(("page", "side"), CASES)
async def test_the_page_says_what_is_so(
    page: str, side: str, module: ModuleType, reader: Engine
) -> None:
    """Each row of the table is checked with a request to the application."""
    async with serving(module, reader) as served:
        for what, before, after in claims(page):
            found = await ROWS[what](served)
            assert str(found) == (before if side == "before" else after), what
        if hasattr(module, "count"):
            assert await _called(module.count) >= 1


async def _called(function: Callable[[], Any]) -> Any:
    found = await asyncio.to_thread(function)
    return await found if isawaitable(found) else found


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_a_table(page: str) -> None:
    """Each change that the page lists is checked."""
    assert len(claims(page)) >= 2


SCOPE = ("Depends(get_db)", 'Depends(get_db, scope="function")')
REDIRECT = ('"autocommit"', '"autocommit_include_redirect"')
OLD_RULE = ("Middleware, database)", "Middleware, database, commit_when=lambda status: True)")
NEVER = ("Middleware, database)", "Middleware, database, commit_when=lambda status: False)")
LESS_THAN_300 = ("database)", "database, commit_when=lambda status: status < 300)")


@pytest.mark.parametrize(
    ("page", "side", "change", "what", "expected"),
    [
        ("get-db", "after", NEVER, "rows stored by a handler without `commit()`", 0),
        ("session-local", "before", SCOPE, "the client's answer when COMMIT fails", 500),
        ("session-local", "before", SCOPE, "connections held while the client reads", 0),
        ("fastapi-sqlalchemy", "after", OLD_RULE, "rows stored by a handler that raises 409", 1),
        (
            "fastapi-async-sqlalchemy",
            "after",
            OLD_RULE,
            "rows stored by a handler that raises 409",
            1,
        ),
        ("advanced-alchemy", "before", REDIRECT, "rows stored by a handler that redirects", 1),
        ("advanced-alchemy", "after", LESS_THAN_300, "rows stored by a handler that redirects", 0),
    ],
)
async def test_what_the_page_says_below_its_table_is_so(
    what: str, expected: int, module: ModuleType, reader: Engine
) -> None:
    """The options of one side give the result of the other side."""
    async with serving(module, reader) as served:
        assert await ROWS[what](served) == expected
