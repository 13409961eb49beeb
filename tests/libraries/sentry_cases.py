"""Sentry gets the error that happened, and each log line has the id of its request.

`test_sentry.py` runs these tests in a process of their own.
"""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from anyio import to_thread
from asgi import Exchange
from fastapi import FastAPI
from library import Library, library
from pages import Page
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from sqlalchemy import select
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    SyncDatabase,
    current_attempt,
    get_session,
    on_commit,
)

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/sentry.md")


class Kept(Transport):
    """Keeps what would be sent."""

    events: list[Any] = []  # noqa: RUF012

    def capture_envelope(self, envelope: Envelope) -> None:
        """Keep the errors."""
        self.events += [event for item in envelope.items if (event := item.get_event())]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The files of the page, with a Sentry in this process."""
    init = sentry_sdk.init
    Kept.events.clear()

    def init_here(**options: Any) -> None:
        init(**{**options, "dsn": "http://key@localhost/1", "transport": Kept})

    monkeypatch.setattr(sentry_sdk, "init", init_here)
    with library(PAGE, "asyncpg", tmp_path) as found:
        yield found
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)


async def post(app: Any, path: str, query: str = "") -> Exchange:
    """Ask for a change."""
    exchange = Exchange(app, path, method="POST")
    exchange.scope["query_string"] = query.encode()
    return await exchange.run()


def exceptions() -> list[tuple[str, Any]]:
    """The class of each error that Sentry got, and the reason of the unit of work."""
    return [
        (
            event["exception"]["values"][-1]["type"],
            event["contexts"].get("unit of work", {}).get("reason"),
        )
        for event in Kept.events
    ]


# A COMMIT that fails with another error than `on_commit_error` of the page answers.
TRIGGER = """
CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN RAISE EXCEPTION ''too late''; END';
CREATE CONSTRAINT TRIGGER refuses AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.name = 'refused') EXECUTE FUNCTION refuse();
"""


async def test_a_failed_commit_reaches_sentry_once(page: Library) -> None:
    """With its own exception, and what became of the transaction; an answered one does not."""
    module = page.load("shop")
    page.execute(TRIGGER)
    async with module.database:
        assert (await post(module.app, "/items", "name=tea")).status == 201
        assert (await post(module.app, "/items", "name=tea")).status == 409
        assert exceptions() == []
        assert (await post(module.app, "/items", "name=refused")).status == 500
    assert exceptions() == [("DBAPIError", "commit_failed")]
    (event,) = Kept.events
    assert "too late" in event["exception"]["values"][-1]["value"]
    assert event["contexts"]["unit of work"]["statements"] == 1
    assert page.stored("SELECT name FROM item") == ["tea"]


async def test_an_error_of_a_handler_or_after_commit_reaches_sentry(page: Library) -> None:
    """The second one by the log line; what was committed stays."""
    module = page.load("shop")

    @module.app.post("/broken")  # type: ignore[untyped-decorator]
    async def broken() -> None:
        module.get_session().add(module.Item(name="lost"))
        await module.get_session().flush()
        raise LookupError

    def fail(*_: object) -> None:
        raise RuntimeError

    module.print = fail
    async with module.database:
        assert (await post(module.app, "/broken")).status == 500
        assert (await post(module.app, "/items", "name=tea")).status == 201
    (first, reason), (second, _) = exceptions()
    assert (first, reason, second) == ("LookupError", "exception", "RuntimeError")
    assert page.stored("SELECT name FROM item") == ["tea"]


async def test_a_retry_and_a_503_are_no_errors(
    page: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """Their log lines are breadcrumbs of what is reported later in the same request."""
    page.load("shop")
    caplog.set_level(logging.INFO, "asgi_dbsession")
    database = AsyncDatabase(page.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    app = FastAPI()
    app.add_middleware(
        DBSessionMiddleware, database, attempts=2, retry_on=LookupError, retry_after=1
    )

    @app.get("/again")
    async def again(*, fail: bool = False) -> None:
        if current_attempt().number == 1:
            raise LookupError
        if fail:
            raise ValueError

    @app.get("/busy")
    async def busy() -> None:
        await get_session().execute(select(1))
        async with database.begin() as session:
            await session.execute(select(1))

    async with database:
        assert (await Exchange(app, "/again").run()).status == 200
        assert (await Exchange(app, "/busy").run()).status == 503
        assert exceptions() == []
        failed = Exchange(app, "/again")
        failed.scope["query_string"] = b"fail=true"
        assert (await failed.run()).status == 500
    assert exceptions() == [("ValueError", None)]
    crumbs = [each["message"] for each in Kept.events[0]["breadcrumbs"]["values"]]
    assert [crumb for crumb in crumbs if "GET /again" in crumb]
    assert any("answered 503" in message for message in caplog.messages)


async def test_no_password_is_sent(page: Library) -> None:
    """When a connection fails; with Sentry's default it would be."""
    module = page.load("shop")

    async def sent(app: Any) -> str:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"postgresql+asyncpg://app:hush@127.0.0.1:{closed.getsockname()[1]}/shop"
            async with AsyncDatabase(url, ping_on_startup=False) as database:
                app.user_middleware[0].args = (database,)
                app.middleware_stack = None
                assert (await post(app, "/items", "name=tea")).status == 500
        return json.dumps(Kept.events, default=str)

    found = await sent(module.app)
    assert "ConnectionRefusedError" in found
    assert "hush" not in found
    sentry_sdk.init()
    assert "hush" in await sent(module.app)


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
async def test_each_log_line_has_the_id_of_its_request(
    page: Library,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    database_class: type[Any],
) -> None:
    """Lines of this package and of SQLAlchemy; the response has it too."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's are put back at the end
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    module = page.load("main")
    database = database_class(page.url.replace("asyncpg", "psycopg"))

    def send_mail() -> None:
        raise RuntimeError

    async def mail() -> None:
        on_commit(send_mail)
        session = database.get_session()
        if isinstance(session, Session):
            await to_thread.run_sync(session.execute, select(1))
        else:
            await session.execute(select(1))

    module.app.post("/mail")(mail)
    module.app.user_middleware[0].args = (database,)
    logging.getLogger("sqlalchemy.engine").setLevel(logging.INFO)
    async with database:
        capsys.readouterr()
        exchanges = [await post(module.asgi, "/mail") for _ in range(2)]
    logging.getLogger("sqlalchemy.engine").setLevel(logging.NOTSET)
    printed = capsys.readouterr().err.splitlines()
    for exchange in exchanges:
        headers = dict(exchange.messages[0]["headers"])
        name = f"[{headers[b'x-request-id'].decode()}]"
        said = [line.partition(name)[2].strip() for line in printed if name in line]
        assert "SELECT 1" in said
        assert said[-1].endswith("send_mail failed; the committed work stays stored.")
    lines = [line for line in printed if " INFO " in line or " ERROR " in line]
    assert not [line for line in lines if "[-]" in line]


async def test_the_500_of_an_unhandled_error_has_the_id(
    page: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette sends this answer outside of all middleware that is added to it."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's are put back at the end
    module = page.load("main")

    @module.app.post("/broken")  # type: ignore[untyped-decorator]
    async def broken() -> None:
        raise LookupError

    async with page.load("shop").database:
        exchange = await post(module.asgi, "/broken")
    assert exchange.status == 500
    assert b"x-request-id" in dict(exchange.messages[0]["headers"])
