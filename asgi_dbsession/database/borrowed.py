"""Engines of the application's own: what this package adds to them, and takes away again."""

from collections import Counter
from threading import RLock
from weakref import WeakKeyDictionary, finalize

from sqlalchemy import Engine

from asgi_dbsession.session.failures import unwatch, watch
from asgi_dbsession.session.reads import unwatch_reads, watch_reads
from asgi_dbsession.unit.observer import UnitObserver

_mutex = RLock()  # the garbage collector may run `_release` while `borrow` holds it
# How many databases use an engine, by the text that says whether they own it.
_users: WeakKeyDictionary[Engine, Counter[str]] = WeakKeyDictionary()
# Whoever observed a database that used the engine, and is gone.
_observers: WeakKeyDictionary[Engine, list[UnitObserver]] = WeakKeyDictionary()


def own(engine: Engine) -> None:
    """Count a database that has built the engine: the listeners stay for as long as the engine."""
    with _mutex:
        _users.setdefault(engine, Counter())["owners"] += 1


def borrow(engine: Engine, database: object, observers: list[UnitObserver]) -> None:
    """Watch an engine for as long as a database lives that does not own it.

    Args:
        engine: The engine of the application.
        database: The database that uses it.
        observers: The observers of the database, now and later.
    """
    with _mutex:
        _users.setdefault(engine, Counter())["borrowers"] += 1
        watch(engine)
        watch_reads(engine)
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
            for observer in _observers.pop(engine):
                observer.engine_left(engine)
