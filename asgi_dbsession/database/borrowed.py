"""Adds the listeners of this package to engines, and removes them after the last use."""

from collections import Counter
from threading import RLock
from weakref import WeakKeyDictionary, finalize

from sqlalchemy import Engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from asgi_dbsession.session._sqlalchemy import original_engine
from asgi_dbsession.session.failures import unwatch, watch
from asgi_dbsession.session.reads import unwatch_reads, watch_reads
from asgi_dbsession.unit.observer import UnitObserver

from .connecting import connect_as_before, connect_outside

# This must be an RLock. The garbage collector may call `_release` in the thread that holds this
# lock.
_mutex = RLock()
# For each engine: how many database objects have built the engine themselves ("owners"), and how
# many have got it from the application by `from_engine` ("borrowers").
_users: WeakKeyDictionary[Engine, Counter[str]] = WeakKeyDictionary()
# For each engine: the observers of database objects that were garbage collected. Their method
# `engine_left` is called later, when no database object uses the engine any more.
_observers: WeakKeyDictionary[Engine, list[UnitObserver]] = WeakKeyDictionary()


def prepare(engine: Engine) -> None:
    """Add all listeners that this package needs to an engine, and warn of its pool."""
    engine = original_engine(engine)
    watch(engine)
    watch_reads(engine)
    connect_outside(engine)
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        from asgi_dbsession.mistakes.shared import warn_of_shared_connection

        warn_of_shared_connection(engine)


def _restore(engine: Engine) -> None:
    engine = original_engine(engine)
    unwatch(engine)
    unwatch_reads(engine)
    connect_as_before(engine)


def own(engine: Engine) -> None:
    """Count a database object that has built the engine, so that the engine keeps its listeners."""
    with _mutex:
        _users.setdefault(engine, Counter())["owners"] += 1


def borrow(engine: Engine, database: object, observers: list[UnitObserver]) -> None:
    """Add listeners to an engine of the application, until the database object is freed.

    Args:
        engine: The engine that the application has made.
        database: The database object that uses the engine.
        observers: The list of observers of the database object, which may grow later.
    """
    with _mutex:
        _users.setdefault(engine, Counter())["borrowers"] += 1
        prepare(engine)
    finalize(database, _release, engine, observers).atexit = False


def _release(engine: Engine, observers: list[UnitObserver]) -> None:
    with _mutex:
        users = _users[engine]
        users["borrowers"] -= 1
        observers = _observers.setdefault(engine, []) + observers
        _observers[engine] = observers
        if not users.total():
            if not _is_used(original_engine(engine)):
                _restore(engine)
            for observer in _observers.pop(engine):
                observer.engine_left(engine)


def _is_used(original: Engine) -> bool:
    """Return True if a database object uses the engine, or a copy of it with other options."""
    return any(
        users.total() and original_engine(engine) is original for engine, users in _users.items()
    )
