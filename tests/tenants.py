"""Sends requests of many tenants at once over a few connections, and checks what each sees."""

import asyncio
import random
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pgbouncer
import postgres
from asgi import Exchange
from fastapi import HTTPException, Request
from pages import Page
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    select,
    text,
    update,
)
from sqlalchemy.pool import NullPool

from asgi_dbsession import get_session

PAGE = Page("docs/how-to/multi-tenancy.md")
BY_ROW = "row-level security"
WAYS = {
    BY_ROW: (),
    "search_path": ("A schema for each tenant, with `search_path`",),
    "schema_translate_map": ("A schema for each tenant, with `schema_translate_map`",),
}
TENANTS = [f"tenant {number}" for number in range(50)]
OPTIONS: dict[str, Any] = {"pool_size": 5, "max_overflow": 0}
# As `docs/how-to/drivers.md` says.
FOR_PGBOUNCER = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}
# The table of the page, with one more column that counts.
ITEM = Table("item", MetaData(), Column("name", String), Column("n", Integer))

_OUTCOMES = (
    *["stored"] * 12,
    *["refused"] * 3,
    "raised",
    "outside",
    "raised",
    "outside",
    "cancelled",
)


class Shop:
    """The application of the page on a database of its own, and what it should have counted.

    Args:
        way: Which form of it, a key of `WAYS`.
        bouncer: Whether PgBouncer is in between.
    """

    def __init__(self, way: str, *, bouncer: bool) -> None:
        self.way = way
        self.outcomes: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._perhaps: Counter[str] = Counter()
        url = postgres.new_database("tenants")
        self.owner: Engine = create_engine(
            url.set(drivername="postgresql+psycopg"), poolclass=NullPool
        )
        url = url.set(drivername="postgresql+asyncpg")
        options = OPTIONS | ({"connect_args": FOR_PGBOUNCER} if bouncer else {})
        self.module = self._load(pgbouncer.url_through(url) if bouncer else url, options)
        self.module.app.add_api_route("/count/{outcome}", self._work)
        self._create()

    async def ask(self, tenant: str, path: str, method: str = "GET") -> Exchange:
        """Send one request of a tenant, and keep its exception."""
        exchange = Exchange(self.module.app, path, method=method)
        exchange.scope["headers"].append((b"x-tenant", tenant.encode()))
        exchange.scope["path"], _, query = path.partition("?")
        exchange.scope["query_string"] = query.encode()
        return await exchange.run()

    async def stress(self, requests: int, *, at_once: int = 20) -> None:
        """Send requests of all tenants, and check that each was counted where it belongs.

        Raises:
            AssertionError: One saw, or changed, what is not its tenant's.
        """
        todo = (_OUTCOMES[number % len(_OUTCOMES)] for number in range(requests))

        async def client() -> None:
            for outcome in todo:
                await self._one(outcome)

        async with self.module.database:
            await asyncio.gather(*(client() for _ in range(at_once)))
            pool: Any = self.module.database.engine.pool
            assert pool.checkedout() == 0
        for tenant in TENANTS:
            found = self._count_of(tenant)
            sure = self._counted[tenant]
            assert sure <= found <= sure + self._perhaps[tenant], (tenant, found, sure)

    async def _one(self, outcome: str) -> None:
        tenant = random.choice(TENANTS)
        request = asyncio.create_task(self.ask(tenant, f"/count/{outcome}"))
        if outcome == "cancelled":
            self._perhaps[tenant] += 2
            for _ in range(random.randrange(60)):
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])
        else:
            exchange = await request
            if isinstance(exchange.error, AssertionError):
                raise exchange.error
            expected = {"stored": 200, "outside": 200, "refused": 409, "raised": 500}[outcome]
            assert exchange.status == expected, (outcome, exchange.status, exchange.error)
            self._counted[tenant] += {"stored": 2, "outside": 3}.get(outcome, 1)
        self.outcomes[outcome] += 1

    async def _work(self, outcome: str, request: Request) -> None:
        tenant = request.state.tenant
        session = get_session()
        await self._count(session, tenant)
        await session.commit()
        if outcome == "outside":
            await self._look_without_a_tenant()
            async with self.module.database.begin() as another:
                await self._count(another, tenant)
        async with session.begin_nested():
            await self._count(session, tenant)
        if outcome == "refused":
            raise HTTPException(409)
        if outcome == "raised":
            raise RuntimeError

    async def _count(self, session: Any, tenant: str) -> None:
        await session.execute(update(ITEM).values(n=ITEM.c.n + 1))
        seen = (await session.scalars(select(ITEM.c.name))).all()
        assert seen == [tenant], f"{tenant} saw {seen}"

    async def _look_without_a_tenant(self) -> None:
        async with self.module.database.engine.connect() as connection:
            found = await connection.execute(
                text("SELECT current_setting('app.tenant', true), current_setting('search_path')")
            )
            tenant, path = found.one()
            assert not tenant, f"the connection was left to {tenant}"
            assert path == '"$user", public', f"the connection was left to {path}"

    def _load(self, url: URL, options: dict[str, Any]) -> Any:
        code = PAGE.files(*WAYS[self.way])["shop.py"]
        assert "AsyncDatabase.from_env(" in code
        code = code.replace("AsyncDatabase.from_env(", "AsyncDatabase(URL, **OPTIONS, ")
        module = ModuleType("shop")
        module.__dict__.update(URL=url, OPTIONS=options)
        sys.modules["shop"] = module  # needed for `jobs.py`, and for annotations
        exec(compile(code, PAGE.path, "exec"), module.__dict__)
        return module

    def _create(self) -> None:
        metadata = self.module.Base.metadata
        with self.owner.begin() as connection:
            if self.way == BY_ROW:
                metadata.create_all(connection)
                connection.execute(text("DROP ROLE IF EXISTS shop"))
                connection.execute(text("CREATE ROLE shop"))
                # A role in the URL has the same effect, but this PgBouncer does not support it.
                connection.execute(text("ALTER DATABASE tenants SET role = shop"))
                for statement in "".join(PAGE.blocks("sql")).split(";")[:-1]:
                    connection.execute(text(statement))
                connection.execute(text("ALTER TABLE item ADD COLUMN n integer DEFAULT 0"))
            for tenant in TENANTS:
                if self.way == BY_ROW:
                    columns = "item (tenant, name) VALUES (:tenant, :tenant)"
                else:
                    connection.execute(text(f'CREATE SCHEMA "{tenant}"'))
                    connection.execute(text(f'SET LOCAL search_path = "{tenant}"'))
                    metadata.create_all(connection, checkfirst=False)
                    connection.execute(text("ALTER TABLE item ADD COLUMN n integer DEFAULT 0"))
                    columns = "item (name) VALUES (:tenant)"
                connection.execute(text(f"INSERT INTO {columns}"), {"tenant": tenant})

    def _count_of(self, tenant: str) -> int:
        table = "item" if self.way == BY_ROW else f'"{tenant}".item'
        with self.owner.connect() as connection:
            connection.execute(text("SET ROLE NONE"))
            query = text(f"SELECT n FROM {table} WHERE name = :tenant")
            return int(connection.scalar(query, {"tenant": tenant}) or 0)
