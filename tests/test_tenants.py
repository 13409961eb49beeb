"""Tests that tenants never see each other's rows, with the code of the page on tenants."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from sqlalchemy import text
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
    await shop.stress(200)
    assert shop.outcomes.total() == 200


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


async def test_work_of_nobody_is_refused(shop: Shop) -> None:
    """The statement raises, and its connection is returned; direct SQL sees no row."""
    async with shop.module.database as database:
        with pytest.raises(TypeError):  # no request, and no tenant
            async with database.begin() as session:
                await session.execute(text("SELECT 1"))
        assert database.engine.pool.checkedout() == 0
        await shop.ask(TENANTS[0], "/items")
        for _ in range(2):  # also on a connection that was used for a tenant
            async with database.engine.connect() as connection:
                assert await connection.scalar(text("SELECT count(*) FROM item")) == 0
