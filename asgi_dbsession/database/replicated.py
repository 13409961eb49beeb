"""Starts and stops the replicas of a database object together with its own engine."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from typing_extensions import Self, override

from asgi_dbsession.unit.observer import UnitObserver

from .arguments import check_flags
from .engine_life import EngineLife
from .replicas import Replicas

E = TypeVar("E", bound=Engine | AsyncEngine)


class ReplicatedLife(EngineLife[E]):
    """The engine of a database object, which starts and stops together with its replicas."""

    # The class of the sessions: a subclass of SQLAlchemy's `Session`, also for an async database.
    _orm_class: type[Any]
    # An object of the class `ReplicaSet` of the package `replicas`. None without replicas.
    _replica_set: Any = None

    @property
    def replicas(self) -> tuple[Self, ...]:
        """The replicas, as objects of this class, each with its own `engine` and `health()`."""
        return self._replica_set.databases if self._replica_set is not None else ()

    @property
    def position(self) -> str | None:
        """The WAL position of the primary that the current client has seen; None if it is unknown.

        Read this property after a `begin()` block or in an `on_commit` function, and send it in a
        message to a worker. In the worker, `begin(read_only=True, after=position)` sees all changes
        that the client has seen, even on a replica. Without replicas, the value is always None.
        """
        return self._replica_set.position if self._replica_set is not None else None

    def _add_replicas(
        self, url: str | URL, replicas: Sequence[str | URL] | Replicas, options: dict[str, Any]
    ) -> None:
        # `ReplicaSet` refuses a wrong argument, also one that counts as false (None, or "").
        if not isinstance(replicas, Sequence) or isinstance(replicas, str) or replicas:
            from asgi_dbsession.replicas.replica_set import ReplicaSet
            from asgi_dbsession.replicas.route import routed_class

            database: Any = self
            self._replica_set = ReplicaSet(database, url, replicas, options)
            self._orm_class = routed_class(self._orm_class)

    def _see(self, position: str | None, *, join: bool, read_only: bool) -> None:
        # A single comparison, because this method runs at each `begin()`.
        if not type(join) is type(read_only) is bool:
            check_flags(join=join, read_only=read_only)
        if position is not None:
            from asgi_dbsession.replicas.seen_here import see

            see(self._replica_set, position, join=join, read_only=read_only)

    @override
    async def startup(self) -> None:
        await super().startup()
        if self._replica_set is not None:
            try:
                await self._replica_set.startup()
            except BaseException:
                await self.shutdown()
                raise

    @override
    async def shutdown(self) -> None:
        try:
            await super().shutdown()
        finally:
            if self._replica_set is not None and not self.is_running:
                await self._replica_set.shutdown()

    @override
    def after_fork(self) -> None:
        super().after_fork()
        if self._replica_set is not None:
            self._replica_set.after_fork()

    @override
    def observe(self, observer: UnitObserver) -> None:
        super().observe(observer)
        for each in self.replicas:
            each.observe(observer)
