"""Finds out which units of work hold a connection now, and which wait for a connection."""

from time import perf_counter
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

from sqlalchemy.pool import QueuePool

from asgi_dbsession.reports.tally import Tally
from asgi_dbsession.session._sqlalchemy import most_overflow, pool_entry
from asgi_dbsession.session.companion import Step

from .observer import LiveObserver, server_of
from .shown import line, name, without_values


class Connection(TypedDict):
    """A connection of a pool, as the web page shows the connection. All times are in seconds."""

    lane: int
    state: str
    request: str
    held: float
    since: float
    line: str
    statement: str
    in_transaction: bool
    read_only: bool


class Waiting(TypedDict):
    """A unit of work that is waiting for a connection."""

    request: str
    seconds: float


class DatabaseNow(TypedDict):
    """Who uses the connections of one database now, and who waits for a connection.

    `most` is how many connections the pool may open. It is None if there is no limit, or if this
    package does not know the limit.
    """

    name: str
    is_running: bool
    in_use: int
    most: int | None
    connections: list[Connection]
    waiting: list[Waiting]


class Lanes:
    """Gives each connection of a pool a number: its row on the page that shows connections."""

    def __init__(self) -> None:
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def of(self, entry: Any) -> int:
        """Return the number of the row in which the web page `LivePage` shows a connection, from 1.

        A connection keeps its row, so the row does not move while somebody reads the web page.
        """
        if entry not in self._numbers:
            taken = set(self._numbers.values())
            self._numbers[entry] = next(n for n in range(1, len(taken) + 2) if n not in taken)
        return self._numbers[entry]


class Now:
    """Finds out how connections are used now, for the web page that shows connections.

    This opens no connection itself.

    Args:
        databases: The databases to show on the web page.
        observer: The object that knows which units of work are open.
    """

    def __init__(self, databases: tuple[Any, ...], observer: LiveObserver) -> None:
        self._databases: tuple[Any, ...] = databases
        self._observer: LiveObserver = observer
        self._lanes: dict[Any, Lanes] = {each: Lanes() for each in databases}
        self._shown: dict[Any, int] = dict.fromkeys(databases, 0)

    def look(self) -> list[DatabaseNow]:
        """Return how the connections of all databases are used now, for the web page `LivePage`.

        The databases are in the order in which the web page shows them.
        """
        now = perf_counter()
        used: dict[Any, list[Connection]] = {each: [] for each in self._databases}
        waiting: dict[Any, list[Waiting]] = {each: [] for each in self._databases}
        for request, unit in self._observer.open_units():
            for opened_by, opened in tuple(unit.sessions.items()):
                database, companion = server_of(opened_by, opened), opened.companion
                recording: Any = companion.recording
                if database not in used or recording is None:
                    continue
                connections = companion.open_connections
                entry = pool_entry(connections[-1]) if connections else None
                steps: list[Step] = list(recording.steps)
                tally = Tally(steps, now)
                if entry is not None and tally.since is not None:
                    is_in_autocommit = getattr(entry.dbapi_connection, "autocommit", None) is True
                    shown = _connection(steps[-1], database.url.get_backend_name(), now)
                    shown["lane"], shown["request"] = self._lanes[database].of(entry), request
                    shown["held"], shown["read_only"] = now - tally.since, unit.read_only
                    shown["in_transaction"] = tally.in_transaction and not is_in_autocommit
                    used[database].append(shown)
                elif recording.waits_since is not None:
                    seconds = now - recording.waits_since
                    waiting[database].append({"request": request, "seconds": seconds})
        return [self._database(each, used[each], waiting[each]) for each in self._databases]

    def _database(
        self, database: Any, used: list[Connection], waiting: list[Waiting]
    ) -> DatabaseNow:
        pool = pool_of(database)
        size, most, checked_out = 0, None, len(used)
        if isinstance(pool, QueuePool):
            size, checked_out = pool.size(), pool.checkedout()
            overflow = most_overflow(pool)
            most = None if overflow < 0 else size + overflow
        lanes = {each["lane"]: each for each in used}
        shown = max(size, checked_out, self._shown[database], *lanes, 0)
        if most is not None:
            shown = max(min(shown, most), *lanes, 0)
        # Keep the rows of closed connections on the web page. Otherwise all content below these
        # rows would move up while somebody reads the page.
        self._shown[database] = shown
        others = max(0, checked_out - len(used))
        connections = []
        for number in range(1, shown + 1):
            found = lanes.get(number)
            if found is None:
                found = _empty(number, "other" if others > 0 else "free")
                others -= 1
            connections.append(found)
        return {
            "name": name(database),
            "is_running": bool(database.is_running),
            "in_use": checked_out,
            "most": most,
            "connections": connections,
            "waiting": sorted(waiting, key=lambda each: -each["seconds"]),
        }


def pool_of(database: Any) -> Any:
    """Return the connection pool of a database. None if the database is not running."""
    return database.engine.pool if database.is_running else None


def _connection(last: Step, dialect: str, now: float) -> Connection:
    kind, start, stop, call_site, text = last
    return {
        **_empty(0, "working" if stop is None else "idle"),
        "since": now - (stop or start),
        "line": line(call_site),
        "statement": without_values(text, dialect) or ("" if kind == "hold" else kind.upper()),
    }


def _empty(lane: int, state: str) -> Connection:
    return {
        "lane": lane,
        "state": state,
        "request": "",
        "held": 0,
        "since": 0,
        "line": "",
        "statement": "",
        "in_transaction": False,
        "read_only": False,
    }
