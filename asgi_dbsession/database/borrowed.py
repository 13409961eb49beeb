"""Engines of the application's own: what this package adds to them, and takes away again."""

from collections import Counter
from threading import RLock
from weakref import WeakKeyDictionary, finalize

from sqlalchemy import Engine

from asgi_dbsession.reports.stats import unwatch_usage
from asgi_dbsession.session.commit import unwatch, watch

_mutex = RLock()  # the garbage collector may run `_release` while `borrow` holds it
# How many databases use an engine, by the text that says whether they own it.
_users: WeakKeyDictionary[Engine, Counter[str]] = WeakKeyDictionary()


def own(engine: Engine) -> None:
    """Count a database that has built the engine: the listeners stay for as long as the engine."""
    with _mutex:
        _users.setdefault(engine, Counter())["owners"] += 1


def borrow(engine: Engine, database: object) -> None:
    """Watch an engine for as long as a database lives that does not own it."""
    with _mutex:
        _users.setdefault(engine, Counter())["borrowers"] += 1
        watch(engine)
    finalize(database, _release, engine).atexit = False


def _release(engine: Engine) -> None:
    with _mutex:
        users = _users[engine]
        users["borrowers"] -= 1
        if not users.total():
            unwatch(engine)
            unwatch_usage(engine)
