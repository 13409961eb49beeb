"""Adds listeners to engines of the application, and removes the listeners after the last use."""

from collections import Counter
from threading import RLock
from weakref import WeakKeyDictionary, finalize

from sqlalchemy import Engine

from asgi_dbsession.session.failures import unwatch, watch
from asgi_dbsession.session.reads import unwatch_reads, watch_reads
from asgi_dbsession.unit.observer import UnitObserver

from .connecting import connect_as_before, connect_outside

# An RLock, because the garbage collector may call `_release` while `borrow` holds the lock in the
# same thread.
_mutex = RLock()
# For each engine: how many databases have built the engine ("owners"), and how many databases use
# the engine after `from_engine` ("borrowers").
_users: WeakKeyDictionary[Engine, Counter[str]] = WeakKeyDictionary()
# For each engine: the observers of databases that were garbage collected. Their `engine_left` is
# called when no database uses the engine any more.
_observers: WeakKeyDictionary[Engine, list[UnitObserver]] = WeakKeyDictionary()


def own(engine: Engine) -> None:
    """Count a database that has built the engine, so that the engine keeps its listeners."""
    with _mutex:
        _users.setdefault(engine, Counter())["owners"] += 1


def borrow(engine: Engine, database: object, observers: list[UnitObserver]) -> None:
    """Add listeners to an engine of the application, until the database is garbage collected.

    Args:
        engine: The engine of the application.
        database: The database that uses the engine.
        observers: The list of the database's observers; the database may add observers later.
    """
    with _mutex:
        _users.setdefault(engine, Counter())["borrowers"] += 1
        watch(engine)
        watch_reads(engine)
        connect_outside(engine)
    finalize(database, _release, engine, observers).atexit = False


def _release(engine: Engine, observers: list[UnitObserver]) -> None:
    with _mutex:
        users = _users[engine]
        users["borrowers"] -= 1
        observers = _observers.setdefault(engine, []) + observers
        _observers[engine] = observers
        if not users.total():
            unwatch(engine)
            unwatch_reads(engine)
            connect_as_before(engine)
            for observer in _observers.pop(engine):
                observer.engine_left(engine)
