"""A MariaDB database with `autocommit_reads=True`, and the statements that its server receives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import ENTRY, AnyDatabase, Real, Running
from sqlalchemy import Engine, select, text
from sqlalchemy.util import greenlet_spawn

from asgi_dbsession import DBSessionMiddleware, SyncDatabase

KINDS = ("asyncmy", "aiomysql", "pymysql-sync")
READ = select(ENTRY)
OPTIONS: dict[str, Any] = {
    "autocommit_reads": True,
    "isolation_level": "READ COMMITTED",
    "pool_size": 1,
    "max_overflow": 0,
}
Work = Callable[[Any], Any]


@dataclass
class Reading(Running):
    """A running database whose only connection has read already, and is in autocommit mode."""

    async def on_session(self, work: Work, database: AnyDatabase | None = None) -> Any:
        """Call blocking code with the current session, as an application does."""
        database = database or self.database
        if isinstance(database, SyncDatabase):
            return await to_thread.run_sync(lambda: work(database.get_session()))
        return await database.get_session().run_sync(work)

    async def on_engine(self, work: Work) -> Any:
        """Call blocking code with the `Engine`, as a script or a health check does."""
        engine: Any = self.database.engine
        if isinstance(engine, Engine):
            return await to_thread.run_sync(work, engine)
        return await greenlet_spawn(work, engine.sync_engine)

    async def request(self, work: Work, status: int = 200, **options: Any) -> Exchange:
        """Call blocking code with the session of a request."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self.on_session(work)
            await respond(send, status)

        return await get(DBSessionMiddleware(app, self.database, **options))

    async def read(self) -> None:
        """Serve a request that only reads, so that the connection is in autocommit mode."""
        assert (await self.request(lambda session: session.execute(READ))).status == 200

    def clear(self) -> None:
        """Delete all rows."""
        with self.real.reader.connect() as connection:
            connection.execute(ENTRY.delete())

    async def statements_of_a_read(self) -> list[str]:
        """Return what the server gets from a request that only reads."""
        await self.read()
        return await self.sent(self.read)

    async def sent(self, work: Callable[[], Any]) -> list[str]:
        """Return all statements that the server gets from the database meanwhile."""
        with self.real.reader.connect() as connection:
            connection.execute(text("SET GLOBAL log_output = 'TABLE'"))
            connection.execute(text("TRUNCATE mysql.general_log"))
            connection.execute(text("SET GLOBAL general_log = ON"))
            try:
                await work()
            finally:
                connection.execute(text("SET GLOBAL general_log = OFF"))
            query = (
                "SELECT CONVERT(argument USING utf8mb4) FROM mysql.general_log "
                "WHERE command_type = 'Query' AND user_host LIKE 'app%'"
            )
            return [" ".join(each.split()) for each in connection.scalars(text(query))]


def described(real: Real, **options: Any) -> AnyDatabase:
    """Describe a database that reads in autocommit mode on its only connection."""
    return real.describe(**OPTIONS | options)
