"""The applications that the pages on other libraries show, on real databases and real sockets."""

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import becomes_true, checked_out, postgresql
from pages import Page
from sqlalchemy import Engine, MetaData, create_engine, text
from sqlalchemy.pool import NullPool

# The databases of a page: a file, and a server.
STORES = ("sqlite", "asyncpg")


class Library:
    """Imports the files of a page, with an empty database for their tables.

    Args:
        page: The page that shows the application.
        store: Which of `STORES`.
        folder: Where its files are written.
        patch: Undoes what this changes.
    """

    def __init__(self, page: Page, store: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.reader: Engine
        if store == "sqlite":
            url = f"sqlite+aiosqlite:///{folder / 'library.db'}"
            self.reader = create_engine(url.replace("+aiosqlite", ""), poolclass=NullPool)
            with self.reader.connect() as connection:
                # The reader blocks the event loop of the server, so COMMIT must not wait for the
                # reader.
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        else:
            address, self.reader = postgresql("libraries")
            address = address.set(drivername=f"postgresql+{store}")
            url = address.render_as_string(hide_password=False)
        self.url = url
        self._folder = folder
        self._metadata: list[MetaData] = []
        for name, code in page.files().items():
            (folder / name).write_text(code)
        patch.setenv("DATABASE_URL", url)
        patch.chdir(folder)
        patch.syspath_prepend(folder)

    def load(self, name: str) -> Any:
        """Import one of the files, and make its tables."""
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        if hasattr(module, "Base"):
            self._metadata.append(module.Base.metadata)
        for metadata in self._metadata:
            metadata.create_all(self.reader)
        return module

    def stored(self, query: str) -> list[Any]:
        """Return the first column of the stored rows, in order."""
        with self.reader.connect() as connection:
            return sorted(connection.scalars(text(query)))

    def execute(self, statement: str) -> None:
        """Store a row over another connection."""
        with self.reader.begin() as connection:
            connection.execute(text(statement))

    def close(self) -> None:
        """Forget modules and tables."""
        for metadata in self._metadata:
            metadata.drop_all(self.reader)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(self._folder)):
                del sys.modules[name]


@contextmanager
def library(page: Page, store: str, folder: Path) -> Iterator[Library]:
    """Make the files of the page importable inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        found = Library(page, store, folder, patch)
        try:
            yield found
        finally:
            found.close()


@asynccontextmanager
async def served(app: Any, database: Any = None) -> AsyncIterator[str]:
    """Serve an application by uvicorn, in this event loop; yields `host:port`.

    Args:
        app: What is served.
        database: Must have all connections back in its pool when clients have gone.
    """
    config = uvicorn.Config(
        app, port=0, log_level="error", lifespan="on", ws="websockets-sansio", loop="none"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await becomes_true(lambda: server.started or serving.done())
    assert not serving.done(), "the startup failed"
    try:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"{host}:{port}"
        if database is not None:
            await becomes_true(lambda: checked_out(database) == 0)
    finally:
        server.should_exit = True
        await serving
