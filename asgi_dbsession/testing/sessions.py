"""Lets a session raise an error when it begins a transaction that its test cannot roll back."""

import asyncio
import threading
from contextvars import ContextVar, copy_context
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session

from asgi_dbsession.database.base import Database
from asgi_dbsession.errors import without_secrets

from .dialect import record_of
from .isolation import Isolation, NotIsolated, outlived

# The test (its `with rolled_back(...)` block) that has started the current task or thread, or None.
_block: ContextVar[Isolation | None] = ContextVar("asgi_dbsession.testing", default=None)

# For each database object: the `with rolled_back(...)` block that was entered last.
_latest: WeakKeyDictionary[Database[Any, Any, Any], Isolation] = WeakKeyDictionary()
# For each session: the `with rolled_back(...)` block in which the session was used first.
_block_of: WeakKeyDictionary[Session, Isolation] = WeakKeyDictionary()

# The modules of the worker threads of anyio and trio, which stay in a pool and run code of many
# tests. Do not treat such a thread as a thread of the test that has started it. Otherwise the next
# use of the database in this thread, by a later test, would raise an error.
_POOLS = ("anyio.", "trio.")


def watch_sessions(database: Database[Any, Any, Any], isolation: Isolation) -> None:
    """From now on, let a session raise an error at BEGIN if the test cannot roll back its work.

    There are two such cases: the test has ended, or the session uses an engine that was not given
    to `rolled_back` (the function that rolls back all work of a test).
    """
    earlier = _latest.get(database)
    if earlier is None:
        # Never remove this listener, because it must also refuse work that goes on after the test.
        event.listen(database._orm_class, "after_begin", _Check(database))
    else:
        # Tasks and threads of earlier tests may still run. They must get an error in the new test
        # too.
        isolation.threads.intersection_update(earlier.threads)
        isolation.tasks.update(earlier.tasks)
    _latest[database] = isolation


def enter_block(isolation: Isolation) -> None:
    """From now on, mark each new task as a task of this `with rolled_back(...)` block.

    A new thread is marked too, if it copies the context (`contextvars`) of the code that starts it.
    After the block, marked tasks and threads get an error if they use the database.
    """
    _block.set(isolation)


def leave_block(isolation: Isolation) -> None:
    """From now on, let tasks and threads of a test get an error if they use the database.

    Called at the end of the `with rolled_back(...)` block in which the test has started them.
    """
    isolation.has_ended = True
    if (task := _current_task()) is not None:
        isolation.tasks.discard(task)
    allowed = {*isolation.threads, threading.current_thread()}
    isolation.leftovers.update(
        each
        for each in threading.enumerate()
        if each not in allowed and not type(each).__module__.startswith(_POOLS)
    )
    _block.set(None)


class _Check:
    """Called at each BEGIN of a session. Raises an error if the test cannot roll back the work.

    This is so if the test that has used the session has ended, or if the engine of the session was
    not given to `rolled_back`.
    """

    def __init__(self, database: Database[Any, Any, Any]) -> None:
        self._database = database

    def __call__(self, session: Session, _transaction: object, connection: Connection) -> None:
        isolation = _latest[self._database]
        name = without_secrets(self._database.url)
        if isolation.has_ended:
            if session in _block_of or _outlived(isolation):
                _refuse(connection, outlived(name))
            return
        if _block_of.setdefault(session, isolation).has_ended:
            _refuse(connection, outlived(name))
        if (task := _current_task()) is not None:
            isolation.tasks.add(task)
        if record_of(connection.connection) is None:
            error = _not_covered(connection)
            isolation.violations.append(error)
            _refuse(connection, error)


def _outlived(isolation: Isolation) -> bool:
    """Return True if a test has started the calling code, and this test has ended already."""
    task = _current_task()
    block = _block.get()
    if (block is not None and block.has_ended) or (task is not None and task in isolation.tasks):
        return True
    # If a thread has an empty context (`contextvars`), nobody knows which test has started it.
    # Return True for such a thread if a thread or task of an ended test is still running, and so
    # may have started it. Return False for threads that ran before the first test, and for worker
    # threads of anyio and trio, which run code of many tests.
    thread = threading.current_thread()
    return (
        task is None
        and block is None
        and _block not in copy_context()
        and thread not in isolation.threads
        and not type(thread).__module__.startswith(_POOLS)
        and (
            any(each.is_alive() for each in isolation.leftovers)
            or any(not each.done() for each in isolation.tasks)
        )
    )


def _refuse(connection: Connection, error: NotIsolated) -> NoReturn:
    def refuse(*_: object) -> NoReturn:
        raise error.with_traceback(None)

    # The test cannot roll back the work on this connection, so raise `error`. The application may
    # catch `error`. So let all later statements on this connection raise it too.
    for name in ("before_cursor_execute", "commit", "prepare_twophase", "commit_twophase"):
        event.listen(connection, name, refuse)
    raise error


def _not_covered(connection: Connection) -> NotIsolated:
    engine = without_secrets(connection.engine.url)
    return NotIsolated(
        engine,
        f"A session uses {engine}, which no `rolled_back` covers: its work would be stored.",
        "Give this engine to `rolled_back` too, as a database of its own: "
        "`rolled_back(database, AsyncDatabase.from_engine(engine))`, or `SyncDatabase`.",
    )


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
