"""APScheduler: a job is a unit of work of its own, and belongs to no request."""

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler  # type: ignore[import-untyped]
from asgi import get, respond
from conftest import Real, becomes_true
from library import STORES, Library, library, served
from pages import Page
from sqlalchemy import select

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

pytestmark = pytest.mark.anyio
KINDS = ("sqlite",)

PAGE = Page("docs/how-to/apscheduler.md")


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


async def test_a_job_of_the_lifespan_stores_what_it_does(page: Library) -> None:
    """The job runs while requests are served; a failed run stores nothing, the next run works."""
    module = page.load("cleaner")
    (forget_drafts,) = module.scheduler.get_jobs()
    forget_drafts.reschedule("interval", seconds=0.1)
    scopes: list[Any] = []
    runs = iter(range(10**6))

    @module.database.begin()  # type: ignore[untyped-decorator]
    async def fail_first() -> None:
        scopes.append(get_session().info["scope"])
        run = next(runs)
        get_session().add(module.Line(text=f"run {run}"))
        await get_session().flush()
        if run == 0:
            raise RuntimeError

    module.scheduler.add_job(fail_first, "interval", seconds=0.05)
    async with served(module.app, module.database) as host, httpx2.AsyncClient() as client:
        for text in ("kept", "draft"):
            address = f"http://{host}/lines"
            assert (await client.post(address, params={"text": text})).status_code == 201
        await becomes_true(lambda: "kept" in page.stored("SELECT text FROM line"))
        await becomes_true(lambda: "run 1" in page.stored("SELECT text FROM line"))
        await becomes_true(lambda: "draft" not in page.stored("SELECT text FROM line"))
    assert "run 0" not in page.stored("SELECT text FROM line")
    assert set(scopes) == {None}


class LazyStart:
    """An application that starts a scheduler in a request, and its one job.

    Args:
        database: What both use.
        start: Starts the scheduler, given it.
        in_block: Whether it is started inside of a `begin()` of the request.
    """

    def __init__(
        self, database: AsyncDatabase[Any], start: Callable[[Any], None], *, in_block: bool = False
    ) -> None:
        self.database = database
        self.scheduler = AsyncIOScheduler()
        self.scopes: list[Any] = []
        self._start = start
        self._in_block = in_block

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await get_session().execute(select(1))
        self.scheduler.add_job(self.job, "interval", seconds=0.02)
        if self._in_block:
            async with self.database.begin():
                self._start(self.scheduler)
        else:
            self._start(self.scheduler)
        await respond(send)

    async def job(self) -> None:
        async with self.database.begin() as session:
            self.scopes.append(session.info["scope"])


@pytest.mark.parametrize("in_block", [False, True])
async def test_a_scheduler_that_a_request_started_forgets_the_request(
    real: Real, *, in_block: bool
) -> None:
    """A job after the end of the request has no scope, so it works for no tenant."""
    database: Any = real.describe()
    app = LazyStart(database, lambda scheduler: scheduler.start(), in_block=in_block)
    async with database:
        assert (await get(DBSessionMiddleware(app, database))).status == 200
        app.scopes.clear()
        await becomes_true(lambda: len(app.scopes) > 2)
        app.scheduler.shutdown()
        await asyncio.sleep(0.05)
    assert set(map(type, app.scopes)) == {type(None)}


@pytest.mark.parametrize("context", [None, contextvars.Context()], ids=["its own", "empty"])
async def test_a_job_that_a_request_adds_gives_all_jobs_the_context_of_the_request(
    context: contextvars.Context | None,
) -> None:
    """Unless the request adds the job in an empty context, as the page says."""
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")
    scheduler = AsyncIOScheduler()
    seen: list[str] = []

    async def note_the_user() -> None:
        seen.append(user.get())

    async def add_a_job() -> None:
        user.set("ada")
        run = contextvars.copy_context().run if context is None else context.run
        run(scheduler.add_job, str, "date")

    scheduler.add_job(note_the_user, "interval", seconds=0.02)
    scheduler.start()
    await asyncio.create_task(add_a_job())
    await becomes_true(lambda: len(seen) > 3)
    scheduler.shutdown()
    await asyncio.sleep(0.05)
    assert seen[-1] == ("ada" if context is None else "nobody")


async def test_a_scheduler_in_an_empty_context_has_no_request(real: Real) -> None:
    """A job has no scope even while the request that started it is served."""
    database: Any = real.describe()

    def start(scheduler: Any) -> None:
        contextvars.Context().run(scheduler.start)

    starting = LazyStart(database, start)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await starting(scope, receive, send)
        await becomes_true(lambda: len(starting.scopes) > 2)

    async with database:
        assert (await get(DBSessionMiddleware(app, database))).status == 200
        starting.scheduler.shutdown()
        await asyncio.sleep(0.05)
    assert set(map(type, starting.scopes)) == {type(None)}
