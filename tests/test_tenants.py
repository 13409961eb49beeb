"""Tests that tenants never see each other's rows, with the code of the page on tenants."""

import asyncio
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from fastapi import Request
from sqlalchemy import select, text
from sqlalchemy.exc import ProgrammingError
from tenants import BY_ROW, PAGE, TENANTS, WAYS, Shop

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """The application of the page, by default with row-level security."""
    way, bouncer = getattr(request, "param", (BY_ROW, False))
    yield Shop(way, bouncer=bouncer)
    sys.modules.pop("shop")


EVERY_WAY = [(way, bouncer) for way in WAYS for bouncer in (False, True)]
NAMES = [f"{way}, {'PgBouncer' if bouncer else 'direct'}" for way, bouncer in EVERY_WAY]


@pytest.mark.parametrize("shop", EVERY_WAY, ids=NAMES, indirect=True)
async def test_tenants_that_share_connections_never_meet(shop: Shop) -> None:
    """This holds after a commit in the middle, an error, a cancellation, and with PgBouncer."""
    await shop.stress(100)
    assert shop.outcomes.total() == 100


@pytest.mark.parametrize("shop", EVERY_WAY[::2], ids=NAMES[::2], indirect=True)
async def test_the_handlers_of_the_page_know_their_tenant(shop: Shop) -> None:
    """Only the tenant that stored a row can list it."""
    async with shop.module.database:
        assert (await shop.ask("tenant 1", "/items?name=tea", "POST")).status == 201
        assert (await shop.ask("tenant 1", "/items")).body == b'["tenant 1","tea"]'
        assert (await shop.ask("tenant 2", "/items")).body == b'["tenant 2"]'


async def test_a_job_says_whose_work_it_is(shop: Shop) -> None:
    """A job outside of a request sees its tenant's rows."""
    jobs = ModuleType("jobs")
    exec(PAGE.files()["jobs.py"], jobs.__dict__)
    async with shop.module.database:
        assert [await jobs.count(tenant) for tenant in ("tenant 3", "nobody")] == [1, 0]


FORMS = pytest.mark.parametrize("shop", EVERY_WAY[::2], ids=NAMES[::2], indirect=True)


@FORMS
async def test_work_of_nobody_is_refused(shop: Shop) -> None:
    """It raises before any statement, although `public` has a table of that name too."""
    lay_a_trap(shop)
    async with shop.module.database as database:
        for said in ({}, {"tenant": ""}, {"tenant": None}):
            with pytest.raises(LookupError, match="no tenant"):
                async with database.begin() as session:
                    session.info.update(said)
                    await session.scalars(select(shop.module.Item.name))
        nameless = await shop.ask("", "/items")
        assert (nameless.status, type(nameless.error)) == (500, LookupError)
        assert (await shop.ask("", "/items?name=lost", "POST")).status == 500
        assert database.engine.pool.checkedout() == 0
        assert (await shop.ask("tenant 1", "/items")).body == b'["tenant 1"]'


@FORMS
async def test_a_task_that_outlives_its_request_says_whose_work_it_is(shop: Shop) -> None:
    """Inside of the request it has the tenant of the request; afterwards, what it was given."""
    lay_a_trap(shop)
    ended = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []
    jobs = ModuleType("jobs")
    exec(PAGE.files()["jobs.py"], jobs.__dict__)

    async def names() -> list[str]:
        async with shop.module.database.begin() as session:
            return list(await session.scalars(select(shop.module.Item.name)))

    async def names_later() -> list[str]:
        await ended.wait()
        return await names()

    async def count_later(tenant: str) -> int | None:
        await ended.wait()
        found: int | None = await jobs.count(tenant)
        return found

    async def start(request: Request) -> list[str]:
        tasks.append(asyncio.create_task(names_later()))
        tasks.append(asyncio.create_task(count_later(request.state.tenant)))
        return await names()

    shop.module.app.add_api_route("/start", start)
    async with shop.module.database:
        assert (await shop.ask("tenant 1", "/start")).body == b'["tenant 1"]'
        ended.set()
        await asyncio.wait(tasks)
        assert isinstance(tasks[0].exception(), LookupError)
        assert tasks[1].result() == 1


@FORMS
async def test_what_bypasses_the_sessions_finds_nothing(shop: Shop) -> None:
    """As the page's last table and statement say, also on a connection that has had a tenant."""
    if shop.way != BY_ROW:
        (statement,) = PAGE.blocks("postgresql")
        with shop.owner.begin() as connection:
            connection.execute(text(statement.replace("ROLE shop", "DATABASE tenants")))
    async with shop.module.database as database:
        await shop.ask(TENANTS[0], "/items")
        for _ in range(2):
            async with database.engine.connect() as connection:
                count = connection.scalar(text("SELECT count(*) FROM item"))
                if shop.way == BY_ROW:
                    assert await count == 0
                else:
                    with pytest.raises(ProgrammingError, match="does not exist"):
                        await count


def lay_a_trap(shop: Shop) -> None:
    """Put a table of that name, with a row of another one, where the default path leads."""
    if shop.way != BY_ROW:
        with shop.owner.begin() as connection:
            connection.execute(text("CREATE TABLE public.item (id serial, name text)"))
            connection.execute(text("INSERT INTO public.item (name) VALUES ('trap')"))
