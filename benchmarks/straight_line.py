"""Counts what one INSERT runs of this package: modules, lines, and frames before COMMIT.

    python -m benchmarks.straight_line

A request of an application without a framework opens the session, inserts a row on SQLite and
answers 201. The counts are of the third such request, so that caches are warm.
"""

import asyncio
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Integer, MetaData, Table, insert
from sqlalchemy.orm import Session

import asgi_dbsession
from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

HOME = str(Path(asgi_dbsession.__file__).parent)
METADATA = MetaData()
ENTRY = Table("entry", METADATA, Column("id", Integer, primary_key=True))
SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Insert a row."""
    await get_session().execute(insert(ENTRY))
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def ignore(*_: Any) -> Any:
    """Receive nothing, because there is no client."""


class Count:
    """Records the lines that run while it is active.

    Attributes:
        lines: The lines of this package, by file.
        frames: The frames of this package between the application's `send` and `Session.commit`.
    """

    def __init__(self) -> None:
        self.lines: dict[str, set[int]] = {}
        self.frames: list[str] = []
        self.events = 0
        self._sending: list[str] = []

    def trace(self, frame: Any, kind: str, _: Any) -> Any:
        """Record a line; called by `sys.settrace`."""
        code = frame.f_code
        if code is Session.commit.__code__ or code.co_qualname == "Session.commit":
            self.frames = self._sending + self._ours_around(frame)
        if not code.co_filename.startswith(HOME):
            return self.trace if kind == "call" else None
        if kind == "line":
            self.events += 1
            self.lines.setdefault(code.co_filename, set()).add(frame.f_lineno)
        if kind == "call" and code.co_name == "run_to_completion":
            self._sending = self._ours_around(frame)
        return self.trace

    def _ours_around(self, frame: Any) -> list[str]:
        found = []
        import greenlet  # noqa: PLC0415  # as SQLAlchemy does

        current = greenlet.getcurrent()
        while current is not None:
            while frame is not None:
                if frame.f_code is app.__code__:
                    return found[::-1]
                if frame.f_code.co_filename.startswith(HOME):
                    found.append(frame.f_code.co_qualname)
                frame = frame.f_back
            current = current.parent
            frame = current.gr_frame if current is not None else None
        return found[::-1]


async def main() -> Count:
    """Serve three requests, and count the lines of the last one."""
    with tempfile.TemporaryDirectory() as folder:
        database = AsyncDatabase(f"sqlite+aiosqlite:///{folder}/line.db")
        async with database:
            async with database.engine.begin() as connection:
                await connection.run_sync(METADATA.create_all)
            served = DBSessionMiddleware(app, database)
            for _ in range(2):
                await served(dict(SCOPE), ignore, ignore)
            count = Count()
            threading.settrace(None)  # type: ignore[arg-type]
            sys.settrace(count.trace)
            await served(dict(SCOPE), ignore, ignore)
            sys.settrace(None)
    return count


if __name__ == "__main__":
    count = asyncio.run(main())
    for file, lines in sorted(count.lines.items()):
        print(f"{len(lines):4} lines  {Path(file).relative_to(HOME)}")
    print(f"{count.events} line events")
    print(f"{sum(map(len, count.lines.values()))} lines in {len(count.lines)} modules")
    print(f"{len(count.frames)} frames between send and COMMIT: {' > '.join(count.frames)}")
