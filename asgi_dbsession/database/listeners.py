"""Prepares an engine for this package: adds all listeners that the package needs."""

from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from asgi_dbsession.session._sqlalchemy import original_engine
from asgi_dbsession.session.failures import watch
from asgi_dbsession.session.reads import DRIVERS

from .connecting import connect_in_tasks

# The engines that this package has built itself. Their listeners are never removed.
built: WeakSet[Engine] = WeakSet()


def prepare(engine: Engine) -> None:
    """Add the listeners of this package to an engine.

    Some pools (`StaticPool`, for example) let several sessions use one connection at the same time.
    If the engine has such a pool, log a warning.
    """
    engine = original_engine(engine)
    watch(engine)
    if engine.dialect.driver in DRIVERS:
        from asgi_dbsession.session.optional.reads.delayed import watch_reads

        watch_reads(engine)
    connect_in_tasks(engine)
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        from .optional.shared import warn_of_shared_connection

        warn_of_shared_connection(engine)
