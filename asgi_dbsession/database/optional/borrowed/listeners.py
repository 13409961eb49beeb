"""Adds listeners of this package to an engine that the application has made.

The listeners are removed when the last `AsyncDatabase` or `SyncDatabase` object that uses the
engine is garbage collected.
"""

from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, finalize

from sqlalchemy import Engine, event
from sqlalchemy.engine import Dialect

from asgi_dbsession.database.connecting import close_in_task, connect_in_task
from asgi_dbsession.database.listeners import built, prepare
from asgi_dbsession.database.url import refuse_autocommit
from asgi_dbsession.session._sqlalchemy import original_engine, stop_listening
from asgi_dbsession.session.failures import unwatch
from asgi_dbsession.session.reads import DRIVERS
from asgi_dbsession.unit.observer import UnitObserver

# This must be an RLock. The garbage collector may call `_release` in the thread that holds this
# lock, and with a plain lock this thread would wait forever.
_mutex = RLock()
# For each engine: a list of `finalize` objects, one for each `AsyncDatabase` or `SyncDatabase` that
# uses the engine. They call `_release` when their database object is garbage collected. The last
# call removes this package's event listeners from the engine.
_users: "WeakKeyDictionary[Engine, list[finalize[..., object]]]" = WeakKeyDictionary()
# For each engine: objects that may have added listeners to it, such as the recorder of reports.
# When no database object uses the engine any more, their method `engine_left` removes these
# listeners.
_observers: WeakKeyDictionary[Engine, list[UnitObserver]] = WeakKeyDictionary()


def borrow(engine: Engine, database: object, observers: list[UnitObserver]) -> None:
    """Add the listeners of this package to an engine that the application has made.

    When the last database object that uses the engine is garbage collected, the listeners are
    removed.

    Args:
        engine: The engine.
        database: The database object that uses the engine (`AsyncDatabase` or `SyncDatabase`).
        observers: The observers of the database object: objects that are notified of its units of
            work. The list may grow later. When the listeners are removed, each observer is told to
            remove its own listeners too (method `engine_left`).
    """
    with _mutex:
        prepare(engine)
        original = original_engine(engine)
        if original not in built:
            event.listen(original, "do_connect", _refuse_autocommit)
        user = finalize(database, _release, engine, observers)
        user.atexit = False
        _users.setdefault(engine, []).append(user)


def _release(engine: Engine, observers: list[UnitObserver]) -> None:
    with _mutex:
        _users[engine] = [each for each in _users[engine] if each.alive]
        _observers.setdefault(engine, []).extend(observers)
        if _users[engine] or engine in built:
            return
        original = original_engine(engine)
        if original not in built and not _is_used(original):
            unwatch(original)
            stop_listening(original, "do_connect", _refuse_autocommit)
            if original.dialect.driver in DRIVERS:
                from asgi_dbsession.session.optional.reads.delayed import unwatch_reads

                unwatch_reads(original)
            _connect_as_before(original)
        for observer in _observers.pop(engine, ()):
            observer.engine_left(engine)


def _refuse_autocommit(
    _dialect: Dialect, _record: object, _arguments: object, options: dict[str, Any]
) -> None:
    # Refuse the driver's option `autocommit` each time a connection is opened (event `do_connect`).
    # The option cannot be checked earlier, because an engine does not show its driver options.
    refuse_autocommit(options)


def _connect_as_before(engine: Engine) -> None:
    """Let the engine open and close its connections without this package again.

    The function `connect_in_tasks` has replaced methods of the driver and of the dialect.
    """
    for owner, name in ((engine.dialect.dbapi, "connect"), (engine.dialect, "do_terminate")):
        replacement = vars(owner).get(name)
        if isinstance(replacement, partial) and replacement.func in (
            connect_in_task,
            close_in_task,
        ):
            delattr(owner, name)


def _is_used(original: Engine) -> bool:
    """Return True if an `AsyncDatabase` or `SyncDatabase` object uses an engine or a copy of it.

    `Engine.execution_options` makes a copy, which shares the listeners of the original engine.
    """
    return any(users and original_engine(engine) is original for engine, users in _users.items())
